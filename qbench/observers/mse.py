"""The clip that minimises the squared quantization error of a tensor.

    E(low, high) = Σ (x̂ − x)²                        x̂ on the grid of [low, high]
    a pass         multiply an end (or both) by f = 1/N, 2/N, … 1 and keep the range with the least E        N = 32

    symmetric      both ends, twice                   the second pass has steps as fine as f/N
    asymmetric     high, low, high, low

Every pass can keep what it started from, so the error never exceeds that of min–max. Of a row of more than 2¹⁴ values,
every nth is looked at.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from qbench.errors import ConfigError
from qbench.numerics.qparams import QSpec, choose_qparams, fake_quantize
from qbench.observers.base import LatestObserver
from qbench.observers.min_max import MovingAverageMinMaxObserver
from qbench.observers.quantile import sampled

LARGEST_SAMPLE = 2**14

# Whether low and high move, pass by pass.
SYMMETRIC_PASSES = ((True, True),) * 2
ASYMMETRIC_PASSES = ((False, True), (True, False)) * 2


class MSEObserver(MovingAverageMinMaxObserver):
    """Moving average of the range that quantizes each tensor best.

    A search costs some hundred passes over the sample: meant for calibration, `disable_observer` ends it.

    Args:
        spec: What is wanted.
        averaging_constant: Weight of the newest tensor.
        steps: `N`, how many clips a pass tries.

    Raises:
        ConfigError: fewer than 2 steps.
    """

    clips = True

    def __init__(self, spec: QSpec, averaging_constant: float = 0.1, steps: int = 32) -> None:
        super().__init__(spec, averaging_constant)
        if not isinstance(steps, int) or steps < 2:
            raise ConfigError(f"MSEObserver(steps={steps!r}): expected 2 or more, steps=32 for example")
        self.steps = steps

    def range_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The range of `x` that loses least."""
        rows = self.rows(x)
        low, high = torch.aminmax(rows, dim=1)
        low, high = low.clamp(max=0.0), high.clamp(min=0.0)
        rows = sampled(rows, LARGEST_SAMPLE)
        for moves in SYMMETRIC_PASSES if self.spec.symmetric else ASYMMETRIC_PASSES:
            low, high = self._pass(rows, low, high, *moves)
        return self.from_rows(low, x), self.from_rows(high, x)

    def _pass(
        self, rows: Tensor, low: Tensor, high: Tensor, low_moves: bool, high_moves: bool
    ) -> tuple[Tensor, Tensor]:
        best, least = torch.ones_like(low), self.error(rows, low, high)
        for step in range(1, self.steps):
            factor = step / self.steps
            error = self.error(rows, low * factor if low_moves else low, high * factor if high_moves else high)
            better = error < least
            least, best = torch.where(better, error, least), torch.where(better, factor, best)
        return low * best if low_moves else low, high * best if high_moves else high

    def error(self, rows: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """`E` of each row, (rows,), for ranges (rows,)."""
        spec = dataclasses.replace(self.spec, axis=0, group_size=None)
        return (fake_quantize(rows, choose_qparams(low, high, spec)) - rows).square().sum(1)


class LatestMSEObserver(LatestObserver, MSEObserver):
    """The best range of the tensor at hand, for weights."""

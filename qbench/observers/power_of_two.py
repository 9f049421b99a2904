"""The power-of-two scale that loses least.

    s_m = smallest power of two that covers [min x, max x]
    s   = s_m · 2^(−j),  j = 0 … 4,  with the least Σ (x̂ − x)²

Hardware without a multiplier shifts. Rounding a min–max scale up to a power of two wastes up to a bit, halving it
clips: which is worse depends on the tensor. The answer is a range whose grid has exactly this scale, whether the spec
asks for powers of two or not. Over several tensors the ranges are averaged, and the scale of the mean is rounded to the
nearest power of two (by its exponent).
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from qbench.numerics.qparams import QParams, QSpec, choose_qparams, fake_quantize
from qbench.observers.base import LatestObserver
from qbench.observers.min_max import MovingAverageMinMaxObserver
from qbench.observers.mse import LARGEST_SAMPLE
from qbench.observers.quantile import sampled

HALVINGS = 4


class PowerOfTwoObserver(MovingAverageMinMaxObserver):
    """Range of the nearest power of two to the mean of the best scales of each tensor.

    Args:
        spec: What is wanted; its grid becomes one of powers of two.
        averaging_constant: Weight of the newest tensor.
    """

    clips = True

    def __init__(self, spec: QSpec, averaging_constant: float = 0.1) -> None:
        super().__init__(dataclasses.replace(spec, power_of_two=True), averaging_constant)

    def range_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """A range of `x` whose grid has the scale that loses least."""
        rows = self.rows(x)
        low, high = torch.aminmax(rows, dim=1)
        low, high = low.clamp(max=0.0), high.clamp(min=0.0)
        rows = sampled(rows, LARGEST_SAMPLE)
        spec = dataclasses.replace(self.spec, axis=0, group_size=None)
        best_low, best_high, least = low, high, torch.full_like(low, torch.inf)
        for halving in range(HALVINGS + 1):
            grid = choose_qparams(low * 0.5**halving, high * 0.5**halving, spec)
            error = (fake_quantize(rows, grid) - rows).square().sum(1)
            better = error < least
            least = torch.where(better, error, least)
            ends = _ends(grid, spec)
            best_low, best_high = torch.where(better, ends[0], best_low), torch.where(better, ends[1], best_high)
        return self.from_rows(best_low, x), self.from_rows(best_high, x)

    def update(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Move the mean range towards that of `x`; returns the range of the nearest power of two."""
        mean = choose_qparams(*super().update(x), dataclasses.replace(self.spec, power_of_two=False))
        exponent = torch.round(torch.log2(mean.scale)).to(torch.int32)
        nearest = torch.ldexp(torch.ones_like(mean.scale), exponent)
        # log2 of NaN and infinity has no exponent: they must stay what they are, to be found by QParams.check.
        scale = torch.where(torch.isfinite(mean.scale), nearest, mean.scale)
        return _ends(dataclasses.replace(mean, scale=scale), self.spec)


class LatestPowerOfTwoObserver(LatestObserver, PowerOfTwoObserver):
    """The best power-of-two scale of the tensor at hand, for weights."""


def _ends(grid: QParams, spec: QSpec) -> tuple[Tensor, Tensor]:
    """The range from which `choose_qparams` makes this grid: exact where the scale is a power of two."""
    if spec.symmetric:
        high = grid.scale * (spec.qmax if spec.signed else (spec.qmax - spec.qmin) // 2)
        return -high, high
    return (spec.qmin - grid.zero_point) * grid.scale, (spec.qmax - grid.zero_point) * grid.scale

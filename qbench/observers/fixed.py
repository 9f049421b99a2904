"""Grids that are known before any data: that of a probability, say, or one that a runtime demands.

    a range    [low, high], which the spec makes a grid of, as of every other range
    a grid     s and z themselves        low = (qmin − z)·s        high = (qmax − z)·s
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from qbench.errors import ConfigError
from qbench.numerics.qparams import QParams, QSpec, choose_qparams
from qbench.observers.base import Observer


class FixedObserver(Observer):
    """Base of the observers that answer with one grid and keep nothing of what they see.

    Attributes:
        low: Lowest value of the range.
        high: Highest value of the range.
        known: Scale and zero point of the grid.
    """

    low: float
    high: float
    known: tuple[float, int]

    def update(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The range, as tensors on the device of `x`."""
        low, high = (torch.full((), value, dtype=torch.float32, device=x.device) for value in (self.low, self.high))
        self.keep(low, high)
        return low, high


class FixedRangeObserver(FixedObserver):
    """Answers with the grid of one range.

    Args:
        spec: What is wanted.
        low: Lowest value.
        high: Highest value.
    """

    def __init__(self, spec: QSpec, low: float, high: float) -> None:
        super().__init__(spec)
        self.low, self.high = low, high
        found = choose_qparams(torch.tensor(low), torch.tensor(high), spec)
        self.known = float(found.scale), int(found.zero_point)


class FixedGridObserver(FixedObserver):
    """Answers with one scale and one zero point.

    Args:
        spec: What is wanted, per tensor.
        scale: Rounded to float32.
        zero_point: A code of the spec.

    Raises:
        ConfigError: no such grid has the spec.
    """

    def __init__(self, spec: QSpec, scale: float, zero_point: int) -> None:
        super().__init__(spec)
        _check_grid(spec, scale, zero_point)
        scale = float(torch.tensor(scale, dtype=torch.float32))
        self.known = scale, zero_point
        self.low, self.high = (spec.qmin - zero_point) * scale, (spec.qmax - zero_point) * scale

    @torch.no_grad()
    def forward(self, x: Tensor) -> QParams:
        """The grid, to the bit: a range would be divided by the number of codes again."""
        self.update(x)
        scale, zero_point = self.known
        return QParams(
            torch.full((), scale, dtype=torch.float32, device=x.device),
            torch.full((), zero_point, dtype=torch.int32, device=x.device),
            self.spec.qmin,
            self.spec.qmax,
        )


def _check_grid(spec: QSpec, scale: Any, zero_point: Any) -> None:
    grid = f"a grid with scale {scale!r} and zero point {zero_point!r}"
    if spec.axis is not None:
        raise ConfigError(f"{grid} is one for a whole tensor, not {spec}; QSpec(axis=None)")
    if not (isinstance(scale, (int, float)) and 0.0 < scale < math.inf):
        raise ConfigError(f"{grid}: expected a scale that is positive and finite, 1/256 for example")
    if spec.power_of_two and math.frexp(scale)[0] != 0.5:
        near = 2.0 ** round(math.log2(scale))
        raise ConfigError(f"{grid}: expected a power of two, as {spec} says; {near} is the nearest")
    middle = 0 if spec.signed else (spec.qmax + 1) // 2
    if isinstance(zero_point, int) and spec.symmetric and zero_point != middle:
        raise ConfigError(f"{grid}: {spec} has the zero point {middle}; QSpec(symmetric=False) may have another")
    if not (isinstance(zero_point, int) and spec.qmin <= zero_point <= spec.qmax):
        raise ConfigError(f"{grid}: expected a zero point among the codes {spec.qmin} … {spec.qmax}")

"""Rounding to a grid per tensor whose numbers are at hand, as they are on a CPU: clamps between two floats.

    g(v) = rne(fl(v · fl(1/s)))         codes less the zero point: monotone in v, as each of its roundings is

    clamp(g(v), L, H) = g(clamp(v, fl(L·s), fl(H·s)))         as g(fl(L·s)) = L
    {v : L ≤ g(v) ≤ H}                                        an interval of floats

So what an activation cuts and what the grid cuts is cut by one clamp, and where a gradient passes is one comparison
with either end. Ends are found by trying the floats around (H + ½)·s; below, g(−v) = −g(v).
"""

from __future__ import annotations

import math
import struct
from typing import NamedTuple

import torch
from torch import Tensor

from qbench.numerics.blocks import Scratch, in_blocks, in_parts
from qbench.numerics.qparams import QParams, QSpec

# Steps up to here are exact in float32 with room to spare for the rounding of L·s and of its product with 1/s.
_WIDEST = 1 << 20

# How many floats `first_beyond` looks at on either side, and the bits of infinity.
_REACH, _INFINITY = 4, 0x7F800000

_FLOAT, _INTEGER = struct.Struct("f"), struct.Struct("i")


class Numbers(NamedTuple):
    """A grid per tensor whose scale and zero point are numbers; see `QParams`."""

    scale: float
    zero_point: int
    qmin: int
    qmax: int


class Interval(NamedTuple):
    """A grid, and the activation before it, `clamp(v, low, high)`, in numbers that float32 holds.

    Attributes:
        scale: `s`.
        steps_per_unit: `fl(1/s)`.
        first: `L`, the lowest code less the zero point.
        last: `H`, the highest.
        low: Lower bound of the activation; −inf where it has none.
        high: Upper bound of the activation; inf where it has none.
    """

    scale: float
    steps_per_unit: float
    first: int
    last: int
    low: float
    high: float

    def passing(self) -> tuple[float, float]:
        """The gradient passes for values above the first number and below the second."""
        above, below = -self._first_beyond(-self.first), self._first_beyond(self.last)
        return max(above, self.low), min(below, self.high)

    def quantize(self, v: Tensor, out: Tensor, mask: Tensor | None = None) -> None:
        """The activation, then the grid.

        Args:
            v: float32 on a CPU, any shape.
            out: Like `v`, or `v` itself: becomes the result.
            mask: int8, like `v`: becomes 1 where the gradient passes, else 0.
        """
        if mask is not None:
            above, below = self.passing()
            one, room = torch.ones(()), Scratch()
            for source, inside in in_blocks(v, mask):
                inside.copy_(passed(one, source, above, below, out=room.like(source)))
        least, most = max(self.low, _float32(self.first * self.scale)), min(self.high, _float32(self.last * self.scale))
        for source, target in in_parts(v, out):
            torch.clamp(source, least, most, out=target).mul_(self.steps_per_unit).round_().mul_(self.scale)

    def _first_beyond(self, steps: int) -> float:
        """The smallest float32 `v` with `g(v) > steps`; infinity where there is none, NaN without a usable scale."""
        inverse = self.steps_per_unit
        if not 0.0 < inverse < math.inf:
            return math.nan
        # A product of two float32 numbers is exact in float64.
        found = _float32((steps + 0.5) * self.scale)
        while found < math.inf and round(_float32(found * inverse)) <= steps:
            found = _neighbour(found, 1)
        while round(_float32(_neighbour(found, -1) * inverse)) > steps:
            found = _neighbour(found, -1)
        return found


def is_served(grid: QParams | QSpec) -> bool:
    """Whether there are intervals of such grids: one for the whole tensor, codes of up to 20 bits."""
    return grid.axis is None and max(-grid.qmin, grid.qmax) < _WIDEST


def interval_of(grid: QParams | Numbers, bounds: tuple[float, float] = (-math.inf, math.inf)) -> Interval:
    """The interval of a grid that lies on a CPU.

    Args:
        grid: See `is_served`.
        bounds: Of an activation before it, `clamp(v, low, high)`: where it cuts, no gradient passes.
    """
    scale, zero = float(grid.scale), int(grid.zero_point)
    return Interval(scale, _float32(1.0 / scale) if scale else math.inf, grid.qmin - zero, grid.qmax - zero, *bounds)


def passed(grad: Tensor, v: Tensor, above: float, below: float, out: Tensor) -> Tensor:
    """`grad`, like `v` or (), where `above < v < below`, else 0, written to `out`: the op that masks in one pass."""
    found: Tensor = torch.ops.aten.hardtanh_backward(grad, v, above, below, grad_input=out)
    return found


def first_beyond(steps: Tensor, scale: Tensor) -> Tensor:
    """The smallest float32 `v` with `g(v) > steps`, of the shape of `scale`; infinity where there is none.

    Args:
        steps: `H`, float32, 0 or more, whole.
        scale: `s`, float32, positive.
    """
    inverse = 1.0 / scale
    # Of positive floats, the integers that have their bits are in their order, and neighbours are neighbours.
    bits = ((steps + 0.5) * scale).view(torch.int32) - _REACH
    found = bits
    for offset in range(2 * _REACH):
        tried = (bits + offset).clamp(max=_INFINITY).view(torch.float32)
        found = found + ((tried * inverse).round() <= steps).to(torch.int32)
    return found.clamp(max=_INFINITY).view(torch.float32)


def _float32(x: float) -> float:
    try:
        found: float = _FLOAT.unpack(_FLOAT.pack(x))[0]
    except OverflowError:
        found = math.copysign(math.inf, x)
    return found


def _neighbour(x: float, steps: int) -> float:
    """The float32 number so many steps above a positive one."""
    found: float = _FLOAT.unpack(_INTEGER.pack(_INTEGER.unpack(_FLOAT.pack(x))[0] + steps))[0]
    return found

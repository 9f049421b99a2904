"""What a target's integer arithmetic is: one small function per operation, on tensors of codes.

    real = (code − zero_point) · scale

Every function takes codes as the program stores them and returns codes of the output grid, with the very bits that the
target's runtime computes. Where a target has no exact row for an operation, the field is None and a fusion rule refuses
with the reason that `inexact` gives.

`acc` is the exact integer sum Σ (x − z)·w + bias of a convolution or matrix product: an integer dtype, or a float dtype
that holds it exactly.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Grid(NamedTuple):
    """The per-tensor grid of a tensor of codes, as plain numbers: what a program's q and dq nodes hold.

    Attributes:
        scale: A float32 value, positive.
        zero_point: The code of 0.
        qmin: Lowest code.
        qmax: Highest code.
        dtype: Of the codes as the program stores them.
    """

    scale: float
    zero_point: int
    qmin: int
    qmax: int
    dtype: torch.dtype = torch.int8

    def stored_as(self, dtype: torch.dtype) -> Grid:
        """The same grid with its codes in another 8-bit dtype: int8 codes are uint8 codes − 128."""
        shift = {torch.int8: 0, torch.uint8: 128}
        if self.dtype == dtype or self.dtype not in shift or dtype not in shift:
            return self
        offset = shift[dtype] - shift[self.dtype]
        return Grid(self.scale, self.zero_point + offset, self.qmin + offset, self.qmax + offset, dtype)


class Window(NamedTuple):
    """Geometry of an average pool in two dimensions; `divisor` as in `torch.nn.AvgPool2d(divisor_override=)`."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    ceil_mode: bool
    count_include_pad: bool
    divisor: int | None = None


class Limit(NamedTuple):
    """The scale ratios that an operation of a runtime takes: `low <= ratio < high`; `ratio` says of what, in words."""

    ratio: str
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """How one target computes each operation on codes.

    Attributes:
        name: The target's name.
        quantize: (x float32, out) -> codes. The rule for NaN and infinities is the target's.
        requantize: (acc, scale, out) -> codes; `scale` is `s_in · s_w`, () or broadcastable to `acc`, exact in float64
            or rounded to float32 (then a target that does not round it gives other codes here and there). It may
            overwrite `acc`: a caller that reads it afterwards passes a copy.
        add: (a, grid of a, b, grid of b, out) -> codes of a + b, shapes broadcast.
        sub: The same of a − b.
        mul: The same of a · b.
        global_average: (sums, count, grid, out) -> codes of the mean of `count` values; `sums` holds Σ (c − z), in
            integers.
        average_pool: (codes (batch, channels, height, width), grid, out, window) -> codes.
        rescale: (codes, grid, out) -> the same reals on another grid; a part of a `cat`, or q after dq.
        table: (function, parameters, grid, out) -> (256,) codes by input code − lowest code of the input's dtype.
            Functions and parameters are those of `qbench.numerics.arithmetic.functions.FUNCTIONS`.
        shared_max_pool: Whether a max pool needs equal grids at both ends (else it is rescaled behind it).
        limits: Operation -> ratios of scales that the runtime takes; beyond them it fails or computes in float.
        inexact: Operation -> why the target's own result is not reproduced; what a refusal says.
    """

    name: str
    quantize: Callable[[Tensor, Grid], Tensor]
    requantize: Callable[[Tensor, Tensor, Grid], Tensor]
    add: Callable[[Tensor, Grid, Tensor, Grid, Grid], Tensor] | None = None
    sub: Callable[[Tensor, Grid, Tensor, Grid, Grid], Tensor] | None = None
    mul: Callable[[Tensor, Grid, Tensor, Grid, Grid], Tensor] | None = None
    global_average: Callable[[Tensor, int, Grid, Grid], Tensor] | None = None
    average_pool: Callable[[Tensor, Grid, Grid, Window], Tensor] | None = None
    rescale: Callable[[Tensor, Grid, Grid], Tensor] | None = None
    table: Callable[[str, Sequence[float], Grid, Grid], Tensor] | None = None
    shared_max_pool: bool = True
    limits: Mapping[str, Limit] = dataclasses.field(default_factory=dict, hash=False)
    inexact: Mapping[str, str] = dataclasses.field(default_factory=dict, hash=False)


def largest_sum(count: int, a: Grid, b: Grid) -> int:
    """Bound of |Σ (c_a − z_a)·(c_b − z_b)| over `count` products of any codes that the dtypes of two grids hold."""
    farthest = []
    for grid in (a, b):
        info = torch.iinfo(grid.dtype)
        farthest.append(max(info.max - grid.zero_point, grid.zero_point - info.min))
    return count * farthest[0] * farthest[1]


def dequantize_codes(codes: Tensor, grid: Grid) -> Tensor:
    """`(c − z)·s` in float32, which every runtime computes alike: the difference is exact, the product rounds once."""
    return codes.to(torch.float32, copy=True).sub_(grid.zero_point).mul_(grid.scale)


def saturate(rounded: Tensor, out: Grid) -> Tensor:
    """Clamp integer-valued numbers to the codes of a grid and store them in its dtype."""
    return rounded.clamp(out.qmin, out.qmax).to(out.dtype)

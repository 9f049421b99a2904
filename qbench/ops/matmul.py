"""The product of two matrices of codes that are both computed while the program runs, as in attention.

    acc = Σ (a − z_a)·(b − z_b)                     exact
    y   = requantize(acc, f32(s_a · s_b))           the target's

Shapes: a (…, rows, inner), b (…, inner, columns), whose leading dims broadcast; result (…, rows, columns).

Nothing is known of the codes before the call, so the sum is bounded by the grids: of `n` products, any subset in any
order lies within ±n · max|a − z_a| · max|b − z_b|. float32 holds that for 258 products of any two grids, and for 1,024
with zero points of 0. Longer rows are split into runs of so many, which float64 adds up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qbench.errors import NumericsError
from qbench.numerics.arithmetic import Grid
from qbench.numerics.arithmetic.base import largest_sum
from qbench.ops import exact
from qbench.ops.arguments import broadcast, channel_scale, input_grid, operation, output_grid
from qbench.ops.library import OUT, define

#: Beyond it the int32 accumulators of runtimes would wrap around.
_LARGEST = 2**31 - 1


def matmul(
    a: Tensor, a_scale: float, a_zero_point: int, b: Tensor, b_scale: float, b_zero_point: int, *out: Any
) -> Tensor:
    """Codes of a matrix product; arguments as in the schema.

    Raises:
        NumericsError: dtypes or shapes that do not fit, or so long a sum that int32 need not hold it.
        ConfigError: the target has no arithmetic.
    """
    a_grid, b_grid, out_grid, shape = _checked(a, a_scale, a_zero_point, b, b_scale, b_zero_point, *out)
    requantize = operation(out[-1], "requantize")
    if 0 in shape:
        return torch.empty(shape, dtype=out_grid.dtype, device=a.device)
    if largest_sum(a.shape[-1], a_grid, b_grid) > _LARGEST:
        raise NumericsError(
            f"a sum of {a.shape[-1]} products with zero points {a_zero_point} and {b_zero_point} can leave int32; "
            f"expected at most {_LARGEST // largest_sum(1, a_grid, b_grid)} products: keep this product in float"
        )
    acc = exact_sum(a, a_grid, b, b_grid)
    scale = channel_scale(a_scale, torch.tensor(b_scale, dtype=torch.float32, device=a.device), 0)
    return requantize(acc, scale, out_grid).contiguous()


def exact_sum(a: Tensor, a_grid: Grid, b: Tensor, b_grid: Grid) -> Tensor:
    """`acc` (…, rows, columns) in float32 or float64, exact."""
    parts = _parts(a.shape[-1], a_grid, b_grid, exact.float32_is_summed(a.device, "matmul"))

    def kernel(run: Tensor, index: int) -> Tensor:
        part = parts[index]
        codes = b if part.count == exact.WHOLE else b.narrow(-2, part.start, part.count)
        return torch.matmul(run, exact.differences(codes, b_grid, part.dtype))

    return exact.add_parts(a, a_grid, -1, parts, kernel)


def _parts(inner: int, a_grid: Grid, b_grid: Grid, float32: bool) -> list[exact.Part]:
    """Runs of products that float32 sums exactly, as few as possible; else one sum in float64."""
    if not float32:
        return [exact.Part(0, exact.WHOLE, torch.float64, None)]
    longest = exact.FLOAT32_INTEGERS // largest_sum(1, a_grid, b_grid)
    if inner <= longest:
        return [exact.Part(0, exact.WHOLE, torch.float32, None)]
    starts = range(0, inner, longest)
    return [exact.Part(start, min(longest, inner - start), torch.float32, None) for start in starts]


def _checked(
    a: Tensor, a_scale: float, a_zero_point: int, b: Tensor, b_scale: float, b_zero_point: int, *out: Any
) -> tuple[Grid, Grid, Grid, Sequence[Any]]:
    """The grids of both operands and of the result, and its shape."""
    grids = input_grid("a", a, a_scale, a_zero_point), input_grid("b", b, b_scale, b_zero_point)
    if a.ndim < 2 or b.ndim < 2 or a.shape[-1] != b.shape[-2]:
        raise NumericsError(
            f"a has shape {list(a.shape)} and b {list(b.shape)}; expected (…, rows, inner) and (…, inner, columns)"
        )
    return *grids, output_grid(*out), [*broadcast(a, b, trailing=2), a.shape[-2], b.shape[-1]]


def fake_matmul(
    a: Tensor, a_scale: float, a_zero_point: int, b: Tensor, b_scale: float, b_zero_point: int, *out: Any
) -> Tensor:
    """Shape and dtype of `matmul`."""
    *_, grid, shape = _checked(a, a_scale, a_zero_point, b, b_scale, b_zero_point, *out)
    return torch.empty(shape, dtype=grid.dtype, device=a.device)


define(
    "matmul_q8ta_q8ta_q8to(Tensor a, float a_scale, int a_zero_point, Tensor b, float b_scale, int b_zero_point, "
    f"{OUT}",
    matmul,
    fake_matmul,
)

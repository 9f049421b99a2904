"""XNNPACK's arithmetic on x64 CPUs, as ExecuTorch delegates to it.

    quantize       clamp(rne(x · f32(1/s)) + z); NaN becomes the highest code
    requantize     clamp(rne(f32(acc) · f32(s_b / s_out)) + z_out)
    add, sub       r = f32(s / s_out)    shift = 20 − floor(log2(max(r_a, r_b)))    m = rne(r · 2^shift)
                   clamp((((a − z_a)·m_a ± (b − z_b)·m_b + 2^(shift − 1)) >> shift) + z_out)
    mul            clamp(rne(f32((a − z_a)·(b − z_b)) · f32(f32(s_a·s_b) / s_out)) + z_out)
    average        M = f32(f32(s / s_out) · f32(1/n))    B = f32(z_out − f32(f32(z·n) · M))
                   clamp(rne(f32(f32(f32(Σ c) · M) + B)))
    rescale        quantize(dequantize(c))
    table          quantize(f(dequantize(c))), f in the float32 steps of `xnnpack_functions`

Codes are int8 there: functions whose steps depend on the zero point shift uint8 codes first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from qbench.numerics.arithmetic.base import Arithmetic, Grid, Limit, dequantize_codes, saturate
from qbench.numerics.arithmetic.float_steps import float32
from qbench.numerics.arithmetic.onnxruntime import requantize
from qbench.numerics.arithmetic.xnnpack_functions import STEPS


def quantize(x: Tensor, out: Grid) -> Tensor:
    """The convert operator from float32 to 8 bits."""
    inverse = 1.0 / torch.tensor(out.scale, dtype=torch.float32, device=x.device)
    rounded = torch.round(x.to(torch.float32) * inverse) + out.zero_point
    return saturate(torch.nan_to_num(rounded, nan=out.qmax), out)


def rescale(codes: Tensor, grid: Grid, out: Grid) -> Tensor:
    """Two convert operators: to float32 and back."""
    return quantize(dequantize_codes(codes, grid), out)


def add(a: Tensor, a_grid: Grid, b: Tensor, b_grid: Grid, out: Grid) -> Tensor:
    """The sum in fixed point, in int32: both multipliers have at most 21 bits, both differences 9."""
    return _weighted_sum(a, a_grid, b, b_grid, out, sign=1)


def sub(a: Tensor, a_grid: Grid, b: Tensor, b_grid: Grid, out: Grid) -> Tensor:
    """The difference: the sum with the second multiplier negated."""
    return _weighted_sum(a, a_grid, b, b_grid, out, sign=-1)


def _weighted_sum(a: Tensor, a_grid: Grid, b: Tensor, b_grid: Grid, out: Grid, *, sign: int) -> Tensor:
    ratios = [float32(grid.scale / out.scale) for grid in (a_grid, b_grid)]
    # Below 2^-10 every sum is less than half a step, whatever the multipliers; above 2^19 any two codes saturate or
    # cancel. The bounds keep both in int32.
    shift = min(max(20 - (math.frexp(max(ratios))[1] - 1), 1), 30)
    a_multiplier, b_multiplier = (round(math.ldexp(ratio, shift)) for ratio in ratios)
    b_multiplier *= sign
    offset = (1 << (shift - 1)) - a_grid.zero_point * a_multiplier - b_grid.zero_point * b_multiplier
    total = a.to(torch.int32) * a_multiplier + offset + b.to(torch.int32) * b_multiplier
    return saturate((total >> shift) + out.zero_point, out)


def mul(a: Tensor, a_grid: Grid, b: Tensor, b_grid: Grid, out: Grid) -> Tensor:
    """The product, which float32 holds exactly, times one float32 ratio."""
    ratio = float32(float32(a_grid.scale * b_grid.scale) / out.scale)
    product = (a.to(torch.float32) - a_grid.zero_point) * (b.to(torch.float32) - b_grid.zero_point)
    return saturate(torch.round(product * ratio) + out.zero_point, out)


def global_average(sums: Tensor, count: int, grid: Grid, out: Grid) -> Tensor:
    """The mean over height and width of what is stored, int8, and the zero points as one float32 bias.

    `count · 128` must stay in float32's integers: 2^17 values at most are exact there.
    """
    stored, stored_out = grid.stored_as(torch.int8), out.stored_as(torch.int8)
    ratio = float32(float32(grid.scale / out.scale) * float32(1.0 / count))
    bias = float32(stored_out.zero_point - float32(float32(stored.zero_point * count) * ratio))
    raw = (sums + stored.zero_point * count).to(torch.float32)
    codes = saturate(torch.round(raw * ratio + bias), stored_out)
    return (codes.to(torch.int32) + (out.zero_point - stored_out.zero_point)).to(out.dtype)


def table(function: str, parameters: Sequence[float], grid: Grid, out: Grid) -> Tensor:
    """A convert operator, the float kernel, a convert operator, for each of the 256 codes."""
    info = torch.iinfo(grid.dtype)
    codes = torch.arange(info.min, info.max + 1)
    return quantize(STEPS[function](dequantize_codes(codes, grid), parameters), out)


_NO_VOLUMES = "ExecuTorch has no convolution of three dimensions, neither the delegate nor its own kernels"

ARITHMETIC = Arithmetic(
    name="xnnpack",
    quantize=quantize,
    requantize=requantize,
    add=add,
    sub=sub,
    mul=mul,
    global_average=global_average,
    rescale=rescale,
    table=table,
    limits={"requantize": Limit("s_in·s_w / s_out", 0.0, 256.0)},
    inexact={
        "conv3d": _NO_VOLUMES,
        "conv_transpose3d": _NO_VOLUMES,
        "conv_transpose_grouped": "the delegate takes no transposed convolution with groups and a scale per channel",
        "average_pool": "XNNPACK sums a window in float, in its own order: 1,039 of 1,131,648 codes are others than by "
        "PyTorch's float steps",
        "matmul": "ExecuTorch's delegate multiplies two activations in float32, and so does the integer program",
        "gelu_tanh": "XNNPACK takes it for the other GELU; to_executorch writes it out in float operators",
    },
)

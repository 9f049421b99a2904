"""Linear layers with float activations and stored weight codes, and the one that quantizes activations as it runs.

    linear_qcs8w          y = F.linear(x, f32(w) · s_w, bias)                   w int8 (out, in), s_w (out,)
    linear_qcs4w          the same, w packed: uint8 (out, ceil(in / 2))
    linear_q4gsw          the same, s_w (out, in/group_size)
    linear_dq8ca_qcs4w    y = f32(f32(f32(acc) · s_x) · s_w) + bias             acc = Σ (q − z)·w, exact

The first three are, bit by bit, what a dequantize node and `F.linear` compute, which is the form that was trained. The
last has a grid (s_x, z) for each row of x, chosen from the row (`qbench.numerics.dynamic`); each product and the sum
round once, in this order. Dequantize nodes before and behind round elsewhere, so they differ from it in last bits.

Two 4-bit codes lie in a byte, the even column in the lower half, with an offset of 8: see `qbench.numerics.int4`.
Input (…, in) float32, bias (out,) float32 or None, result (…, out) float32.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from qbench.errors import NumericsError
from qbench.numerics.dynamic import QMAX, QMIN, choose_row_grids, quantize_rows
from qbench.numerics.int4 import unpack_int4
from qbench.numerics.qparams import along_axis
from qbench.ops.exact import FLOAT32_INTEGERS, float32_is_summed
from qbench.ops.library import define


def linear_qcs8w(input: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor | None) -> Tensor:
    """8-bit codes, a scale per output channel.

    Raises:
        NumericsError: dtypes or shapes that do not fit.
    """
    _check_eight_bits(input, weight, weight_scales, bias)
    return _float_linear(input, weight, weight_scales, bias)


def linear_qcs4w(input: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor | None) -> Tensor:
    """4-bit codes, a scale per output channel.

    Raises:
        NumericsError: dtypes or shapes that do not fit.
    """
    _check_four_bits(input, weight, weight_scales, bias)
    return _float_linear(input, unpack_int4(weight, input.shape[-1]), weight_scales, bias)


def linear_q4gsw(input: Tensor, weight: Tensor, weight_scales: Tensor, group_size: int, bias: Tensor | None) -> Tensor:
    """4-bit codes, a scale for every `group_size` input features of an output channel.

    Raises:
        NumericsError: dtypes or shapes that do not fit.
    """
    _check_groups(input, weight, weight_scales, group_size, bias)
    return _float_linear(input, unpack_int4(weight, input.shape[-1]), weight_scales, bias, group_size)


def linear_dq8ca_qcs4w(input: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor | None) -> Tensor:
    """4-bit codes, a scale per output channel; each row of the input on an int8 grid of its own.

    Raises:
        NumericsError: dtypes or shapes that do not fit.
    """
    _check_four_bits(input, weight, weight_scales, bias)
    if input.numel() == 0:
        return input.new_zeros([*input.shape[:-1], weight.shape[0]])
    codes = unpack_int4(weight, input.shape[-1])
    grids = choose_row_grids(input)
    dtype = _summing_dtype(codes)
    difference = quantize_rows(input, grids).to(dtype) - torch.nan_to_num(grids.zero_point).to(dtype)
    acc = F.linear(difference, codes.to(dtype))
    y = acc.to(torch.float32) * grids.scale * weight_scales
    return y if bias is None else y + bias


def _float_linear(
    input: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, group_size: int | None = None
) -> Tensor:
    return F.linear(input, codes.float() * along_axis(scales, 0, 2, group_size), bias).contiguous()


def _summing_dtype(codes: Tensor) -> torch.dtype:
    """float32 where every partial sum is an integer that it holds, `Σ|w| · max|q − z| ≤ 2²⁴`, else float64."""
    largest = int(codes.long().abs().sum(1).max()) * (QMAX - QMIN) if codes.numel() else 0
    fits = largest <= FLOAT32_INTEGERS and float32_is_summed(codes.device, "matmul")
    return torch.float32 if fits else torch.float64


def _check_eight_bits(input: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """Checks, and an empty result: the fake kernel."""
    if weight.dtype != torch.int8:
        raise NumericsError(f"weight has dtype {weight.dtype}; expected int8 codes with zero point 0")
    return _checked(input, weight, int(weight.shape[-1]), scales, (int(weight.shape[0]),), bias)


def _check_four_bits(input: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """Checks, and an empty result: the fake kernel."""
    _check_packed(input, weight)
    return _checked(input, weight, int(input.shape[-1]), scales, (int(weight.shape[0]),), bias)


def _check_groups(input: Tensor, weight: Tensor, scales: Tensor, group_size: int, bias: Tensor | None) -> Tensor:
    """Checks, and an empty result: the fake kernel."""
    _check_packed(input, weight)
    columns = int(input.shape[-1])
    if group_size < 2 or columns % group_size:
        raise NumericsError(
            f"group_size is {group_size}; expected a divisor, 2 or more, of the {columns} input features"
        )
    return _checked(input, weight, columns, scales, (int(weight.shape[0]), columns // group_size), bias)


def _check_packed(input: Tensor, weight: Tensor) -> None:
    columns = int(input.shape[-1]) if input.ndim else 0
    if weight.dtype != torch.uint8 or weight.ndim != 2 or weight.shape[1] != (columns + 1) // 2:
        raise NumericsError(
            f"weight is {weight.dtype} of shape {list(weight.shape)}; for {columns} input features expected uint8 of "
            f"shape (out, {(columns + 1) // 2}), two codes a byte: qbench.numerics.int4.pack_int4(codes)"
        )


def _checked(
    input: Tensor, weight: Tensor, columns: int, scales: Tensor, scales_shape: tuple[int, ...], bias: Tensor | None
) -> Tensor:
    if input.dtype != torch.float32 or input.ndim == 0 or weight.ndim != 2 or input.shape[-1] != columns:
        raise NumericsError(
            f"input is {input.dtype} of shape {list(input.shape)}, weight has shape {list(weight.shape)}; expected "
            "float32 (…, in) and rows of in codes"
        )
    if scales.dtype != torch.float32 or tuple(scales.shape) != scales_shape:
        raise NumericsError(
            f"weight_scales is {scales.dtype} of shape {tuple(scales.shape)}; expected float32 of shape {scales_shape}"
        )
    if bias is not None and (bias.dtype != torch.float32 or tuple(bias.shape) != (weight.shape[0],)):
        raise NumericsError(
            f"bias is {bias.dtype} of shape {tuple(bias.shape)}; expected float32 of shape ({weight.shape[0]},)"
        )
    return input.new_empty([*input.shape[:-1], weight.shape[0]])


_REST = "Tensor weight_scales, Tensor? bias) -> Tensor"

define(f"linear_qcs8w(Tensor input, Tensor weight, {_REST}", linear_qcs8w, _check_eight_bits)
define(f"linear_qcs4w(Tensor input, Tensor weight, {_REST}", linear_qcs4w, _check_four_bits)
define(
    "linear_q4gsw(Tensor input, Tensor weight, Tensor weight_scales, int group_size, Tensor? bias) -> Tensor",
    linear_q4gsw,
    _check_groups,
)
define(f"linear_dq8ca_qcs4w(Tensor input, Tensor weight, {_REST}", linear_dq8ca_qcs4w, _check_four_bits)

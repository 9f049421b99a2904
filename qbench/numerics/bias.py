"""The bias that integer hardware adds: int32 codes at the scale of its accumulator.

    s_b = f32(s_in · s_w)                       zero point 0
    q_b = rne(f64(b) / f64(s_b)), saturated to the bias width
    b̂   = f32(q_b · s_b)

A runtime that is given the float bias `b̂` recovers `q_b` by a rounding of its own, in float32. Every rule in use does
so without an error for |q_b| ≤ 2²² and none beyond 2²³, so codes are kept below `code_limit`. For a given bias that
needs a weight scale that is large enough, the floor

    |b| ≤ min(qmax_b, 2²²) · s_in · s_w     ⇒     s_w ≥ |b| / (min(qmax_b, 2²²) · s_in)

A bias of more than 32 bits (64 beside int16 activations) is for hardware that is handed integer codes, so the limit is
that of float64, in which they are computed. Where such a grid is finer than float32, a code is that of the float32
value, so that `b̂` and `q_b` determine each other at any size:

    q_b = rne(f64(b̂) / f64(s_b))       b̂ = f32(f64(q_b) · f64(s_b))

A layer fits its accumulator of width A if |q_b| + Σ|q_w| · max|q_x − z| ≤ 2^(A−1) − 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qbench.numerics.qparams import SMALLEST_SCALE, next_power_of_two

# Beyond this a float32 rounding rule may not return the code that a bias on the grid was made from.
RECOVERABLE_CODE = 2**22

# Codes up to this width are stored in int32, behind a float32 dequantize operator.
WIDEST_STORED_BITS = 32

# Every integer up to here is a float64, with room for one rounding.
LARGEST_WIDE_CODE = 2**52


def code_limit(bits: int) -> int:
    """Largest |q_b| that training hands out: the width's own limit, or what the rules above can recover."""
    return min(2 ** (bits - 1) - 1, RECOVERABLE_CODE if bits <= WIDEST_STORED_BITS else LARGEST_WIDE_CODE)


def bias_scale(input_scale: Tensor, weight_scale: Tensor) -> Tensor:
    """`s_b = f32(s_in · s_w)`; () · (out,) -> (out,)."""
    return input_scale.float() * weight_scale.float()


def own_bias_scale(bias: Tensor, bits: int, *, power_of_two: bool = False) -> Tensor:
    """Scale of a bias that has a grid of its own: max|b| / code_limit, a power of two if asked. Per tensor, shape ().

    A bias of zeros gets scale 1.
    """
    largest = bias.detach().abs().amax().float()
    scale = torch.where(largest > 0, largest / code_limit(bits), torch.ones_like(largest)).clamp(min=SMALLEST_SCALE)
    # Rounding the quotient down could push the largest bias over the last code.
    scale = torch.where(scale * code_limit(bits) < largest, torch.nextafter(scale, scale * 2), scale)
    return next_power_of_two(scale) if power_of_two else scale


def round_bias(bias: Tensor, scale: Tensor) -> Tensor:
    """`rne(f64(b) / f64(s_b))`, float64, not yet saturated."""
    return torch.round(bias.double() / scale.double())


def bias_codes(bias: Tensor, scale: Tensor, bits: int = 32, *, symmetric: bool = False) -> tuple[Tensor, Tensor]:
    """Codes of a bias and where they were saturated.

    Args:
        bias: float, (out,).
        scale: float, () or (out,).
        bits: Width of a code, 8 to 64.
        symmetric: Clamp to [−qmax, qmax]: without the lowest code −2^(bits−1).

    Returns:
        codes int64 (out,), and a bool mask (out,) of those that did not fit. NaN counts as not fitting, code 0.
    """
    rounded, codes = _float_codes(bias, scale, bits, symmetric)
    return codes.to(torch.int64), (codes != rounded)


def quantized_bias(bias: Tensor, scale: Tensor, bits: int = 32) -> Tensor:
    """`b̂`, float32, (out,): `dequantize_bias` of `bias_codes`, without the integers between."""
    # −0.0 + 0.0 is +0.0, the value that an integer code dequantizes to.
    return dequantize_bias(_float_codes(bias, scale, bits)[1] + 0.0, scale, bits)


def _float_codes(bias: Tensor, scale: Tensor, bits: int, symmetric: bool = False) -> tuple[Tensor, Tensor]:
    """Codes before and after saturation, float64."""
    # Beyond the limit float64 would round 2^(bits−1) − 1 up to a number that wraps in int64.
    high = min(2 ** (bits - 1) - 1, 2 * LARGEST_WIDE_CODE)
    low = -high if symmetric else -high - 1
    rounded = round_bias(bias, scale)
    if bits > WIDEST_STORED_BITS:
        rounded = round_bias(_wide_value(rounded, scale), scale)
    return rounded, torch.nan_to_num(rounded, nan=0.0).clamp(low, high)


def dequantize_bias(codes: Tensor, scale: Tensor, bits: int = 32) -> Tensor:
    """`b̂`, float32: `f32(f32(q_b) · s_b)`, what a dequantize operator makes of int32 codes; wider ones in float64."""
    return codes.float() * scale if bits <= WIDEST_STORED_BITS else _wide_value(codes, scale)


def _wide_value(codes: Tensor, scale: Tensor) -> Tensor:
    return (codes.double() * scale.double()).float()


def weight_scale_floor(bias: Tensor, input_scale: Tensor, bits: int) -> Tensor:
    """Smallest weight scale per output channel at which the bias code stays within `code_limit(bits)`. float32, (out,).

    Computed in float64 and rounded up, so that the code that results never exceeds the limit by a rounding.
    """
    floor = bias.detach().double().abs() / (code_limit(bits) * input_scale.detach().double())
    return torch.nextafter(floor.float(), torch.full_like(floor, torch.inf, dtype=torch.float32)) * (floor > 0)


def accumulator_bound(weight_codes: Tensor, bias_code: Tensor, largest_input: int | Tensor, axis: int = 0) -> Tensor:
    """Largest |accumulator| that any input can produce: `|q_b| + Σ|q_w| · max|q_x − z|`, int64, one per output channel.

    Args:
        weight_codes: Integer codes, (out, in/groups, …), or (in, out/groups, …) with axis=1 and groups=1.
        bias_code: int64 codes, (out,).
        largest_input: max|q_x − z| over the input's codes.
        axis: Axis of the output channels.
    """
    others = [dim for dim in range(weight_codes.ndim) if dim != axis]
    return bias_code.abs() + weight_codes.long().abs().sum(others) * largest_input


def fits_accumulator(bound: Tensor, bits: int = 32) -> Tensor:
    """Bool mask (out,) of the channels whose bound stays inside a signed accumulator of `bits`."""
    return bound <= 2 ** (bits - 1) - 1

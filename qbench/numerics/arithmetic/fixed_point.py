"""Fixed-point arithmetic for hardware without a float unit: TOSA's operators, as ExecuTorch puts them together.

    m · 2^e = ratio in float64       multiplier = round(m · 2^31)       shift = 31 − e        2 <= shift <= 62
    RESCALE(v; ratio)        (v · multiplier + 2^(shift − 1)) >> shift

    requantize     RESCALE(acc; (s_in · s_w) / s_out) + z_out
    rescale        RESCALE(c − z; s / s_out) + z_out
    add, sub       t = 2 · max(s_a, s_b) / 2^20
                   RESCALE(RESCALE(a − z_a; s_a / t) ± RESCALE(b − z_b; s_b / t); t / s_out) + z_out
    mul            RESCALE((a − z_a) · (b − z_b); (s_a · s_b) / s_out) + z_out
    average        2^(k − 1) < n <= 2^k        m = ((2^30 + 1) << k) // n
                   ((Σ(c − z') · m + 2^(29 + k)) >> (30 + k)) + z', and then `rescale` where the grids differ
                   z' = clamp(rne(z · f32(1/s)) + z)
    table          quantize(f(dequantize(c)));  relu6 is `rescale`, and then a clamp at the codes of 0 and 6

Every ratio is computed in float64 from scales that are float32 values: a product s_in · s_w that was rounded to float32
gives other multipliers. Every result saturates. TOSA defines RESCALE for |v| < 2^(shift − 1) only.

ExecuTorch 1.5.1 quantizes the zero point that it hands to AVG_POOL2D as if it were a real number. At both ends it is
the same number, so only means half way between two codes show it (m is a little too large: they round away from z').

AVG_POOL2D, CONCAT and CLAMP do not rescale, so a program needs one scale at both ends of them, and a q after a dq where
the scales differ: that is what the functions here compute.

Sources: TOSA specification 1.0, chapters "Precision scaling" (apply_scale_32, reciprocal_scale) and AVG_POOL2D;
ExecuTorch 1.5.1, backends/arm: operators/op_tosa_rescale.py, _passes/insert_rescales_pass.py, rewrite_conv_pass.py,
insert_table_ops.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from qbench.errors import NumericsError
from qbench.numerics.arithmetic.base import Arithmetic, Grid, Window, dequantize_codes, saturate
from qbench.numerics.arithmetic.functions import FUNCTIONS
from qbench.numerics.arithmetic.xnnpack import quantize

# Room that add and sub give their inputs: 2^20 steps for twice the larger scale.
_ADD_BITS = 20


def multiplier_and_shift(ratio: Tensor) -> tuple[Tensor, Tensor]:
    """A positive float64 ratio as int64 `multiplier` (31 bits) and `shift`: ratio ≈ multiplier · 2^−shift.

    Raises:
        NumericsError: a ratio of 2^29 or more, which no shift expresses.
    """
    mantissa, exponent = torch.frexp(ratio.to(torch.float64))
    multiplier = torch.round(mantissa * 2.0**31).to(torch.int64)
    shift = 31 - exponent.to(torch.int64)
    doubled = multiplier == 2**31
    multiplier, shift = torch.where(doubled, multiplier // 2, multiplier), torch.where(doubled, shift - 1, shift)
    if bool((shift < 2).any()):
        raise NumericsError(
            f"a ratio of scales is {float(ratio.max()):g}; TOSA's RESCALE takes ratios below 2**29: calibrate the "
            "output's quantizer again"
        )
    lost = (shift - 62).clamp(0, 31)
    return multiplier >> lost, shift.clamp(max=62)


def apply_scale(value: Tensor, multiplier: Tensor, shift: Tensor) -> Tensor:
    """`apply_scale_32` with single rounding: integers within int32 -> int64, a half rounded up."""
    half = torch.ones_like(shift) << (shift - 1)
    return (value.to(torch.int64) * multiplier + half) >> shift


def _scaled(value: Tensor, ratio: Tensor | float) -> Tensor:
    """RESCALE between zero points of 0: `value` in integers times `ratio`, int64."""
    ratios = torch.as_tensor(ratio, dtype=torch.float64, device=value.device)
    return apply_scale(value, *multiplier_and_shift(ratios))


def _centred(codes: Tensor, grid: Grid) -> Tensor:
    return codes.to(torch.int64) - grid.zero_point


def requantize(acc: Tensor, scale: Tensor, out: Grid) -> Tensor:
    """RESCALE from int32, one multiplier a channel. `scale` is the product s_in · s_w in float64, not rounded."""
    return saturate(_scaled(acc, scale.to(torch.float64) / out.scale) + out.zero_point, out)


def rescale(codes: Tensor, grid: Grid, out: Grid) -> Tensor:
    """RESCALE from codes to codes."""
    return saturate(_scaled(_centred(codes, grid), grid.scale / out.scale) + out.zero_point, out)


def add(a: Tensor, a_grid: Grid, b: Tensor, b_grid: Grid, out: Grid) -> Tensor:
    """ADD in int32, both sides rescaled to 2^19 steps for the larger scale."""
    left, right, common = _on_one_scale(a, a_grid, b, b_grid)
    return saturate(_scaled(left + right, common / out.scale) + out.zero_point, out)


def sub(a: Tensor, a_grid: Grid, b: Tensor, b_grid: Grid, out: Grid) -> Tensor:
    """SUB in int32, both sides rescaled as for `add`."""
    left, right, common = _on_one_scale(a, a_grid, b, b_grid)
    return saturate(_scaled(left - right, common / out.scale) + out.zero_point, out)


def _on_one_scale(a: Tensor, a_grid: Grid, b: Tensor, b_grid: Grid) -> tuple[Tensor, Tensor, float]:
    common = 2 * max(a_grid.scale, b_grid.scale) / 2**_ADD_BITS
    left = _scaled(_centred(a, a_grid), a_grid.scale / common)
    return left, _scaled(_centred(b, b_grid), b_grid.scale / common), common


def mul(a: Tensor, a_grid: Grid, b: Tensor, b_grid: Grid, out: Grid) -> Tensor:
    """MUL in int32."""
    products = _centred(a, a_grid) * _centred(b, b_grid)
    return saturate(_scaled(products, (a_grid.scale * b_grid.scale) / out.scale) + out.zero_point, out)


def global_average(sums: Tensor, count: int, grid: Grid, out: Grid) -> Tensor:
    """AVG_POOL2D with one window over everything."""
    return _mean(sums, torch.tensor(count, device=sums.device), grid, out)


def average_pool(codes: Tensor, grid: Grid, out: Grid, window: Window) -> Tensor:
    """AVG_POOL2D over (batch, channels, height, width); padding that counts is put in before it, as codes of 0.

    Raises:
        NumericsError: a divisor other than the number of values.
    """
    if window.divisor is not None:
        raise NumericsError(
            f"AVG_POOL2D divides by the number of values in a window, never by divisor_override={window.divisor}: use "
            "torch.nn.AvgPool2d without it"
        )
    sums = F.avg_pool2d(
        _centred(codes, grid).to(torch.float64),
        window.kernel,
        window.stride,
        window.padding,
        window.ceil_mode,
        divisor_override=1,
    )
    rows, columns = (_counts(codes.shape[axis - 2], sums.shape[axis - 2], window, axis) for axis in (0, 1))
    counts = (rows[:, None] * columns[None, :]).to(codes.device)  # (height, 1) · (1, width) -> (height, width)
    return _mean(sums, counts, grid, out)


def _counts(size: int, outputs: int, window: Window, axis: int) -> Tensor:
    """How many values of one axis each window divides by, (outputs,): PyTorch's rule, which the lowering keeps."""
    kernel, stride, pad = window.kernel[axis], window.stride[axis], window.padding[axis]
    first = torch.arange(outputs) * stride - pad
    last = (first + kernel).clamp(max=size + pad)
    return last - first if window.count_include_pad else last.clamp(max=size) - first.clamp(min=0)


def _mean(sums: Tensor, count: Tensor, grid: Grid, out: Grid) -> Tensor:
    """Sums of (c − z) over `count` values -> codes of their mean on `out`."""
    zero = int(quantize(torch.tensor(float(grid.zero_point)), grid))
    # The exponent of a float: 2^(bits − 1) <= count − 1 < 2^bits.
    bits = torch.frexp((count - 1).to(torch.float64))[1].to(torch.int64)
    shifted = sums.to(torch.int64) + count * (grid.zero_point - zero)
    mean = saturate(apply_scale(shifted, ((2**30 + 1) << bits) // count, 30 + bits) + zero, grid)
    return mean if (grid.scale, grid.zero_point) == (out.scale, out.zero_point) else rescale(mean, grid, out)


def table(function: str, parameters: Sequence[float], grid: Grid, out: Grid) -> Tensor:
    """A TABLE, filled in float32 by PyTorch; for relu6 a RESCALE and a CLAMP."""
    info = torch.iinfo(grid.dtype)
    codes = torch.arange(info.min, info.max + 1).to(grid.dtype)
    if function == "relu6":
        low, high = quantize(torch.tensor([0.0, 6.0]), out).tolist()
        return rescale(codes, grid, out).clamp(low, high)
    inside = codes.clamp(grid.qmin, grid.qmax)
    return quantize(FUNCTIONS[function].compute(dequantize_codes(inside, grid), parameters), out)


ARITHMETIC = Arithmetic(
    name="tosa",
    quantize=quantize,
    requantize=requantize,
    add=add,
    sub=sub,
    mul=mul,
    global_average=global_average,
    average_pool=average_pool,
    rescale=rescale,
    table=table,
)

"""ONNX Runtime's arithmetic on x64 CPUs, as its kernels for uint8 codes compute what `export.to_onnx` writes.

    f32(…)           a float32 operation, rounded            rne        round half to even
    quantize         rne(f32(x / s)) + z, saturated; NaN becomes the lowest code
    requantize       rne(f32(f32(acc) · M)) + z_o            M = f32(s_b / s_o)              QLinearConv, QGemm
    add              rne(fma(a, r_a, fma(b, r_b, t)))        r_a = f32(s_a / s_o), r_b alike,
                     t = f32(z_o − fma(r_a, z_a, f32(r_b · z_b)))                            QLinearAdd
    sub              rne(f32(f32(x_a − x_b) / s_o)) + z_o                                    Sub, in float
    mul              rne(f32(f32((a − z_a)(b − z_b) · r) + z_o))      r = f32(f32(s_a · s_b) / s_o)   QLinearMul
    global_average   rne(f32(f32(Σ(c − z)) · f32(s / f32(s_o · count)))) + z_o               QLinearGlobalAveragePool
    average_pool     rne(f32(f32(f32(Σ x / count) / s_o) + z_o)), the sum in order, row by row       QLinearAveragePool
    rescale          rne(f32(x / s_o)) + z_o                                                 QLinearConcat
    table            rne(f32(function(x) / s_o)) + z_o       function: see `mlas_functions`

`x = f32((c − z) · s)`. Where the zero point is inside a rounding (`add`, `mul`, `average_pool`), it is the one that the
file stores: codes and zero points are those of uint8, int8 + 128.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from qbench.errors import NumericsError
from qbench.numerics.arithmetic.base import Arithmetic, Grid, Limit, Window, dequantize_codes, saturate
from qbench.numerics.arithmetic.float_steps import fma
from qbench.numerics.arithmetic.mlas_functions import STEPS


def quantize(x: Tensor, out: Grid) -> Tensor:
    """QuantizeLinear of a float32 tensor of any shape."""
    # A tensor, not a number: dividing by a number multiplies by its reciprocal on some devices.
    infinity = float("inf")
    return _to_codes((x.to(torch.float32) / _tensor(out.scale, x)).nan_to_num_(-infinity, infinity, -infinity), out)


def _to_codes(steps: Tensor, out: Grid) -> Tensor:
    """`rne(steps) + z`, saturated; `steps` is float32, holds no NaN and is overwritten."""
    return steps.round_().add_(out.zero_point).clamp_(out.qmin, out.qmax).to(out.dtype)


def requantize(acc: Tensor, scale: Tensor, out: Grid) -> Tensor:
    """The output of QLinearConv and QGemm."""
    rounded = scale.to(torch.float32)
    multiplier = rounded / _tensor(out.scale, rounded)
    return _to_codes(acc.to(torch.float32).mul_(multiplier), out)


def add(a: Tensor, a_grid: Grid, b: Tensor, b_grid: Grid, out: Grid) -> Tensor:
    """QLinearAdd; there are 65,536 pairs of codes, so the steps are taken once for each and kept."""
    # A run of codes added to one number is computed with that number as b, whichever operand it was.
    if _repeats(a.shape, b.shape):
        return add(b, b_grid, a, a_grid, out)
    table = _sums(a_grid, b_grid, out).to(a.device)
    low_a, low_b = torch.iinfo(a_grid.dtype).min, torch.iinfo(b_grid.dtype).min
    index = torch.add(b.to(torch.int32), a.to(torch.int32), alpha=256).sub_(256 * low_a + low_b).contiguous()
    return table.index_select(0, index.view(-1)).view(index.shape)


def _repeats(a: torch.Size, b: torch.Size) -> bool:
    """Whether one code of `a` meets a run of codes of `b`: in the last dim in which not both are 1."""
    width = max(len(a), len(b))
    sizes = zip((1,) * (width - len(a)) + tuple(a), (1,) * (width - len(b)) + tuple(b), strict=True)
    varying = [(one, other) for one, other in sizes if (one, other) != (1, 1)]
    return bool(varying) and varying[-1][0] == 1


@functools.lru_cache(maxsize=256)
def _sums(a_grid: Grid, b_grid: Grid, out: Grid) -> Tensor:
    """Codes of every sum: index 256 · (a − lowest a) + b − lowest b, (65536,)."""
    with torch.inference_mode(False):
        ours, theirs, result = (grid.stored_as(torch.uint8) for grid in (a_grid, b_grid, out))
        a, b = torch.arange(256.0)[:, None], torch.arange(256.0)[None, :]
        step = torch.tensor(out.scale)
        ratio_a, ratio_b = torch.tensor(ours.scale) / step, torch.tensor(theirs.scale) / step
        shift = result.zero_point - fma(ratio_a, float(ours.zero_point), ratio_b * theirs.zero_point)
        sums = torch.round(fma(a, ratio_a, fma(b, ratio_b, shift)))
        # Back to the codes of the program: the file's are higher by the difference of the zero points.
        return saturate(sums - (result.zero_point - out.zero_point), out).reshape(-1)


def sub(a: Tensor, a_grid: Grid, b: Tensor, b_grid: Grid, out: Grid) -> Tensor:
    """Sub has no integer kernel: it runs in float, between dequantize and quantize."""
    return _to_codes((dequantize_codes(a, a_grid) - dequantize_codes(b, b_grid)).div_(_tensor(out.scale, a)), out)


def mul(a: Tensor, a_grid: Grid, b: Tensor, b_grid: Grid, out: Grid) -> Tensor:
    """QLinearMul; shapes broadcast."""
    scale_a, scale_b, step = (_tensor(grid.scale, a) for grid in (a_grid, b_grid, out))
    ratio = scale_a * scale_b / step
    stored = out.stored_as(torch.uint8)
    # At most 255², so the product of two floats is exact.
    product = a.to(torch.float32).sub_(a_grid.zero_point) * b.to(torch.float32).sub_(b_grid.zero_point)
    codes = product.mul_(ratio).add_(stored.zero_point).round_()
    return codes.sub_(stored.zero_point - out.zero_point).clamp_(out.qmin, out.qmax).to(out.dtype)


# What QLinearGlobalAveragePool checks while it runs.
_AVERAGES = Limit("s / (s_out · count)", 2.0**-32, 256.0)


def global_average(sums: Tensor, count: int, grid: Grid, out: Grid) -> Tensor:
    """QLinearGlobalAveragePool.

    Raises:
        NumericsError: a scale ratio that the kernel refuses while it runs.
    """
    step = _tensor(out.scale, sums) * _tensor(float(count), sums)
    ratio = _tensor(grid.scale, sums) / step
    if not _AVERAGES.low <= float(ratio) < _AVERAGES.high:
        raise NumericsError(
            f"a mean of {count} codes of scale {grid.scale} on an output scale of {out.scale} has the ratio "
            f"{float(ratio):g}; ONNX Runtime averages from 2**-32 to below 256: calibrate the output's quantizer again"
        )
    return _to_codes(sums.to(torch.float32) * ratio, out)


def average_pool(codes: Tensor, grid: Grid, out: Grid, window: Window) -> Tensor:
    """QLinearAveragePool over (batch, channels, height, width).

    With `ceil_mode` and `count_include_pad` the divisor is the whole kernel, also where a window ends beyond the
    padding (PyTorch counts only up to there).
    """
    sizes = (codes.shape[-2], codes.shape[-1])
    if window.kernel == sizes and window.padding == (0, 0) and window.divisor in (None, sizes[0] * sizes[1]):
        # ONNX Runtime takes its integer kernel for one window over everything.
        sums = (codes.to(torch.int32) - grid.zero_point).sum(dim=(-2, -1), keepdim=True)
        return global_average(sums, sizes[0] * sizes[1], grid, out)
    x = dequantize_codes(codes, grid)
    sums, counts = _window_sums(x, window), _window_counts(x, window)
    stored = out.stored_as(torch.uint8)
    steps = (sums / counts / _tensor(out.scale, x)).add_(stored.zero_point).round_()
    return saturate(steps.sub_(stored.zero_point - out.zero_point), out)


def _window_sums(x: Tensor, window: Window) -> Tensor:
    """Sums over windows, one position of the kernel after the other, row by row: (…, height, width) of the output."""
    room, step = [], window.stride
    for axis in (0, 1):
        outputs = _outputs(x.shape[axis - 2], axis, window)
        room.append(((outputs - 1) * step[axis] + window.kernel[axis], outputs))
    (high, rows), (wide, columns) = room
    top, left = window.padding
    padded = F.pad(x, (left, max(0, wide - left - x.shape[-1]), top, max(0, high - top - x.shape[-2])))
    sums = padded.new_zeros(*x.shape[:-2], rows, columns)
    for row in range(window.kernel[0]):
        for column in range(window.kernel[1]):
            sums += padded[
                ...,
                row : row + (rows - 1) * step[0] + 1 : step[0],
                column : column + (columns - 1) * step[1] + 1 : step[1],
            ]
    return sums


def _outputs(size: int, axis: int, window: Window) -> int:
    """How many windows there are; with `ceil_mode` none starts in the padding behind the input."""
    kernel, stride, pad = window.kernel[axis], window.stride[axis], window.padding[axis]
    room = size + 2 * pad - kernel
    count = (room + (stride - 1 if window.ceil_mode else 0)) // stride + 1
    return count - 1 if window.ceil_mode and (count - 1) * stride >= size + pad else count


def _window_counts(x: Tensor, window: Window) -> Tensor:
    """What each sum is divided by: () or (height, width), float32."""
    if window.divisor is not None or window.count_include_pad:
        return _tensor(float(window.divisor or window.kernel[0] * window.kernel[1]), x)
    return _window_sums(torch.ones_like(x[(0,) * (x.ndim - 2)]), window)


def rescale(codes: Tensor, grid: Grid, out: Grid) -> Tensor:
    """A part of a QLinearConcat, or QuantizeLinear behind DequantizeLinear."""
    return _to_codes(dequantize_codes(codes, grid) / _tensor(out.scale, codes), out)


def table(function: str, parameters: Sequence[float], grid: Grid, out: Grid) -> Tensor:
    """The 256 codes of a function, by input code − lowest code: (256,).

    ReLU6 is what `to_onnx` writes for it: a clip of codes behind QuantizeLinear, between the codes of 0 and 6 by the
    program's own quantize op, which multiplies by 1/s.
    """
    info = torch.iinfo(grid.dtype)
    x = dequantize_codes(torch.arange(info.min, info.max + 1, dtype=torch.int32), grid)
    if function != "relu6":
        return quantize(STEPS[function](x, parameters), out)
    six = int(torch.round(torch.tensor(6.0) * torch.tensor(1.0 / out.scale))) + out.zero_point
    return quantize(x, out).clamp(max(out.zero_point, out.qmin), min(max(six, out.qmin), out.qmax))


def _tensor(value: float, like: Tensor) -> Tensor:
    """A float32 number as the kernels hold it, ()."""
    return torch.tensor(value, dtype=torch.float32, device=like.device)


_NO_KERNEL = (
    "ConvTranspose has no integer kernel in ONNX Runtime: it sums in float, in an order of its own. Of codes by exact "
    "sums, 4 of 1,006,976 differ on ordinary grids and 1.3 % where results lie half way between two codes"
)

ARITHMETIC = Arithmetic(
    name="onnxruntime",
    quantize=quantize,
    requantize=requantize,
    add=add,
    sub=sub,
    mul=mul,
    global_average=global_average,
    average_pool=average_pool,
    rescale=rescale,
    table=table,
    limits={"global_average": _AVERAGES},
    inexact={"conv_transpose": _NO_KERNEL},
)

"""Convolutions on codes, in one to three dimensions, forward and transposed.

    acc = Σ (x − z)·w + bias                        exact (see `qbench.ops.exact`)
    y   = requantize(acc, f32(s_in · s_w))          the target's

Shapes: input (batch, in, …) or (in, …); weight (out, in / groups, …), transposed (in, out / groups, …); weight_scales
(out,) or (); bias (out,). Padding pads with real 0, whose code is z.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from qbench.numerics.arithmetic import Grid
from qbench.ops import exact
from qbench.ops.arguments import channel_scale, check_weight, empty_like_format, input_grid, operation, output_grid
from qbench.ops.geometry import Geometry, numbers
from qbench.ops.library import OUT, define

_LAYER = "Tensor input, float input_scale, int input_zero_point, Tensor weight, Tensor weight_scales, Tensor? bias"
_FORWARD = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def convolve(
    input: Tensor,
    input_scale: float,
    input_zero_point: int,
    weight: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    *out: Any,
) -> Tensor:
    """Codes of a convolution; arguments as in the schemas, `out` the last six.

    Raises:
        NumericsError: dtypes or shapes that do not fit.
        ConfigError: the target has no arithmetic.
    """
    grid, codes = _checked(input, input_scale, input_zero_point, weight, weight_scales, bias, geometry, *out)
    requantize = operation(out[-1], "requantize")
    if codes.numel() == 0:
        return codes
    batched = input if input.ndim == weight.ndim else input.unsqueeze(0)
    acc = _exact_sum(batched, grid, weight, bias, geometry)
    scale = channel_scale(input_scale, weight_scales, geometry.dims)
    return codes.copy_(requantize(acc, scale, output_grid(*out)).reshape(codes.shape))


def fake_convolve(
    input: Tensor,
    input_scale: float,
    input_zero_point: int,
    weight: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    *out: Any,
) -> Tensor:
    """Shape and dtype of `convolve`."""
    return _checked(input, input_scale, input_zero_point, weight, weight_scales, bias, geometry, *out)[1]


def _checked(
    input: Tensor,
    input_scale: float,
    input_zero_point: int,
    weight: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    *out: Any,
) -> tuple[Grid, Tensor]:
    """The input's grid and an empty result."""
    grid = input_grid("input", input, input_scale, input_zero_point)
    shape = geometry.shape(input, weight)
    check_weight(weight, weight_scales, bias, geometry.outputs(weight))
    return grid, empty_like_format(shape, output_grid(*out).dtype, input)


def _exact_sum(x: Tensor, grid: Grid, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """`acc` (batch, out, …) in float32 or float64, exact."""
    layer = exact.plan(weight, rows(weight, geometry), bias, grid, float32=False)
    differences = exact.differences(x, grid, layer.weight.dtype)
    sizes = geometry.stride, geometry.padding
    if geometry.transposed:
        call = _TRANSPOSED[geometry.dims]
        return call(
            differences, layer.weight, layer.bias, *sizes, geometry.output_padding, geometry.groups, geometry.dilation
        )
    return _FORWARD[geometry.dims](differences, layer.weight, layer.bias, *sizes, geometry.dilation, geometry.groups)


def rows(weight: Tensor, geometry: Geometry) -> Tensor:
    """Weight codes by output channel: (out, products of one output).

    A transposed weight (in, out / groups, …) -> (groups, in / groups, out / groups, …) -> (out, in / groups · …).
    """
    if not geometry.transposed:
        return weight.flatten(1)
    grouped = weight.unflatten(0, (geometry.groups, -1)).transpose(1, 2)
    return grouped.flatten(0, 1).flatten(1)


def _define_forward(dims: int) -> None:
    def geometry(stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int) -> Geometry:
        return Geometry(
            numbers("stride", stride, dims, 1),
            numbers("padding", padding, dims, 0),
            numbers("dilation", dilation, dims, 1),
            groups,
        )

    define(
        f"conv{dims}d_q8ta_q8csw_q8to({_LAYER}, int[] stride, int[] padding, int[] dilation, int groups, {OUT}",
        lambda *given: convolve(*given[:6], geometry(*given[6:10]), *given[10:]),
        lambda *given: fake_convolve(*given[:6], geometry(*given[6:10]), *given[10:]),
    )


def _define_transposed(dims: int) -> None:
    def geometry(
        stride: Sequence[int],
        padding: Sequence[int],
        output_padding: Sequence[int],
        groups: int,
        dilation: Sequence[int],
    ) -> Geometry:
        return Geometry(
            numbers("stride", stride, dims, 1),
            numbers("padding", padding, dims, 0),
            numbers("dilation", dilation, dims, 1),
            groups,
            True,
            numbers("output_padding", output_padding, dims, 0),
        )

    define(
        f"conv_transpose{dims}d_q8ta_q8csw_q8to({_LAYER}, int[] stride, int[] padding, int[] output_padding, "
        f"int groups, int[] dilation, {OUT}",
        lambda *given: convolve(*given[:6], geometry(*given[6:11]), *given[11:]),
        lambda *given: fake_convolve(*given[:6], geometry(*given[6:11]), *given[11:]),
    )


for _dims in (1, 2, 3):
    _define_forward(_dims)
    _define_transposed(_dims)

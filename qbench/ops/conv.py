"""Convolutions on codes, in one to three dimensions, forward and transposed.

    acc = Σ (x − z)·w + bias                        exact (see `qbench.ops.exact`)
    y   = requantize(acc, f32(s_in · s_w))          the target's

Shapes: input (batch, in, …) or (in, …); weight (out, in / groups, …), transposed (in, out / groups, …); weight_scales
(out,) or (); bias (out,). Padding pads with real 0, whose code is z.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qbench.numerics.arithmetic import Grid
from qbench.ops import exact
from qbench.ops.arguments import (
    channel_scale,
    check_weight,
    empty_like_format,
    input_grid,
    memory_format,
    operation,
    output_grid,
)
from qbench.ops.geometry import Geometry, numbers
from qbench.ops.kernels import gains_by_packing, packed, sum_products
from qbench.ops.library import OUT, define
from qbench.ops.plans import Plan, remembered

_LAYER = "Tensor input, float input_scale, int input_zero_point, Tensor weight, Tensor weight_scales, Tensor? bias"
# Results a block: float sums of a few MiB stay in a cache until they are codes. Batches are summed image by image then.
_BLOCK = 2**20


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
    grid, shape, out_grid = _checked(input, input_scale, input_zero_point, weight, weight_scales, bias, geometry, *out)
    requantize, layout = operation(out[-1], "requantize"), memory_format(input)
    if 0 in shape:
        return empty_like_format(shape, out_grid.dtype, input)
    scale = channel_scale(input_scale, weight_scales, geometry.dims)
    plan = plan_of(weight, bias, grid, geometry)
    batched, geometry = geometry.read(input if input.ndim == weight.ndim else input[None], weight)
    images = max(1, _BLOCK * batched.shape[0] // math.prod(shape))
    blocks = [batched] if images >= batched.shape[0] else batched.split(images)
    codes = [requantize(exact_sum(x, grid, weight, plan, geometry), scale, out_grid) for x in blocks]
    whole = codes[0] if len(codes) == 1 else torch.cat(codes)
    return whole.reshape(shape).contiguous(memory_format=layout)


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
    _, shape, out_grid = _checked(input, input_scale, input_zero_point, weight, weight_scales, bias, geometry, *out)
    return empty_like_format(shape, out_grid.dtype, input)


def _checked(
    input: Tensor,
    input_scale: float,
    input_zero_point: int,
    weight: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    *out: Any,
) -> tuple[Grid, list[Any], Grid]:
    """The input's grid, the shape of the result and its grid."""
    grid = input_grid("input", input, input_scale, input_zero_point)
    shape = geometry.shape(input, weight)
    check_weight(weight, weight_scales, bias, geometry.outputs(weight))
    return grid, shape, output_grid(*out)


def plan_of(weight: Tensor, bias: Tensor | None, grid: Grid, geometry: Geometry) -> Plan:
    """How a layer is summed, remembered."""
    float32 = exact.float32_is_summed(weight.device, "conv")
    return remembered(
        weight,
        bias,
        (grid.zero_point, grid.dtype, geometry, float32),
        lambda: exact.plan(by_channel(weight, geometry), bias, grid, float32=float32),
    )


def by_channel(weight: Tensor, geometry: Geometry) -> Tensor:
    """Weight codes as (out, in, products); with groups, or transposed, as (out, 1, products): not to be split.

    A transposed weight (in, out / groups, …) -> (groups, in / groups, out / groups, …) -> (out, in / groups, …).
    """
    if not geometry.transposed:
        return weight.flatten(2) if geometry.groups == 1 else weight.flatten(1)[:, None]
    grouped = weight.unflatten(0, (geometry.groups, -1)).transpose(1, 2)
    return grouped.flatten(0, 1).flatten(1)[:, None]


def exact_sum(x: Tensor, grid: Grid, weight: Tensor, plan: Plan, geometry: Geometry) -> Tensor:
    """`acc` (batch, out, …) in float32 or float64, exact; a tensor that nobody else holds."""
    parts = plan.parts
    weights = plan.forms.get(key := (x.shape, x.is_contiguous()))
    if weights is None and gains_by_packing(x, weight, parts[0].dtype, geometry):
        weights = plan.packed(weight, key, lambda floats: packed(floats, geometry, x.shape))
    elif weights is None:
        weights = plan.floats(weight)
    return exact.add_parts(
        x, grid, 1, parts, lambda run, index: sum_products(run, weights[index], parts[index].bias, geometry)
    )


def _hashable(sizes: Sequence[Any]) -> list[Any]:
    return [tuple(size) if isinstance(size, (list, tuple)) else size for size in sizes]


def _define_forward(dims: int) -> None:
    @functools.lru_cache
    def geometry(stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int) -> Geometry:
        return Geometry(
            numbers("stride", stride, dims, 1),
            numbers("padding", padding, dims, 0),
            numbers("dilation", dilation, dims, 1),
            groups,
        )

    define(
        f"conv{dims}d_q8ta_q8csw_q8to({_LAYER}, int[] stride, int[] padding, int[] dilation, int groups, {OUT}",
        lambda *given: convolve(*given[:6], geometry(*_hashable(given[6:10])), *given[10:]),
        lambda *given: fake_convolve(*given[:6], geometry(*_hashable(given[6:10])), *given[10:]),
    )


def _define_transposed(dims: int) -> None:
    @functools.lru_cache
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
        lambda *given: convolve(*given[:6], geometry(*_hashable(given[6:11])), *given[11:]),
        lambda *given: fake_convolve(*given[:6], geometry(*_hashable(given[6:11])), *given[11:]),
    )


for _dims in (1, 2, 3):
    _define_forward(_dims)
    _define_transposed(_dims)

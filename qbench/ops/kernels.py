"""Convolutions of floats that add plain products, by calls that cannot choose another algorithm.

`torch.nn.functional.conv2d` may take NNPACK for small float32 inputs on CPUs (Winograd and FFT, which add other numbers
than `qbench.ops.exact` bounds), so float32 convolutions call oneDNN's direct convolution by name. Its weights can be
kept in the blocked layout that it computes with, which a call would otherwise make anew.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from qbench.ops.geometry import Geometry

_FORWARD = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def sum_products(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """A convolution of floats.

    Args:
        x: (batch, in, …) float32 or float64.
        weight: Floats, as they are or as `packed` returns them.
        bias: (out,) or None.
        geometry: Of the layer.
    """
    if geometry.transposed:
        return _TRANSPOSED[geometry.dims](
            x,
            weight,
            bias,
            geometry.stride,
            geometry.padding,
            geometry.output_padding,
            geometry.groups,
            geometry.dilation,
        )
    if weight.dtype == torch.float64:
        return _FORWARD[geometry.dims](
            x, weight, bias, geometry.stride, geometry.padding, geometry.dilation, geometry.groups
        )
    if geometry.dims == 1:
        weight = weight[:, :, None] if weight.ndim == 3 else weight
        return _direct(x[:, :, None], weight, bias, _with_height(geometry)).squeeze(2)
    return _direct(x, weight, bias, geometry)


def gains_by_packing(x: Tensor, weight: Tensor, dtype: torch.dtype, geometry: Geometry) -> bool:
    """Whether a float kernel of `dtype` is faster on a `packed` weight for these codes.

    It returns its sums in channels_last then. For a contiguous input they have to be turned back, which costs about as
    much for each result as it saves for each weight; three input channels are computed in half of the time.
    """
    if dtype != torch.float32 or geometry.transposed or geometry.dims > 2 or x.device.type != "cpu":
        return False
    if not hasattr(torch.ops.mkldnn, "_reorder_convolution_weight"):
        return False
    few_channels = geometry.groups == 1 and weight.shape[1] < 8
    turned = x.is_contiguous() and not few_channels
    return not turned or weight.numel() >= math.prod(geometry.shape(x, weight))


def packed(weight: Tensor, geometry: Geometry, shape: Sequence[int]) -> Tensor:
    """A float32 weight in the layout for inputs of this shape (batch, in, …).

    With an input of another shape the sums are the same, but a layout that does not suit it can cost fifteen times as
    much.
    """
    shape = [shape[0], weight.shape[1] * geometry.groups, *shape[2:]]
    if geometry.dims == 1:
        weight, geometry, shape = weight[:, :, None], _with_height(geometry), [*shape[:2], 1, shape[2]]
    sizes = geometry.padding, geometry.stride, geometry.dilation, geometry.groups
    blocked: Tensor = torch.ops.mkldnn._reorder_convolution_weight(weight, *sizes, shape)
    return blocked


def _direct(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """The direct convolution of oneDNN, in two or three dimensions."""
    sizes = geometry.padding, geometry.stride, geometry.dilation, geometry.groups
    if weight.layout == torch._mkldnn:  # type: ignore[attr-defined]
        found: Tensor = torch.ops.mkldnn._convolution_pointwise(x, weight, bias, *sizes, "none", [], "")
        return found
    return torch.mkldnn_convolution(x, weight, bias, *sizes)


def _with_height(geometry: Geometry) -> Geometry:
    """One dimension as the second of two, of which the first has size 1."""
    return Geometry((1, *geometry.stride), (0, *geometry.padding), (1, *geometry.dilation), geometry.groups)

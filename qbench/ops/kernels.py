"""Convolutions of floats that add plain products, by calls that cannot choose another algorithm.

`torch.nn.functional.conv2d` may take NNPACK for small float32 inputs on CPUs (Winograd and FFT, which add other numbers
than `qbench.ops.exact` bounds), so float32 convolutions call oneDNN's direct convolution by name. Its weights can be
kept in the blocked layout that it computes with, which a call would otherwise make anew.
"""

from __future__ import annotations

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
        weight: What `packed` returns.
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
        return _direct(x[:, :, None], weight, bias, _with_height(geometry)).squeeze(2)
    return _direct(x, weight, bias, geometry)


def packed(weight: Tensor, geometry: Geometry) -> Tensor:
    """The weight as `sum_products` takes it: blocked for oneDNN where PyTorch offers that, else as it is."""
    if geometry.transposed or weight.dtype != torch.float32:
        return weight
    if geometry.dims == 1:
        weight, geometry = weight[:, :, None], _with_height(geometry)
    reorder = getattr(torch.ops.mkldnn, "_reorder_convolution_weight", None)
    if geometry.dims != 2 or reorder is None or weight.numel() == 0:
        return weight
    blocked: Tensor = reorder(weight, geometry.padding, geometry.stride, geometry.dilation, geometry.groups, None)
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

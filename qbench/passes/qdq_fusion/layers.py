"""Convolutions and linear layers.

    dq(x), dq(w), dq(b; s_in·s_w)  ->  layer  ->  [clamps]  ->  q          becomes      layer_q8ta_q8csw_q8to(x, w, b)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from qbench.graph.dialect import has_argument, node_argument, overload
from qbench.graph.edit import insert_call, shape_of
from qbench.graph.layers import Layer, output_scales, read_layer, weight_scales
from qbench.graph.recognise import Dequantize, cast_source, is_dequantize, read_dequantize
from qbench.graph.rules import Refused, Rule
from qbench.graph.scale_preserving import grid_source
from qbench.numerics.bias import bias_scale
from qbench.numerics.qparams import QParams
from qbench.passes.qdq_fusion.context import Codes, FusionContext, Result, describe

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True, eq=False)
class FusedLayer:
    """What the rewrite needs: `scales` are per output channel, (out,) or (); `views` lead from codes to the weight."""

    layer: Layer
    input: Codes
    weight: Dequantize
    views: tuple[fx.Node, ...]
    scales: Tensor
    bias: fx.Node | None
    results: list[Result]
    operator: Any
    geometry: tuple[Any, ...]


class LayerRule(Rule[FusionContext, FusedLayer]):
    """What convolutions and linear layers have in common."""

    def match(self, node: fx.Node, context: FusionContext) -> FusedLayer | None:
        """See `Rule.match`."""
        layer = read_layer(node, context.constants)
        if layer is None:
            return None
        weight, views = _stored_weight(layer.weight, context)
        shape = _weight_shape(layer, weight, context)
        operator, geometry = self.operation(layer, shape)
        context.function("requantize", *_kinds(layer, shape))
        scales = _scales(layer, context)
        input = context.codes(layer.input)
        results = context.results(node)
        for result in results:
            context.check_ratio("requantize", input.grid.scale * float(scales.max()) / result.grid.scale)
        bias = _bias_codes(layer, input, scales, context)
        return FusedLayer(layer, input, weight, views, scales, bias, results, operator, geometry)

    def operation(self, layer: Layer, shape: Sequence[int]) -> tuple[Any, tuple[Any, ...]]:
        """The fused overload and the arguments between bias and output; `shape` is that of the weight."""
        raise NotImplementedError

    def rewrite(self, found: FusedLayer, context: FusionContext) -> Sequence[fx.Node]:
        """See `Rule.rewrite`."""
        codes = _viewed_codes(found)
        scales = _scales_node(found, context)
        arguments = (*found.input.arguments, codes, scales, found.bias, *found.geometry)
        return [context.emit(result, found.operator, arguments) for result in found.results]


class LinearRule(LayerRule):
    """`linear`, and the products that it is decomposed to."""

    name = "linear"
    anchors = (aten.linear, aten.addmm, aten.mm, aten.matmul, aten.add)

    def operation(self, layer: Layer, shape: Sequence[int]) -> tuple[Any, tuple[Any, ...]]:
        """See `LayerRule.operation`."""
        if overload(layer.node.target) is aten.add.Tensor:
            raise Refused("a product whose bias is added behind views has no integer operator")
        if len(shape) != 2:
            raise Refused(f"its weight has {len(shape)} dims; the integer operator takes (out, in)")
        return torch.ops.qbench.linear_q8ta_q8csw_q8to.default, ()


class ConvolutionRule(LayerRule):
    """Convolutions of one to three dimensions, transposed ones too."""

    name = "convolution"
    anchors = (
        aten.conv1d, aten.conv2d, aten.conv3d, aten.convolution,
        aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d,
    )  # fmt: skip

    def operation(self, layer: Layer, shape: Sequence[int]) -> tuple[Any, tuple[Any, ...]]:
        """See `LayerRule.operation`."""
        node = layer.node
        dims = len(shape) - 2
        input = shape_of(layer.input)
        if input is not None and len(input) != dims + 2:
            raise Refused(f"its input has {len(input)} dims, without a batch; the integer operator takes {dims + 2}")
        stride = _sizes(node_argument(node, "stride"), dims)
        dilation = _sizes(node_argument(node, "dilation"), dims)
        padding = _padding(node_argument(node, "padding"), shape[2:], dilation)
        if not layer.transposed:
            operator = getattr(torch.ops.qbench, f"conv{dims}d_q8ta_q8csw_q8to").default
            return operator, (stride, padding, dilation, layer.groups)
        extra = _sizes(node_argument(node, "output_padding"), dims)
        operator = getattr(torch.ops.qbench, f"conv_transpose{dims}d_q8ta_q8csw_q8to").default
        return operator, (stride, padding, extra, layer.groups, dilation)


def _kinds(layer: Layer, shape: Sequence[int]) -> tuple[str, ...]:
    """What `Arithmetic.inexact` may call the layer: `conv_transpose`, `conv3d` and the like."""
    if layer.transposed:
        grouped = ("conv_transpose_grouped",) if layer.groups > 1 else ()
        return ("conv_transpose", f"conv_transpose{len(shape) - 2}d", *grouped)
    return (f"conv{len(shape) - 2}d" if len(shape) > 2 else "linear",)


def _sizes(value: Any, dims: int) -> list[int]:
    given = [value] if isinstance(value, int) else list(value)
    return given * dims if len(given) == 1 else given


def _padding(value: Any, kernel: Sequence[int], dilation: list[int]) -> list[int]:
    if value == "valid":
        return [0] * len(kernel)
    if value != "same":
        return _sizes(value, len(kernel))
    total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if any(size % 2 for size in total):
        raise Refused('padding="same" of an even kernel pads one side more; the integer operator pads both alike')
    return [size // 2 for size in total]


def _stored_weight(node: fx.Node, context: FusionContext) -> tuple[Dequantize, tuple[fx.Node, ...]]:
    """The dequantize node of a weight and the views between it and the layer, outermost last."""
    views: list[fx.Node] = []
    while not is_dequantize(node):
        if cast_source(node) is not None:
            raise Refused(f"its weight is cast between float types ({node.name})")
        source = grid_source(node)
        if source is None or overload(node.target) is None:
            raise Refused(f"its weight is not a view of a dequantized one: {describe(node)}")
        views.insert(0, node)
        node = source
    found = read_dequantize(node, context.constants)
    if found is None:
        raise Refused(f"the scale of its weight is not known before the program runs ({node.name})")
    if context.constants.get(found.source) is None:
        raise Refused(
            f"its weight is computed while the program runs ({node.name}); x @ y has an integer operator for products "
            "of two activations, on the targets that have one"
        )
    if found.dtype is not torch.int8:
        raise Refused(f"the codes of its weight are {found.dtype}; the integer operators take int8")
    if bool(found.qparams.zero_point.any()):
        raise Refused("its weight has a zero point that is not 0")
    return found, tuple(views)


def _weight_shape(layer: Layer, weight: Dequantize, context: FusionContext) -> Sequence[int]:
    known = shape_of(layer.weight)
    if known is None:
        stored = context.constants.get(weight.source if layer.weight is weight.node else layer.weight)
        known = None if stored is None else stored.shape
    if known is None:
        raise Refused("its weight is computed while the program runs")
    return known


def _scales(layer: Layer, context: FusionContext) -> Tensor:
    found = weight_scales(layer, context.constants)
    if found is None:
        raise Refused("the scales of its weight are not known before the program runs")
    scales = output_scales(layer, found)
    if scales is None:
        raise Refused("the scales of its weight differ within an output channel: they lie along its input channels")
    return scales


def _bias_codes(layer: Layer, input: Codes, scales: Tensor, context: FusionContext) -> fx.Node | None:
    if layer.bias is None:
        return None
    if not is_dequantize(layer.bias):
        raise Refused(f"its bias is in float: {describe(layer.bias)}; qbench.passes.quantize_bias says why")
    found = read_dequantize(layer.bias, context.constants)
    expected = bias_scale(torch.tensor(input.grid.scale, dtype=torch.float32), scales.cpu())
    if found is None or found.dtype is not torch.int32 or bool(found.qparams.zero_point.any()):
        raise Refused(f"its bias is not int32 codes with zero point 0 ({layer.bias.name})")
    if not _equal_scales(found.qparams, expected):
        raise Refused(f"the scale of its bias is not that of input times weight ({layer.bias.name})")
    return found.source


def _equal_scales(qparams: QParams, expected: Tensor) -> bool:
    given, wanted = torch.broadcast_tensors(qparams.scale.cpu(), expected)
    return torch.equal(given, wanted)


def _viewed_codes(found: FusedLayer) -> fx.Node:
    """The codes of the weight as the operator takes them: the views of the real weight, on its codes."""
    replaced = {found.weight.node: found.weight.source}
    before = found.layer.node
    for view in found.views:
        args, kwargs = fx.map_arg((view.args, view.kwargs), lambda node: replaced.get(node, node))
        replaced[view] = insert_call(before, overload(view.target), args, kwargs)  # type: ignore[arg-type]
    codes = replaced[found.layer.weight]
    # A product holds (in, out), the operator takes (out, in).
    return insert_call(before, aten.t.default, (codes,)) if found.layer.channels_last else codes


def _scales_node(found: FusedLayer, context: FusionContext) -> fx.Node:
    """A node of the scales per output channel: the program's own where they already are that, else a new constant."""
    per_channel = found.weight.qparams.axis == 0 and not found.layer.transposed and not found.views
    if per_channel:
        node = node_argument(found.weight.node, "scales") if has_argument(found.weight.node.target, "scales") else None
        stored = context.constants.get(node) if isinstance(node, fx.Node) else None
        if isinstance(node, fx.Node) and stored is not None and torch.equal(stored, found.scales):
            return node
    return context.constants.add(f"{found.layer.node.name}_weight_scales", found.scales, found.layer.node)

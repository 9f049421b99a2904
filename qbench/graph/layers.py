"""Convolution and linear layers of a graph, in the forms that export, decomposition and lowering give them.

    conv1d … conv3d (.default and .padding), convolution, linear       weight (out, in/groups, …)
    conv_transpose1d … 3d, convolution with transposed=True            weight (in, out/groups, …)
    addmm(bias, x, W), mm(x, W)                                        weight (in, out)
    add(view(bmm(x, W)), bias), also with mm and matmul                weight (…, in, out)

The last is what becomes of a linear layer whose input is not contiguous.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from qbench.graph.constants import Constants
from qbench.graph.dialect import has_argument, node_argument, overload
from qbench.graph.edit import shape_of
from qbench.graph.recognise import cast_source, is_dequantize, read_dequantize
from qbench.graph.scale_preserving import grid_source
from qbench.numerics.qparams import along_axis

aten = torch.ops.aten

_CONVOLUTIONS: tuple[OpOverload[Any, Any], ...] = (
    aten.conv1d.default,
    aten.conv1d.padding,
    aten.conv2d.default,
    aten.conv2d.padding,
    aten.conv3d.default,
    aten.conv3d.padding,
    aten.convolution.default,
    aten.linear.default,
)
_TRANSPOSED: tuple[OpOverload[Any, Any], ...] = (
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
)
_PRODUCTS: tuple[OpOverload[Any, Any], ...] = (aten.mm.default, aten.bmm.default, aten.matmul.default)


@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
    """One convolution or linear layer.

    Attributes:
        node: The node that adds the bias, whose value is the layer's output.
        input: Node of the input.
        weight: Node of the weight.
        bias: Node of the bias, or None.
        bias_name: The argument of `node` that takes a bias; None for a product, which takes none.
        transposed: Weight is (in, out/groups, …).
        groups: Groups of a convolution.
        channels_last: Weight is (…, in, out).
    """

    node: fx.Node
    input: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    bias_name: str | None = "bias"
    transposed: bool = False
    groups: int = 1
    channels_last: bool = False

    def per_output(self, values: Tensor) -> Tensor:
        """Values shaped as the weight, gathered by output channel: (out, values a channel)."""
        if self.channels_last:
            return values.movedim(-1, 0).flatten(1)
        if not self.transposed:
            return values.flatten(1)
        # (in, out/groups, …) -> (groups, in/groups, out/groups, k) -> (out, in/groups · k)
        grouped = values.reshape(self.groups, values.shape[0] // self.groups, values.shape[1], -1)
        return grouped.permute(0, 2, 1, 3).reshape(self.groups * values.shape[1], -1)


def read_layer(node: fx.Node, constants: Constants) -> Layer | None:
    """The layer that `node` is, else None.

    A product (`mm`, `bmm`, `matmul`) is a layer only if its second factor is stored in the graph, and not if an `add`
    after it, which is then the layer, adds a stored vector.
    """
    found = overload(node.target) if node.op == "call_function" else None
    if found in _CONVOLUTIONS or found in _TRANSPOSED:
        return _read_convolution(node, found in _TRANSPOSED)
    if found is aten.addmm.default:
        if node_argument(node, "alpha") != 1 or node_argument(node, "beta") != 1:
            return None
        input, weight, bias = _nodes(node, "mat1", "mat2", "self")
        return Layer(node, input, weight, bias, bias_name="self", channels_last=True)
    if found in _PRODUCTS:
        return None if _biased_by(node, constants) else _read_product(node, constants)
    return _read_biased_product(node, constants) if found is aten.add.Tensor else None


def weight_scales(layer: Layer, constants: Constants) -> Tensor | None:
    """Scale at every position of the weight, () where it is per tensor; None if the weight lies on no known grid.

    The per-channel scales go through the same views as the weight does, so no view needs a rule of its own.
    """
    return _scales(layer.weight, constants)


def output_scales(layer: Layer, scales: Tensor) -> Tensor | None:
    """Scales at every position of the weight -> one per output channel, (out,); () stays.

    None where they differ within an output channel: they then lie along the input channels.
    """
    if scales.ndim == 0:
        return scales
    gathered = layer.per_output(scales)  # (out, values a channel)
    return None if bool((gathered != gathered[:, :1]).any()) else gathered[:, 0].contiguous()


def uses_dequantize(node: fx.Node) -> bool:
    """Whether a dequantize operator takes part in computing `node`."""
    seen, waiting = {node}, [node]
    while waiting:
        here = waiting.pop()
        if is_dequantize(here):
            return True
        waiting += [source for source in here.all_input_nodes if source not in seen]
        seen.update(here.all_input_nodes)
    return False


def _read_convolution(node: fx.Node, transposed: bool) -> Layer:
    input, weight, bias = _nodes(node, "input", "weight", "bias")
    if has_argument(node.target, "transposed"):
        transposed = bool(node_argument(node, "transposed"))
    groups = int(node_argument(node, "groups")) if has_argument(node.target, "groups") else 1
    return Layer(node, input, weight, bias, transposed=transposed, groups=groups)


def _read_product(node: fx.Node, constants: Constants) -> Layer | None:
    input, weight = node.args[:2]
    if not isinstance(input, fx.Node) or not isinstance(weight, fx.Node) or constants.get(weight) is None:
        return None
    return Layer(node, input, weight, None, bias_name=None, channels_last=True)


def _read_biased_product(node: fx.Node, constants: Constants) -> Layer | None:
    product, bias = node.args[:2]
    if not isinstance(product, fx.Node) or not isinstance(bias, fx.Node) or node.kwargs:
        return None
    while product.op == "call_function" and overload(product.target) not in _PRODUCTS:
        source = grid_source(product)
        # A view of the product that keeps the last axis keeps the channels.
        if source is None or len(source.users) != 1 or _last(source) is None or _last(source) != _last(product):
            return None
        product = source
    layer = _read_product(product, constants) if product.op == "call_function" else None
    if layer is None or shape_of(bias) != (_last(product),) or constants.get(_undequantized(bias)) is None:
        return None
    return dataclasses.replace(layer, node=node, bias=bias, bias_name="other")


def _biased_by(product: fx.Node, constants: Constants) -> bool:
    node = product
    while len(node.users) == 1:
        node = next(iter(node.users))
        if overload(node.target) is aten.add.Tensor:
            return _read_biased_product(node, constants) is not None
        if grid_source(node) is None:
            break
    return False


def _undequantized(bias: fx.Node) -> fx.Node:
    return bias.all_input_nodes[0] if is_dequantize(bias) else bias


def _last(node: fx.Node) -> object:
    shape = shape_of(node)
    return shape[-1] if shape else None


def _nodes(node: fx.Node, *names: str) -> Any:
    return tuple(node_argument(node, name) for name in names)


def _scales(node: fx.Node, constants: Constants) -> Tensor | None:
    if is_dequantize(node):
        read = read_dequantize(node, constants)
        if read is None:
            return None
        grid = read.qparams
        if grid.axis is None:
            return grid.scale
        shape = shape_of(node) or shape_of(read.source) or _stored_shape(read.source, constants)
        return None if shape is None else along_axis(grid.scale, grid.axis, len(shape), grid.group_size).expand(shape)
    cast = cast_source(node)
    source = grid_source(node) if cast is None else cast
    scales = None if source is None else _scales(source, constants)
    return (
        scales if scales is None or scales.ndim == 0 or cast is not None else _viewed(node, source, scales, constants)
    )


def _viewed(node: fx.Node, source: fx.Node | None, scales: Tensor, constants: Constants) -> Tensor | None:
    """What the view `node` makes of the scales of its source."""
    if overload(node.target) is None:  # getitem of an operator with several results
        call, index = node.args
        return _viewed_parts(call, source, scales, constants)[index]  # type: ignore[arg-type]
    return _viewed_parts(node, source, scales, constants)


def _viewed_parts(call: fx.Node, source: fx.Node | None, scales: Tensor, constants: Constants) -> Any:
    found = overload(call.target)
    values = {node: scales if node is source else constants.get(node) for node in call.all_input_nodes}
    if found is None or any(value is None for value in values.values()):
        return None
    args, kwargs = fx.map_arg((call.args, call.kwargs), lambda node: values[node])
    return found(*args, **kwargs)


def _stored_shape(node: fx.Node, constants: Constants) -> torch.Size | None:
    stored = constants.get(node)
    return None if stored is None else stored.shape

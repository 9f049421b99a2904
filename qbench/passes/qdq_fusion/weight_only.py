"""Linear layers whose weight is stored as codes while their activations are float, or quantized as the program runs.

    x, dq(w) per channel                           ->  linear      becomes      linear_qcs8w(x, w)
    x, dq(w) per channel, codes in [−8, 7]         ->  linear      becomes      linear_qcs4w(x, two codes a byte)
    x, dq(w) per group, codes in [−8, 7]           ->  linear      becomes      linear_q4gsw(x, two codes a byte)
    dq(q(x)) per token, dq(w) per channel, 4 bits  ->  linear      becomes      linear_dq8ca_qcs4w(x, two codes a byte)

The first three keep every bit of the result. The last sums integers where the nodes that it replaces sum rounded
floats, so last bits may differ. A weight that several layers read is packed once.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from qbench.graph.cleanup import read_instead
from qbench.graph.constants import Constants
from qbench.graph.dialect import has_argument, node_argument, overload
from qbench.graph.edit import insert_call, module_path, shape_of
from qbench.graph.layers import Layer, read_layer
from qbench.graph.recognise import Dequantize, find_grid, is_dequantize, read_dequantize
from qbench.graph.rules import Refused, Rule
from qbench.graph.scale_preserving import grid_source
from qbench.numerics.dynamic import QMAX, QMIN
from qbench.numerics.int4 import HIGHEST, LOWEST, pack_int4
from qbench.numerics.qparams import dequantize
from qbench.passes.qdq_fusion.context import FusionContext, describe

aten = torch.ops.aten

_ANCHORS = (aten.linear, aten.addmm, aten.mm, aten.matmul, aten.add)
_CHOOSERS = ("choose_qparams_per_token_asymmetric", "_choose_qparams_per_token_asymmetric_impl")


@dataclasses.dataclass(frozen=True, eq=False)
class StoredWeight:
    """A weight as (out, in) codes: `read` is its dequantize node, `scales` (out,) or (out, in/group_size)."""

    read: Dequantize
    codes: Tensor
    scales: Tensor

    @property
    def four_bits(self) -> bool:
        """Whether every code of the grid, and every code there is, fits 4 bits."""
        grid = self.read.qparams
        low, high = int(self.codes.min()), int(self.codes.max())
        return min(grid.qmin, low) >= LOWEST and max(grid.qmax, high) <= HIGHEST


@dataclasses.dataclass(frozen=True, eq=False)
class FloatLayer:
    """What the rewrite needs: the layer, the node of its float input, its weight and the operator that takes over."""

    layer: Layer
    input: fx.Node
    weight: StoredWeight
    operator: Any


class _LinearOnCodes(Rule[FusionContext, FloatLayer]):
    """What the rules of this file have in common."""

    anchors = _ANCHORS

    def match(self, node: fx.Node, context: FusionContext) -> FloatLayer | None:
        """See `Rule.match`."""
        layer = read_layer(node, context.constants)
        if layer is None or _dequantize_of(layer.weight) is None:
            return None
        input = self.float_input(layer, context)
        if input is None:
            return None
        _check_layer(layer, input)
        weight = _stored_weight(layer, context.constants)
        return FloatLayer(layer, input, weight, self.operator(weight))

    def float_input(self, layer: Layer, context: FusionContext) -> fx.Node | None:
        """The node that the operator reads; None where the layer is not this rule's business."""
        raise NotImplementedError

    def operator(self, weight: StoredWeight) -> Any:
        """The overload that takes such a weight."""
        raise NotImplementedError

    def rewrite(self, found: FloatLayer, context: FusionContext) -> Sequence[fx.Node]:
        """See `Rule.rewrite`."""
        layer, weight, constants = found.layer, found.weight, context.constants
        packed = found.operator is not torch.ops.qbench.linear_qcs8w.default
        codes = _codes_node(layer, weight, packed, constants)
        size = weight.read.qparams.group_size
        groups = () if size is None else (size,)
        arguments = (found.input, codes, _scales_node(layer, weight, constants), *groups, layer.bias)
        new = insert_call(layer.node, found.operator, arguments)
        read_instead(layer.node, new, constants)
        return [new]


class DynamicLinearRule(_LinearOnCodes):
    """Activations quantized row by row while the program runs."""

    name = "dynamic linear"

    def float_input(self, layer: Layer, context: FusionContext) -> fx.Node | None:
        """See `_LinearOnCodes.float_input`."""
        return _before_rows_are_quantized(layer.input) if _is_named(layer.input, "dequantize_per_token") else None

    def operator(self, weight: StoredWeight) -> Any:
        """See `_LinearOnCodes.operator`."""
        if weight.read.qparams.group_size is not None:
            raise Refused("no operator takes activations quantized per token and a weight with scales per group")
        if not weight.four_bits:
            raise Refused(
                f"its activations are quantized per token and its weight has codes {_span(weight)}; the operator for "
                f"such activations takes weights of 4 bits, [{LOWEST}, {HIGHEST}]"
            )
        return torch.ops.qbench.linear_dq8ca_qcs4w.default


class WeightOnlyLinearRule(_LinearOnCodes):
    """Activations in float."""

    name = "weight-only linear"

    def float_input(self, layer: Layer, context: FusionContext) -> fx.Node | None:
        """See `_LinearOnCodes.float_input`."""
        if _is_named(layer.input, "dequantize_per_token"):
            return None  # `DynamicLinearRule` says why it refused.
        if find_grid(layer.input, context.constants) is None:
            return layer.input
        # A layer with quantized activations is for the integer rules, unless it was trained without an input scale.
        noted = context.constants.graph_module.meta.get("custom", {}).get("qbench", {}).get("weight_only", ())
        return layer.input if module_path(layer.node) in noted else None

    def operator(self, weight: StoredWeight) -> Any:
        """See `_LinearOnCodes.operator`."""
        if weight.read.qparams.group_size is None:
            return getattr(torch.ops.qbench, "linear_qcs4w" if weight.four_bits else "linear_qcs8w").default
        if not weight.four_bits:
            raise Refused(
                f"its weight has codes {_span(weight)} and a scale per group; the operator for groups takes weights of "
                f"4 bits, [{LOWEST}, {HIGHEST}]"
            )
        return torch.ops.qbench.linear_q4gsw.default


def _span(weight: StoredWeight) -> str:
    grid = weight.read.qparams
    return f"[{grid.qmin}, {grid.qmax}]"


def _is_named(node: object, name: str) -> bool:
    found = overload(node.target) if isinstance(node, fx.Node) and node.op == "call_function" else None
    return found is not None and found._schema.name == f"quantized_decomposed::{name}"


def _before_rows_are_quantized(node: fx.Node) -> fx.Node:
    """The node x of dq(q(x; s, z); s, z) per token, where s and z are chosen from x.

    Raises:
        Refused: the pattern is another one.
    """
    codes = node_argument(node, "input")
    if not _is_named(codes, "quantize_per_token"):
        raise Refused(f"its input is dequantized per token by {node.name}, from codes that the program does not make")
    grids = [_row_grid(each) for each in (node, codes)]
    if grids[0] != grids[1]:
        raise Refused(f"its input is quantized on other grids ({codes.name}) than it is dequantized from ({node.name})")
    scale, zero_point, qmin, qmax, dtype = grids[0]
    real = node_argument(codes, "input")
    chooser = _chooser(scale, zero_point)
    if chooser is None or not isinstance(real, fx.Node) or chooser.args[0] is not real:
        raise Refused(
            f"the grids of its input's rows ({codes.name}) are not what choose_qparams_per_token_asymmetric finds for "
            "these rows"
        )
    if (qmin, qmax, dtype) != (QMIN, QMAX, torch.int8) or chooser.args[1] is not torch.int8:
        raise Refused(f"its input's rows have codes [{qmin}, {qmax}] in {dtype}; the operator takes int8, all codes")
    return real


def _row_grid(node: fx.Node) -> tuple[Any, ...]:
    return tuple(node_argument(node, name) for name in ("scales", "zero_points", "quant_min", "quant_max", "dtype"))


def _chooser(scale: object, zero_point: object) -> fx.Node | None:
    """The node that both parts of a grid are read from, if it chooses asymmetric grids."""
    parts = (scale, zero_point)
    if not all(isinstance(part, fx.Node) and part.target is operator.getitem for part in parts):
        return None
    (first, zero), (second, one) = (part.args for part in parts)  # type: ignore[attr-defined]
    if first is not second or (zero, one) != (0, 1) or not any(_is_named(first, name) for name in _CHOOSERS):
        return None
    return first if isinstance(first, fx.Node) else None


def _check_layer(layer: Layer, input: fx.Node) -> None:
    if overload(layer.node.target) is aten.add.Tensor:
        raise Refused("a product whose bias is added behind views has no operator on codes")
    for name, node in (("input", input), ("bias", layer.bias)):
        value = None if node is None else node.meta.get("val")
        if isinstance(value, Tensor) and value.dtype is not torch.float32:
            raise Refused(f"its {name} is {value.dtype} ({node}); the operators on codes take float32")
    shape = None if layer.bias is None else shape_of(layer.bias)
    if shape is not None and len(shape) != 1:
        raise Refused(f"its bias has shape {tuple(shape)}; the operators on codes take (out,)")


def _dequantize_of(node: fx.Node) -> fx.Node | None:
    """The dequantize node that a weight is a view of, or None."""
    while not is_dequantize(node):
        source = grid_source(node)
        if source is None:
            return None
        node = source
    return node


def _stored_weight(layer: Layer, constants: Constants) -> StoredWeight:
    """The codes and scales of a layer's weight, as (out, in).

    Raises:
        Refused: they are not known, or not symmetric int8 codes of a matrix.
    """
    node = _dequantize_of(layer.weight)
    read = read_dequantize(node, constants)
    real = constants.get(layer.weight)
    codes = None if read is None else constants.get(read.source)
    if read is None or real is None or codes is None:
        raise Refused(f"its weight is not known before the program runs: {describe(layer.weight)}")
    if codes.dtype is not torch.int8 or real.dtype is not torch.float32 or real.ndim != 2:
        raise Refused(
            f"its weight is {real.dtype} {tuple(real.shape)} from {codes.dtype}; the operators on codes take (out, in) "
            "in int8, dequantized to float32"
        )
    if codes.numel() == 0:
        raise Refused("its weight is empty")
    if bool(read.qparams.zero_point.any()):
        raise Refused("its weight has a zero point that is not 0")
    real = real.t() if layer.channels_last else real
    if not real.is_contiguous():
        # A matrix product of this layout sums in another order: last bits would differ.
        raise Refused(f"its weight lies in memory as (in, out) ({read.source.name}); the operators take (out, in)")
    return _as_rows(read, codes, real)


def _as_rows(read: Dequantize, codes: Tensor, real: Tensor) -> StoredWeight:
    """Codes and scales of `real`, which is (out, in); found by trying, so that no view needs a rule of its own."""
    grid, out = read.qparams, real.shape[0]
    for turned in (False, True):
        if turned and grid.group_size is not None:
            break
        rows, axis = (codes.t(), {0: 1, 1: 0, None: None}.get(grid.axis)) if turned else (codes, grid.axis)
        if codes.ndim != 2 or rows.shape != real.shape or axis not in (0, None):
            continue
        scales = grid.scale.expand(out).contiguous() if axis is None else grid.scale
        moved = dataclasses.replace(grid, axis=axis)
        if torch.equal(dequantize(rows, moved), real):
            return StoredWeight(read, rows.contiguous(), scales)
    raise Refused(
        f"the scales of its weight do not lie along its output channels ({read.node.name}), or a view comes between"
    )


def _codes_node(layer: Layer, weight: StoredWeight, packed: bool, constants: Constants) -> fx.Node:
    source = weight.read.source
    if not packed and constants.key(source) is not None and torch.equal(_value(constants, source), weight.codes):
        return source
    value = pack_int4(weight.codes) if packed else weight.codes
    key = f"{constants.key(source) or layer.node.name}_{'packed' if packed else 'rows'}"
    return _shared(key, value, layer.node, constants)


def _scales_node(layer: Layer, weight: StoredWeight, constants: Constants) -> fx.Node:
    """The program's own scales where they have the shape that the operator takes, else new ones."""
    node = weight.read.node
    given = node_argument(node, "scales") if has_argument(node.target, "scales") else None
    key = f"{layer.node.name}_weight_scales"
    if isinstance(given, fx.Node) and constants.key(given) is not None:
        stored = _value(constants, given)
        if stored.shape == weight.scales.shape and stored.dtype == weight.scales.dtype:
            return given
        key = f"{constants.key(given)}_rows"
    return _shared(key, weight.scales.contiguous(), layer.node, constants)


def _shared(key: str, value: Tensor, before: fx.Node, constants: Constants) -> fx.Node:
    """A node of a stored tensor: the one that an earlier layer stored under this key, or a new one."""
    key = key.replace(".", "_")  # a module's buffer cannot have the name of a path
    for node in constants.nodes(key):
        stored = constants.get(node)
        if stored is not None and stored.dtype == value.dtype and torch.equal(stored, value):
            return node
    return constants.add(key, value, before)


def _value(constants: Constants, node: fx.Node) -> Tensor:
    value = constants.get(node)
    if value is None:
        raise Refused(f"{node.name} is not known before the program runs")
    return value

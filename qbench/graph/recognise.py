"""What the q and dq nodes of a graph say: one reader for literals and tensors, aten and edge, modules and programs.

    codes = clamp(rne(x · (1/s)) + z, qmin, qmax)        quantize
    x     = (codes − z) · s                              dequantize

A *grid* is the QParams of the dequantize node that a tensor's values come from, looked for through scale-preserving
operators and through lists that are joined on one grid.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, fx

from qbench.errors import NumericsError
from qbench.graph.constants import Constants
from qbench.graph.dialect import node_argument, overload
from qbench.graph.scale_preserving import grid_source, is_scale_joining
from qbench.numerics.qparams import QParams


@dataclasses.dataclass(frozen=True, eq=False)
class Dequantize:
    """A dequantize node whose grid is known before the program runs.

    Attributes:
        node: The node.
        source: Node of the codes.
        qparams: The grid.
        dtype: Of the codes.
        literal: Whether scale and zero point are numbers in the graph, not tensors.
    """

    node: fx.Node
    source: fx.Node
    qparams: QParams
    dtype: torch.dtype
    literal: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Quantize:
    """A quantize node whose grid is known before the program runs; `source` is the node of the real values."""

    node: fx.Node
    source: fx.Node
    qparams: QParams
    dtype: torch.dtype
    literal: bool


def is_dequantize(node: object) -> bool:
    """Whether the node calls a dequantize operator of any form: per tensor, channel, group or token."""
    return _named(node, "dequantize_per_")


def is_quantize(node: object) -> bool:
    """Whether the node calls a quantize operator of any form: per tensor, channel, group or token."""
    return _named(node, "quantize_per_")


def read_dequantize(node: object, constants: Constants) -> Dequantize | None:
    """What a dequantize node per tensor, per channel or per group says.

    None for every other node, and where the scale is computed while the program runs (`is_dequantize` tells them
    apart).

    Raises:
        NumericsError: a scale is not positive and finite, or scale and zero point do not fit each other.
    """
    return _read(node, constants, Dequantize) if is_dequantize(node) else None


def read_quantize(node: object, constants: Constants) -> Quantize | None:
    """What a quantize node per tensor, per channel or per group says; see `read_dequantize`."""
    return _read(node, constants, Quantize) if is_quantize(node) else None


def find_grid(node: fx.Node, constants: Constants) -> Dequantize | None:
    """The dequantize node on whose grid the values of `node` lie.

    Looks through scale-preserving operators, through casts between float types, and through a `cat` whose parts all
    lie on one grid (then the first part's node is returned). None where there is none, where its scale is not known, or
    where an in-place operator may have moved the values.
    """
    seen: fx.Node | None = node
    while seen is not None and seen not in constants.written_off_grid:
        if is_dequantize(seen):
            return read_dequantize(seen, constants)
        if is_scale_joining(seen.target):
            return _joined_grid(seen, constants)
        seen = grid_source(seen) or cast_source(seen)
    return None


def origin(node: fx.Node) -> fx.Node:
    """Where `find_grid` stops when it looks up from `node`: for messages."""
    source = None if is_dequantize(node) else grid_source(node) or cast_source(node)
    return node if source is None else origin(source)


def cast_source(node: fx.Node) -> fx.Node | None:
    """What a cast from one float type to another casts; None for every other node."""
    casts = ("aten::to", "aten::_to_copy", "aten::type_as", "dim_order_ops::_to_dim_order_copy")
    found = overload(node.target) if node.op == "call_function" else None
    if found is None or found._schema.name not in casts:
        return None
    source = node.args[0]
    if not isinstance(source, fx.Node) or not (_is_float(source) and _is_float(node)):
        return None
    return source


def same_grid(first: QParams, second: QParams) -> bool:
    """Whether two grids are the same: scale, zero point, limits, axis and groups."""
    return (
        (first.qmin, first.qmax, first.axis, first.group_size)
        == (second.qmin, second.qmax, second.axis, second.group_size)
        and torch.equal(first.scale, second.scale)
        and torch.equal(first.zero_point, second.zero_point)
    )


def _joined_grid(node: fx.Node, constants: Constants) -> Dequantize | None:
    grids = [find_grid(part, constants) for part in node.all_input_nodes]
    first = grids[0] if grids else None
    if first is None or any(grid is None or not same_grid(grid.qparams, first.qparams) for grid in grids):
        return None
    return first


def _named(node: object, name: str) -> bool:
    found = overload(node.target) if isinstance(node, fx.Node) and node.op == "call_function" else None
    return found is not None and found._schema.name.startswith(f"quantized_decomposed::{name}")


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


def _read(node: Any, constants: Constants, kind: type[Any]) -> Any:
    found = overload(node.target)
    form = None if found is None else found._schema.name.rpartition("::")[2].removeprefix("de")
    if form not in ("quantize_per_tensor", "quantize_per_channel", "quantize_per_channel_group"):
        return None
    per_tensor = form == "quantize_per_tensor"
    scale_name, zero_name = ("scale", "zero_point") if per_tensor else ("scales", "zero_points")
    scale = _tensor(node_argument(node, scale_name), constants)
    zero_point = _tensor(node_argument(node, zero_name), constants)
    limits = [_tensor(node_argument(node, name), constants) for name in ("quant_min", "quant_max")]
    if scale is None or zero_point is None or limits[0] is None or limits[1] is None:
        return None
    axis, group_size, shape = _places(node, form, scale)
    if per_tensor and scale.numel() != 1:
        raise NumericsError(f"{node.name}: the scale of a per-tensor operator has shape {tuple(scale.shape)}, not ()")
    scale = scale.float().reshape(shape)
    # Zero points that are left out are one zero.
    zero_point = zero_point.reshape(shape) if zero_point.numel() == scale.numel() else zero_point.flatten()
    zero_point = zero_point.to(torch.int32).expand_as(scale).clone()
    qparams = QParams(scale, zero_point, int(limits[0]), int(limits[1]), axis, group_size)
    qparams.check(node.name)
    source = node_argument(node, "input")
    literal = not isinstance(node_argument(node, scale_name), fx.Node)
    return kind(node, source, qparams, node_argument(node, "dtype"), literal)


def _places(node: fx.Node, form: str, scale: Tensor) -> tuple[int | None, int | None, tuple[int, ...]]:
    """Axis and group size of a q or dq node, and the shape of its scales."""
    if form == "quantize_per_tensor":
        return None, None, ()
    if form == "quantize_per_channel":
        return _axis(node), None, (-1,)
    # Some libraries hand the scales of all groups over in one row.
    value = node.meta.get("val")
    rows = value.shape[0] if isinstance(value, Tensor) else scale.shape[0]
    return 0, int(node_argument(node, "group_size")), (rows, -1)


def _axis(node: fx.Node) -> int:
    axis = int(node_argument(node, "axis"))
    value = node.meta.get("val")
    # A negative axis counts from the end.
    return axis if axis >= 0 or not isinstance(value, Tensor) else axis + value.ndim


def _tensor(value: object, constants: Constants) -> Tensor | None:
    """A literal or a node's stored value as a tensor; None if a node's value is not known before the program runs."""
    if isinstance(value, fx.Node):
        return constants.get(value)
    if isinstance(value, float):
        return torch.tensor(value, dtype=torch.float32)
    # No zero points means zeros.
    return torch.tensor(0 if value is None else value, dtype=torch.int64)

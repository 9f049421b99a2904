"""Operators that move, select or repeat values do the same to codes.

    dq(c)  ->  view          becomes      dq(view(c))

so the dequantize node moves down to the operator that computes, whose rule then finds it at its input. A max pool
selects values; a pad with the real 0 puts in the zero point.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from qbench.graph.cleanup import read_instead
from qbench.graph.dialect import has_argument, node_argument, overload, packet
from qbench.graph.edit import insert_call, set_argument
from qbench.graph.recognise import is_dequantize
from qbench.graph.rules import Refused, Rule
from qbench.graph.scale_preserving import SCALE_PRESERVING, grid_source
from qbench.passes.qdq_fusion.context import CODES_IN_FLOAT, Codes, FusionContext

aten = torch.ops.aten

_MAX_POOLS = {aten.max_pool1d: 1, aten.max_pool2d: 2, aten.max_pool3d: 3}
_PADS = (aten.pad, aten.constant_pad_nd)
# PyTorch has no 8-bit kernels for these: codes go through float32, which holds each of them.
_FLOAT_ONLY = frozenset(
    {
        aten.upsample_nearest1d, aten.upsample_nearest2d, aten.upsample_nearest3d,
        aten._upsample_nearest_exact1d, aten._upsample_nearest_exact2d, aten._upsample_nearest_exact3d,
        aten.reflection_pad1d, aten.reflection_pad2d, aten.reflection_pad3d,
        aten.replication_pad1d, aten.replication_pad2d, aten.replication_pad3d,
        aten.adaptive_max_pool1d, aten.adaptive_max_pool2d, aten.adaptive_max_pool3d, aten.im2col,
    }
)  # fmt: skip
# Fused by other rules, or with results that are no codes.
_NOT_HERE = frozenset(
    {
        aten.relu, aten.relu_, aten.native_dropout, aten.fractional_max_pool2d, aten.fractional_max_pool3d,
        aten.max_pool1d_with_indices, aten.max_pool2d_with_indices, aten.max_pool3d_with_indices,
    }
)  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class View:
    """An operator that reads dequantized codes and keeps their grid."""

    node: fx.Node
    dequantize: fx.Node
    input: Codes


class ViewRule(Rule[FusionContext, View]):
    """Scale-preserving operators."""

    name = "view"
    anchors = tuple(packet for packet in SCALE_PRESERVING if packet not in _NOT_HERE)

    def match(self, node: fx.Node, context: FusionContext) -> View | None:
        """See `Rule.match`."""
        source = node.args[0] if node.args else None
        if not is_dequantize(source) or node.target is aten.view.dtype:
            return None  # Not between dequantized codes and what reads them.
        stored = context.constants.key(source.args[0]) is not None  # type: ignore[union-attr, arg-type]
        if stored and packet(node.target) is not aten.embedding:
            return None  # A view of a stored weight is the business of the layer that reads it.
        if _first_result(node) is None:
            raise Refused("with these arguments it does not keep the grid: a fill that is not 0, dropout in training")
        found = overload(node.target)
        writes = found is None or (found._schema.is_mutable and not has_argument(found, "train"))
        if writes or node in context.constants.written_off_grid:  # A dropout_ in eval writes what is there.
            raise Refused("it, or what reads it, writes in place")
        return View(node, source, context.codes(source))  # type: ignore[arg-type]

    def rewrite(self, found: View, context: FusionContext) -> Sequence[fx.Node]:
        """See `Rule.rewrite`."""
        codes = self._on_codes(found, context)
        results = []
        for old, new in _parts(found.node, codes):
            arguments = (new, *found.dequantize.args[1:])
            real = insert_call(old.next, overload(found.dequantize.target), arguments, origin=old)  # type: ignore[arg-type]
            read_instead(old, real, context.constants)
            results.append(real)
            if old is not found.node:
                old.graph.erase_node(old)
        # Not left to dead code elimination, which keeps a dropout for the random numbers that it may draw.
        found.node.graph.erase_node(found.node)
        return results

    def _on_codes(self, found: View, context: FusionContext) -> fx.Node:
        node, codes, operation = found.node, found.input.node, packet(found.node.target)
        if has_argument(node.target, "train"):
            return codes  # A dropout in eval.
        if operation in _MAX_POOLS:
            dims = _MAX_POOLS[operation]
            pool = getattr(torch.ops.qbench, f"max_pool{dims}d_q8ta").default
            return insert_call(node, pool, (codes, *_pool_arguments(node, dims)))
        if operation not in _FLOAT_ONLY and not _pads_by_copy(node):
            call = insert_call(node, overload(node.target), (codes, *node.args[1:]), node.kwargs)  # type: ignore[arg-type]
            if operation in _PADS:
                set_argument(call, "value", found.input.grid.zero_point)
            return call
        wide = insert_call(node, aten._to_copy.default, (codes,), {"dtype": torch.float32})
        call = insert_call(node, overload(node.target), (wide, *node.args[1:]), node.kwargs)  # type: ignore[arg-type]
        wide.meta[CODES_IN_FLOAT] = call.meta[CODES_IN_FLOAT] = True
        return insert_call(node, aten._to_copy.default, (call,), {"dtype": found.input.grid.dtype})


def _first_result(node: fx.Node) -> fx.Node | None:
    """What the node, or the first part that is read of it, takes its grid from."""
    if not isinstance(node.meta.get("val"), (list, tuple)):
        return grid_source(node)
    return next((grid_source(part) for part in node.users if part.target is operator.getitem), None)


def _parts(node: fx.Node, codes: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    """Pairs of a node of real values and the node of its codes: one, or one for each part of a split."""
    if not isinstance(node.meta.get("val"), (list, tuple)):
        return [(node, codes)]
    pairs = []
    for part in list(node.users):
        with part.graph.inserting_before(part):
            new = part.graph.call_function(operator.getitem, (codes, part.args[1]))
        new.meta.update({key: value for key, value in part.meta.items() if key != "val"})
        if isinstance(codes.meta.get("val"), (list, tuple)):
            new.meta["val"] = codes.meta["val"][part.args[1]]
        pairs.append((part, new))
    return pairs


def _pads_by_copy(node: fx.Node) -> bool:
    """Whether a pad takes values of the tensor, which has no 8-bit kernel."""
    return packet(node.target) is aten.pad and node_argument(node, "mode") != "constant"


def _pool_arguments(node: fx.Node, dims: int) -> tuple[Any, ...]:
    def sizes(value: Any) -> list[int]:
        given = [value] if isinstance(value, int) else list(value)
        return given * dims if len(given) == 1 else given

    kernel = sizes(node_argument(node, "kernel_size"))
    stride = sizes(node_argument(node, "stride") or kernel)
    rest = [sizes(node_argument(node, name)) for name in ("padding", "dilation")]
    ceil_mode = bool(node_argument(node, "ceil_mode")) if has_argument(node.target, "ceil_mode") else False
    return kernel, stride, *rest, ceil_mode

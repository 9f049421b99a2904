"""Averages; a max pool selects values, so it is one of the views.

    dq(x)  ->  mean over dims  ->  q                  becomes      global_avg_pool_q8ta_q8to(x)
    dq(x)  ->  avg_pool2d  ->  q                      becomes      avg_pool2d_q8ta_q8to(x)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

from qbench.graph.dialect import node_argument, packet
from qbench.graph.edit import shape_of
from qbench.graph.rules import Refused, Rule
from qbench.passes.qdq_fusion.context import Codes, FusionContext
from qbench.passes.qdq_fusion.elementwise import FusedCall

aten = torch.ops.aten


class AverageRule(Rule[FusionContext, FusedCall]):
    """Means over dims, adaptive average pools that are one of these or a plain pool, and average pools."""

    name = "average"
    anchors = (aten.mean, aten.adaptive_avg_pool2d, aten._adaptive_avg_pool2d, aten.avg_pool2d)

    def match(self, node: fx.Node, context: FusionContext) -> FusedCall:
        """See `Rule.match`."""
        input = context.codes(node.args[0])
        operation = packet(node.target)
        if operation is aten.mean:
            call = _mean(node, input, context)
        elif operation is aten.avg_pool2d:
            call = _pool(node, input, _window(node), context)
        else:
            call = _adaptive(node, input, context)
        results = context.results(node)
        if call.of_everything:
            # A size that may change is taken as 1.
            sizes = [size for size in _shape(node)[2:] if isinstance(size, int)]
            for result in results:
                context.check_ratio("global_average", input.grid.scale / (result.grid.scale * math.prod(sizes)))
        return FusedCall(call.operator, call.arguments, results)

    def rewrite(self, found: FusedCall, context: FusionContext) -> Sequence[fx.Node]:
        """See `Rule.rewrite`."""
        return [context.emit(result, found.operator, found.arguments) for result in found.results]


class Call(NamedTuple):
    """An operator, its arguments before the output's grid, and whether the runtime takes it for a global average."""

    operator: Any
    arguments: tuple[Any, ...]
    of_everything: bool


def _mean(node: fx.Node, input: Codes, context: FusionContext) -> Call:
    context.function("global_average")
    if node.target is not aten.mean.dim:
        raise Refused("a mean over everything has no integer operator; name its dims")
    rank = len(_shape(node))
    dims = [dim % rank for dim in node_argument(node, "dim") or range(rank)]
    if sorted(dims) != list(range(2, rank)):
        raise Refused(f"a mean over dims {sorted(dims)}; the runtimes' integer operators average dims 2 and on")
    return _global(input, dims, bool(node_argument(node, "keepdim")))


def _adaptive(node: fx.Node, input: Codes, context: FusionContext) -> Call:
    wanted = [int(size) for size in node_argument(node, "output_size")]
    if wanted == [1, 1]:
        context.function("global_average")
        return _global(input, [-2, -1], True)
    given = _shape(node)[-2:]
    if not all(isinstance(size, int) for size in given) or any(g % w for g, w in zip(given, wanted, strict=True)):
        raise Refused(f"an adaptive average from {tuple(given)} to {tuple(wanted)} has windows of several sizes")
    kernel = [int(g) // w for g, w in zip(given, wanted, strict=True)]
    return _pool(node, input, (kernel, kernel, [0, 0], False, True, None), context)


def _global(input: Codes, dims: list[int], keepdim: bool) -> Call:
    return Call(torch.ops.qbench.global_avg_pool_q8ta_q8to.default, (*input.arguments, dims, keepdim), True)


def _pool(node: fx.Node, input: Codes, window: tuple[Any, ...], context: FusionContext) -> Call:
    context.function("average_pool")
    # One window over everything is computed as a global average, within the limits of that.
    whole = window[0] == list(_shape(node)[-2:]) and not any(window[2])
    return Call(torch.ops.qbench.avg_pool2d_q8ta_q8to.default, (*input.arguments, *window), whole)


def _window(node: fx.Node) -> tuple[Any, ...]:
    kernel = _pair(node_argument(node, "kernel_size"))
    stride = _pair(node_argument(node, "stride") or kernel)
    names = ("ceil_mode", "count_include_pad", "divisor_override")
    return kernel, stride, _pair(node_argument(node, "padding")), *(node_argument(node, name) for name in names)


def _pair(value: Any) -> list[int]:
    sizes = [value] if isinstance(value, int) else list(value)
    return sizes * 2 if len(sizes) == 1 else sizes


def _shape(node: fx.Node) -> Sequence[Any]:
    shape = shape_of(node.args[0])  # type: ignore[arg-type]
    if shape is None:
        raise Refused("the shape of its input is not kept in the graph")
    return shape

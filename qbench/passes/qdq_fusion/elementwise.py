"""Sums, differences, products and concatenations of tensors that each lie on a grid of their own.

    dq(a), dq(b)  ->  a + b  ->  [clamps]  ->  q          becomes      add_q8ta_q8ta_q8to(a, b)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from qbench.graph.dialect import has_argument, node_argument, packet
from qbench.graph.rules import Refused, Rule
from qbench.passes.qdq_fusion.context import Codes, FusionContext, Result

aten = torch.ops.aten


_OPERATIONS: dict[Any, str] = {aten.add: "add", aten.sub: "sub", aten.mul: "mul"}


@dataclasses.dataclass(frozen=True, eq=False)
class FusedCall:
    """Operands on their grids, the fused overload, its arguments before the output's, and what quantizes the result."""

    operator: Any
    arguments: tuple[Any, ...]
    results: list[Result]


class ElementwiseRule(Rule[FusionContext, FusedCall]):
    """Binary operators on two tensors of codes."""

    name = "elementwise"
    anchors = tuple(_OPERATIONS)

    def match(self, node: fx.Node, context: FusionContext) -> FusedCall | None:
        """See `Rule.match`."""
        if not _is_quantized_arithmetic(node) or not isinstance(node_argument(node, "other"), fx.Node):
            return None  # That of a number is a function of one value: `ScalarRule`.
        operation = _OPERATIONS[packet(node.target)]
        context.function(operation)
        if has_argument(node.target, "alpha") and node_argument(node, "alpha") != 1:
            raise Refused(f"alpha is {node_argument(node, 'alpha')}; the integer operator has 1")
        first = context.codes(node_argument(node, "self"), "first operand")
        second = context.codes(node_argument(node, "other"), "second operand")
        operator = getattr(torch.ops.qbench, f"{operation}_q8ta_q8ta_q8to").default
        return FusedCall(operator, (*first.arguments, *second.arguments), context.results(node))

    def rewrite(self, found: FusedCall, context: FusionContext) -> Sequence[fx.Node]:
        """See `Rule.rewrite`."""
        return [context.emit(result, found.operator, found.arguments) for result in found.results]


class CatRule(Rule[FusionContext, FusedCall]):
    """Concatenation of tensors of codes, each rescaled to the grid of the result."""

    name = "cat"
    anchors = (aten.cat, aten.concat, aten.concatenate)

    def match(self, node: fx.Node, context: FusionContext) -> FusedCall:
        """See `Rule.match`."""
        parts: list[Codes] = [
            context.codes(part, f"part {i}") for i, part in enumerate(node_argument(node, "tensors"))
        ]
        results = context.results(node)
        if any(part.grid[:2] != result.grid[:2] for part in parts for result in results):
            context.function("rescale", "cat")
        arguments = (
            [part.node for part in parts],
            [part.grid.scale for part in parts],
            [part.grid.zero_point for part in parts],
            node_argument(node, "dim"),
        )
        return FusedCall(torch.ops.qbench.cat_q8ta_q8to.default, arguments, results)

    def rewrite(self, found: FusedCall, context: FusionContext) -> Sequence[fx.Node]:
        """See `Rule.rewrite`."""
        return [context.emit(result, found.operator, found.arguments) for result in found.results]


def _is_quantized_arithmetic(node: fx.Node) -> bool:
    """Whether a call works on float tensors: index arithmetic and sizes are not this pass's business."""
    value = node.meta.get("val")
    return not isinstance(value, torch.Tensor) or value.is_floating_point()

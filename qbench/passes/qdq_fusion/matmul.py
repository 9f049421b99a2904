"""Products of two matrices that both lie on a grid of their own, as in attention.

    dq(a), dq(b)  ->  a @ b  ->  [clamps]  ->  q          becomes      matmul_q8ta_q8ta_q8to(a, b)

A product with a stored weight is a linear layer, whose rule stands before this one. What that rule refuses, a weight
with a zero point for instance, and a stored first factor, are taken here if one grid holds for the whole tensor.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from qbench.graph.edit import shape_of
from qbench.graph.rules import Refused, Rule
from qbench.numerics.arithmetic.base import largest_sum
from qbench.passes.qdq_fusion.context import Codes, FusionContext
from qbench.passes.qdq_fusion.elementwise import FusedCall

aten = torch.ops.aten


class MatMulRule(Rule[FusionContext, FusedCall]):
    """Matrix products of two tensors of codes; leading dims broadcast."""

    name = "matmul"
    anchors = (aten.matmul, aten.bmm, aten.mm)

    def match(self, node: fx.Node, context: FusionContext) -> FusedCall:
        """See `Rule.match`."""
        first = context.codes(node.args[0], "first factor")
        second = context.codes(node.args[1], "second factor")
        context.function("requantize", "matmul")
        _check_shapes(node, first, second)
        results = context.results(node)
        for result in results:
            context.check_ratio("requantize", first.grid.scale * second.grid.scale / result.grid.scale)
        operator = torch.ops.qbench.matmul_q8ta_q8ta_q8to.default
        return FusedCall(operator, (*first.arguments, *second.arguments), results)

    def rewrite(self, found: FusedCall, context: FusionContext) -> Sequence[fx.Node]:
        """See `Rule.rewrite`."""
        return [context.emit(result, found.operator, found.arguments) for result in found.results]


def _check_shapes(node: fx.Node, first: Codes, second: Codes) -> None:
    """Refuse vectors, and sums that can leave int32; sizes that are not known before the program runs pass."""
    shapes = [shape_of(factor) for factor in node.args[:2]]  # type: ignore[arg-type]
    for shape in shapes:
        if shape is not None and len(shape) < 2:
            raise Refused("one of its factors is a vector; the integer operator takes matrices")
    inner = shapes[0][-1] if shapes[0] is not None else None
    if isinstance(inner, int) and largest_sum(inner, first.grid, second.grid) >= 2**31:
        raise Refused(
            f"its sums of {inner} products can leave int32 with zero points {first.grid.zero_point} and "
            f"{second.grid.zero_point}"
        )

"""Quantize nodes that no other rule took: the edge of the integer part, and a change of grid.

    x in float  ->  q                  becomes      quantize_q8to(x)              the target's division and NaN rule
    dq(c)  ->  q on another grid       becomes      requantize_q8ta_q8to(c)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import fx

from qbench.graph.qdq import quantized_decomposed
from qbench.graph.recognise import is_dequantize
from qbench.graph.rules import Rule
from qbench.passes.qdq_fusion.context import Codes, FusionContext, Result


@dataclasses.dataclass(frozen=True, eq=False)
class Boundary:
    """A quantize node, and the codes that it reads if it reads dequantized ones."""

    result: Result
    input: Codes | None


class BoundaryRule(Rule[FusionContext, Boundary]):
    """Quantize nodes per tensor. It stands last among the rules."""

    name = "boundary"

    @property
    def anchors(self) -> tuple[object, ...]:  # type: ignore[override]
        """The quantize operator, which is registered when it is first asked for."""
        return (quantized_decomposed().quantize_per_tensor,)

    def match(self, node: fx.Node, context: FusionContext) -> Boundary | None:
        """See `Rule.match`."""
        result = context.result(node)
        if not is_dequantize(node.args[0]):
            return Boundary(result, None)
        input = context.codes(node.args[0])
        if input.grid == result.grid:
            return None  # It changes nothing; what removes redundant pairs takes it.
        context.function("rescale")
        return Boundary(result, input)

    def rewrite(self, found: Boundary, context: FusionContext) -> Sequence[fx.Node]:
        """See `Rule.rewrite`."""
        if found.input is None:
            source = found.result.quantize.args[0]
            return [context.emit(found.result, torch.ops.qbench.quantize_q8to.default, (source,))]
        operator = torch.ops.qbench.requantize_q8ta_q8to.default
        return [context.emit(found.result, operator, found.input.arguments)]

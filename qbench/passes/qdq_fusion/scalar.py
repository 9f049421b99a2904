"""Arithmetic on codes and a number: a function of one value, so a table of 256 codes.

    dq(x)  ->  x ∘ n  ->  [clamps]  ->  q          becomes      unary_q8ta_q8to(x, table)        ∘ one of + − · /

Every runtime takes one float32 step for it, which IEEE 754 defines to the last bit, between its own dequantize and
quantize steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from qbench.graph.dialect import has_argument, node_argument, packet
from qbench.graph.rules import Refused, Rule
from qbench.numerics.arithmetic.base import dequantize_codes
from qbench.passes.qdq_fusion.context import FusionContext
from qbench.passes.qdq_fusion.unary import FusedFunction, UnaryRule, all_codes

aten = torch.ops.aten

_STEPS: dict[Any, tuple[str, Callable[[Tensor, Tensor], Tensor]]] = {
    aten.add: ("add", torch.add),
    aten.sub: ("sub", torch.sub),
    aten.rsub: ("sub", lambda x, number: number - x),
    aten.mul: ("mul", torch.mul),
    aten.div: ("div", torch.div),
}


class ScalarRule(Rule[FusionContext, FusedFunction]):
    """A sum, difference, product or quotient of codes and a number."""

    name = "scalar"
    anchors = tuple(_STEPS)

    def match(self, node: fx.Node, context: FusionContext) -> FusedFunction | None:
        """See `Rule.match`."""
        number = node_argument(node, "other")
        value = node.meta.get("val")
        if isinstance(number, fx.Node) or (isinstance(value, Tensor) and not value.is_floating_point()):
            return None
        if has_argument(node.target, "alpha") and node_argument(node, "alpha") != 1:
            raise Refused(f"alpha is {node_argument(node, 'alpha')}; the integer operator has 1")
        if has_argument(node.target, "rounding_mode") and node_argument(node, "rounding_mode") is not None:
            raise Refused("it rounds its quotient")
        name, step = _STEPS[packet(node.target)]
        context.function("table")  # a target without tables has no operator for it
        quantize = context.function("quantize")
        input = context.codes(node.args[0])
        results = context.results(node)
        real = step(dequantize_codes(all_codes(input), input.grid), torch.tensor(number, dtype=torch.float32))
        return FusedFunction(input, f"{name}_scalar", [(found, quantize(real, found.grid)) for found in results])

    rewrite = UnaryRule.rewrite

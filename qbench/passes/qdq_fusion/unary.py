"""Functions of one value: 256 codes go in, so a table of 256 codes is the whole function.

    dq(x)  ->  f  ->  [clamps]  ->  q          becomes      unary_q8ta_q8to(x, table)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from qbench.graph.clamps import CLAMPS, clamp_bounds
from qbench.graph.dialect import node_argument, packet
from qbench.graph.recognise import is_dequantize
from qbench.graph.rules import Refused, Rule
from qbench.numerics.arithmetic.functions import FUNCTIONS
from qbench.passes.qdq_fusion.context import Codes, FusionContext, Result, describe

aten = torch.ops.aten

_BY_OPERATOR = {name: function for function in FUNCTIONS.values() for name in function.operators}


@dataclasses.dataclass(frozen=True, eq=False)
class FusedFunction:
    """The codes that go in, and a table for each quantize node behind the function."""

    input: Codes
    name: str
    tables: list[tuple[Result, Tensor]]


class UnaryRule(Rule[FusionContext, FusedFunction]):
    """Functions of `qbench.numerics.arithmetic.functions` between a dequantize and a quantize node."""

    name = "table"
    anchors = tuple(
        getattr(aten, operator.partition("::")[2])
        for operator in _BY_OPERATOR
        if getattr(aten, operator.partition("::")[2]) not in CLAMPS
    )

    def match(self, node: fx.Node, context: FusionContext) -> FusedFunction:
        """See `Rule.match`."""
        name, parameters = read_function(node)
        table = context.function("table", name)
        input = context.codes(node.args[0])
        results = context.results(node)
        tables = [(result, table(name, parameters, input.grid, result.grid)) for result in results]
        return FusedFunction(input, name, tables)

    def rewrite(self, found: FusedFunction, context: FusionContext) -> Sequence[fx.Node]:
        """See `Rule.rewrite`."""
        nodes = []
        for result, table in found.tables:
            stored = context.constants.add(f"{found.name}_table", table, result.quantize)
            operator = torch.ops.qbench.unary_q8ta_q8to.default
            nodes.append(context.replace(result.quantize, operator, (found.input.node, stored)))
        return nodes


class ClampRule(Rule[FusionContext, FusedFunction]):
    """A clamp that stands alone between a dequantize and a quantize node: a clip of codes on one grid, else a table."""

    name = "clamp"
    anchors = tuple(dict.fromkeys(CLAMPS))

    def match(self, node: fx.Node, context: FusionContext) -> FusedFunction:
        """See `Rule.match`."""
        bounds = clamp_bounds(node)
        if bounds is None:
            raise Refused("its bounds are computed while the program runs")
        if not is_dequantize(node.args[0]):
            # That of a layer which was fused is gone by now.
            raise Refused(f"what it clamps stays in float: {describe(node.args[0])}")  # type: ignore[arg-type]
        input = context.codes(node.args[0])
        rescale = context.function("rescale")
        results = context.results(node, bounds)
        tables = [(result, rescale(all_codes(input), input.grid, result.grid)) for result in results]
        return FusedFunction(input, "clamp", tables)

    rewrite = UnaryRule.rewrite


def read_function(node: fx.Node) -> tuple[str, tuple[float, ...]]:
    """Name of the function that a node computes, and its parameters.

    Raises:
        Refused: a parameter is not a number, or the variant is not known.
    """
    operation = packet(node.target)
    assert operation is not None
    function = _BY_OPERATOR[operation._qualified_op_name]
    if function.name == "gelu" and node_argument(node, "approximate") == "tanh":
        function = FUNCTIONS["gelu_tanh"]
    values: list[Any] = [node_argument(node, name) for name in function.parameters]
    if not all(isinstance(value, (int, float)) for value in values):
        raise Refused(f"the parameters of {function.name} are computed while the program runs")
    return function.name, tuple(float(value) for value in values)


def all_codes(input: Codes) -> Tensor:
    """Every code of a dtype in order, (256,): what a table is a function of."""
    limits = torch.iinfo(input.grid.dtype)
    return torch.arange(limits.min, limits.max + 1).to(input.grid.dtype)

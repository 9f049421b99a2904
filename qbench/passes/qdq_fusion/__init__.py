"""From Q/DQ to integers: dequantize, operator, quantize becomes one operator with a target's arithmetic.

    dq(x), dq(w), dq(b)  ->  conv  ->  [relu]  ->  q          becomes      conv2d_q8ta_q8csw_q8to(x, w, b)

`FUSION_RULES` is the explicit tuple that is applied; a rule is one class in one file here and one entry. What no rule
takes stays as it is, in float between its dequantize and quantize nodes, and is in the report with the reason.
"""

from __future__ import annotations

import operator

from torch import Tensor, fx
from torch.export import ExportedProgram

from qbench import targets
from qbench.errors import ConfigError
from qbench.graph.cleanup import remove_redundant_qdq
from qbench.graph.constants import Constants, constants_of
from qbench.graph.dialect import overload
from qbench.graph.edit import module_path
from qbench.graph.recognise import is_dequantize, is_quantize
from qbench.graph.rules import Miss, Rule, apply_rules
from qbench.passes.bias import quantize_bias
from qbench.passes.fusion_report import FloatOperator, FusionReport
from qbench.passes.qdq_fusion.boundary import BoundaryRule
from qbench.passes.qdq_fusion.context import CODES_IN_FLOAT, FusionContext
from qbench.passes.qdq_fusion.elementwise import CatRule, ElementwiseRule
from qbench.passes.qdq_fusion.layers import ConvolutionRule, LinearRule
from qbench.passes.qdq_fusion.matmul import MatMulRule
from qbench.passes.qdq_fusion.pooling import AverageRule
from qbench.passes.qdq_fusion.scalar import ScalarRule
from qbench.passes.qdq_fusion.unary import ClampRule, UnaryRule
from qbench.passes.qdq_fusion.views import ViewRule
from qbench.passes.qdq_fusion.weight_only import DynamicLinearRule, WeightOnlyLinearRule

#: Tried in this order at every node that they start at.
FUSION_RULES: tuple[Rule[FusionContext, object], ...] = (
    ConvolutionRule(),
    LinearRule(),
    DynamicLinearRule(),
    WeightOnlyLinearRule(),
    MatMulRule(),
    ElementwiseRule(),
    ScalarRule(),
    CatRule(),
    AverageRule(),
    UnaryRule(),
    ClampRule(),
    ViewRule(),
    BoundaryRule(),
)  # type: ignore[assignment]


def fuse_qdq(
    program: ExportedProgram | fx.GraphModule,
    rules: tuple[Rule[FusionContext, object], ...] = FUSION_RULES,
    *,
    target: str | targets.Target | None = None,
) -> FusionReport:
    """Give a Q/DQ program its integer form for a target, in place.

    Float biases become int32 codes first (`quantize_bias`). Every fused operator of the result computes, bit by bit,
    what the target's runtime computes; what no rule takes stays in float and is reported.

    Args:
        program: A Q/DQ program, or a GraphModule of one, in aten operators.
        rules: Tried in this order; `(MyRule(), *FUSION_RULES)` adds one.
        target: Whose arithmetic; the default is the target that the program was converted for.

    Returns:
        What was fused, by which rule; what nearly was, and why not; what stays in float.

    Raises:
        ConfigError: the target is unknown or has no stated arithmetic, or the program does not say its target.
        PassError: `program` is neither a program nor a GraphModule, or something in `rules` is no rule.
        NumericsError: a bias or a scale cannot be quantized; nothing was changed.
    """
    import qbench.ops  # noqa: F401 - defines the operators that the rules emit

    constants_of(program)  # raises before anything is looked for in it
    module = program.graph_module if isinstance(program, ExportedProgram) else program
    found = _target(module, target)
    bias = quantize_bias(program)
    constants = constants_of(program)
    fused, missed = apply_rules(constants, rules, FusionContext(constants, found))
    if fused:
        constants.graph.eliminate_dead_code()
        constants.finish()
        remove_redundant_qdq(program)
    module.meta.setdefault("custom", {}).setdefault("qbench", {})["integer"] = found.name
    left = _left_float(constants_of(program), missed)
    return FusionReport(found.name, fused, missed, left, bias)


def _target(module: fx.GraphModule, given: str | targets.Target | None) -> targets.Target:
    recorded = module.meta.get("custom", {}).get("qbench", {}).get("target")
    if given is None and recorded is None:
        raise ConfigError(
            "fuse_qdq: the program does not say which target it is for; fuse_qdq(program, target='onnxruntime')"
        )
    found = targets.get(given if given is not None else recorded)
    if found.arithmetic is None:
        having = ", ".join(known.name for known in targets.TARGETS if known.arithmetic is not None)
        raise ConfigError(
            f"fuse_qdq: target {found.name} has no stated arithmetic, so there is no integer form for it; targets that "
            f"have one: {having}"
        )
    return found


def _left_float(constants: Constants, missed: tuple[Miss, ...]) -> tuple[FloatOperator, ...]:
    """Operators that compute real values from real values, in a program's integer form."""
    reasons = {miss.node: miss.reason for miss in missed}
    real: set[fx.Node] = set()
    found = []
    for node in constants.graph.nodes:
        reads_real = not real.isdisjoint(node.all_input_nodes)
        if _is_real(node, reads_real, constants):
            real.add(node)
            if reads_real and node.op == "call_function" and not _is_expected(node):
                reason = reasons.get(node.name, "no rule starts at this operator")
                found.append(FloatOperator(node.name, str(node.target), module_path(node), reason))
    return tuple(found)


def _is_real(node: fx.Node, reads_real: bool, constants: Constants) -> bool:
    """Whether a node holds real values; a graph whose nodes keep no values (PT2E's) is followed from its inputs."""
    if CODES_IN_FLOAT in node.meta:
        return False
    value = node.meta.get("val")
    if value is None and constants.key(node) is not None:
        value = constants.get(node)
    if isinstance(value, (list, tuple)):
        value = value[0] if value else None
    if isinstance(value, Tensor):
        return value.is_floating_point()
    if _is_fused(node) or is_quantize(node):
        return False
    return reads_real or is_dequantize(node) or node.op == "placeholder"


def _is_expected(node: fx.Node) -> bool:
    """Whether a node may hold real values in an integer program: boundaries, parts of a list, fused operators."""
    return is_dequantize(node) or is_quantize(node) or _is_fused(node) or node.target is operator.getitem


def _is_fused(node: fx.Node) -> bool:
    called = overload(node.target) if node.op == "call_function" else None
    return called is not None and called.namespace == "qbench"

"""Every layer in every form of graph: codes against rational arithmetic, values against a bias put on its grid by hand.

A row is a layer; the forms are the program that torch.export makes, its module, its decomposition and ExecuTorch's edge
dialect.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from qdq_programs import (
    LAYERS,
    S_IN,
    bias_node,
    expected_codes,
    export,
    layer_nodes,
    make_layer,
    reload,
    run_lowered,
    scales_per_output,
    to_edge,
)
from torch import fx
from torch.export import ExportedProgram

from qbench.graph.dialect import is_edge, overload
from qbench.passes import QuantizeFusedConvBnBiasAtenPass, quantize_bias

pytestmark = pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec:FutureWarning")

INT32 = (-(2**31), 2**31 - 1, torch.int32)


def decompose(program: ExportedProgram) -> ExportedProgram:
    return program.run_decompositions()


FORMS: dict[str, Callable[[ExportedProgram], ExportedProgram | fx.GraphModule]] = {
    "program": lambda program: program,
    "module": lambda program: program.module(),
    "decomposed": decompose,
    "decomposed module": lambda program: decompose(program).module(),
}


# Decomposing takes half a second, and the dimensions share what it makes of them.
CASES = [
    *((name, form, per_tensor) for name in LAYERS for form in ("program", "module") for per_tensor in (False, True)),
    *((name, "decomposed", False) for name in LAYERS),
    ("linear", "decomposed", True),
    ("conv2d same", "decomposed module", False),
    ("conv_transpose2d grouped", "decomposed module", True),
]


@pytest.mark.parametrize(("name", "form", "per_tensor"), CASES)
def test_codes_and_values(name: str, form: str, per_tensor: bool) -> None:
    layer, x = make_layer(name, per_tensor=per_tensor)
    program = FORMS[form](export(layer, x))
    scales = scales_per_output(layer)
    report = quantize_bias(program)

    assert [len(part) for part in (report.quantized, report.refused, report.saturated, report.already)] == [1, 0, 0, 0]
    done = report.quantized[0]
    assert done.codes.dtype == torch.int32 and done.codes.tolist() == expected_codes(layer.bias, S_IN, scales)
    assert len(set(done.codes.tolist())) > 3
    steps = torch.tensor(S_IN) * scales
    assert torch.equal(done.scale.expand(layer.bias.shape), steps.expand(layer.bias.shape))

    (node,) = layer_nodes(program.graph)
    dequantize = bias_node(node)
    kind = "dequantize_per_tensor" if per_tensor else "dequantize_per_channel"
    assert overload(dequantize.target)._schema.name == f"quantized_decomposed::{kind}"
    assert tuple(dequantize.args[-3:]) == INT32

    call = program if isinstance(program, fx.GraphModule) else program.module()
    before = layer.bias.detach().clone()
    layer.bias.data = done.codes.float() * done.scale
    assert torch.equal(call(x), layer(x)) and not torch.equal(before, layer.bias)


@pytest.mark.parametrize(
    ("name", "form"), [("linear", "program"), ("conv2d", "decomposed"), ("conv_transpose2d grouped", "program")]
)
def test_program_stays_a_program(name: str, form: str) -> None:
    layer, x = make_layer(name)
    program = FORMS[form](export(layer, x))
    assert isinstance(program, ExportedProgram)
    inputs, outputs = program.graph_signature.user_inputs, program.graph_signature.user_outputs
    report = quantize_bias(program)
    program.validate()
    assert program.graph_signature.user_inputs == inputs and program.graph_signature.user_outputs == outputs
    # Nothing but the codes, the scale and the zero point: the float bias is gone.
    kinds = [spec.kind.name for spec in program.graph_signature.input_specs]
    assert kinds[-1] == "USER_INPUT" and kinds.count("USER_INPUT") == 1
    assert not any(value.dtype == torch.float32 and "scale" not in key for key, value in program.state_dict.items())
    assert program.state_dict["bias"].tolist() == report.quantized[0].codes.tolist()
    node = report.quantized[0].node
    assert program.state_dict[f"{node}_bias_zero_point"].dtype == torch.int64
    assert torch.equal(program.state_dict[f"{node}_bias_scale"], report.quantized[0].scale)
    again = reload(program)
    assert torch.equal(again.module()(x), program.module()(x))
    # What was exported once can be exported again.
    retraced = torch.export.export(program.module(), (x,), strict=False)
    assert torch.equal(retraced.module()(x), program.module()(x))


@pytest.mark.parametrize("form", ["program", "module"])
@pytest.mark.parametrize("zero", [False, True])
def test_second_run_changes_nothing(form: str, zero: bool) -> None:
    layer, x = make_layer("conv2d")
    program = FORMS[form](export(layer, x))
    assert quantize_bias(program, default_zero_bias=zero).modified
    before = str(program.graph)
    second = quantize_bias(program, default_zero_bias=zero)
    assert not second.modified and len(second.already) == 1 and str(program.graph) == before


@pytest.mark.parametrize(
    ("name", "form"), [*((name, "program") for name in LAYERS), ("linear", "decomposed"), ("conv2d", "module")]
)
def test_default_zero_bias(name: str, form: str) -> None:
    layer, x = make_layer(name, bias=False)
    program = FORMS[form](export(layer, x))
    expected = (program if isinstance(program, fx.GraphModule) else program.module())(x)
    left = quantize_bias(program)
    assert not left.modified and len(left.without_bias) == 1
    report = quantize_bias(program, default_zero_bias=True)
    assert report.quantized[0].added and not report.quantized[0].codes.any()
    assert report.quantized[0].codes.shape == (LAYERS[name][2],)
    assert bias_node(layer_nodes(program.graph)[0]) is not None
    call = program if isinstance(program, fx.GraphModule) else program.module()
    # A bias of zeros may choose another kernel: one output step at the most.
    assert (call(x) - expected).abs().max() <= 0.11 * 1.001
    assert not quantize_bias(program, default_zero_bias=True).modified


def test_class_is_called_both_ways() -> None:
    layer, x = make_layer("conv2d")
    program, module = export(layer, x), export(layer, x).module()
    with_program = QuantizeFusedConvBnBiasAtenPass(program)
    assert with_program.report is None
    result = with_program(program.graph_module)
    assert result.modified and result.graph_module is program.graph_module
    plain = QuantizeFusedConvBnBiasAtenPass()
    assert plain(module).modified and not plain(module).modified
    assert len(plain.report.already) == 1
    assert torch.equal(with_program.report.quantized[0].codes, program.state_dict["bias"])
    assert torch.equal(module(x), program.module()(x))


@pytest.mark.parametrize("name", ["linear", "conv1d", "conv2d", "conv2d same", "conv_transpose2d grouped"])
def test_edge_dialect(name: str) -> None:
    layer, x = make_layer(name)
    edge = to_edge(export(layer, x))
    program = edge.exported_program()
    expected = quantize_bias(aten := export(layer, x))
    report = quantize_bias(program)
    assert torch.equal(report.quantized[0].codes, expected.quantized[0].codes)
    (node,) = layer_nodes(program.graph)
    assert is_edge(node.target) and is_edge(bias_node(node).target)
    assert not quantize_bias(program).modified
    program.validate()
    assert list(program.graph_signature.user_inputs) == list(aten.graph_signature.user_inputs)
    assert torch.equal(program.module()(x), aten.module()(x))
    assert torch.equal(run_lowered(edge, x), aten.module()(x))
    # The other order: the pass first, lowering after it.
    assert torch.equal(run_lowered(to_edge(aten), x), aten.module()(x))


def test_as_a_pass_of_an_edge_program_manager() -> None:
    layer, x = make_layer("conv1d")
    edge = to_edge(export(layer, x))
    quantizer = QuantizeFusedConvBnBiasAtenPass(edge.exported_program())
    transformed = edge.transform([quantizer])
    program = transformed.exported_program()
    assert quantizer.report.quantized[0].codes.tolist() == expected_codes(layer.bias, S_IN, scales_per_output(layer))
    assert len(program.graph_signature.user_inputs) == 1
    assert torch.equal(run_lowered(transformed, x), program.module()(x))

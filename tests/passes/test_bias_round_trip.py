"""The codes that training used come back: from our pass, from ExecuTorch's, and from ours on a graph of torchao's."""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import pytest
import torch
from qdq_programs import (
    bias_node,
    expected_codes,
    import_quietly,
    layer_nodes,
    run_lowered,
    run_upstream,
    to_edge,
)
from torch import Tensor, nn

import qbench
from qbench.graph.constants import constants_of
from qbench.graph.edit import module_path
from qbench.graph.layers import read_layer
from qbench.graph.recognise import find_grid, is_dequantize, read_dequantize
from qbench.passes import quantize_bias

pytestmark = pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec:FutureWarning")


class Net(nn.Module):
    """Convolutions with BN, a depthwise one, a residual, a max pool and a flatten before the linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.depthwise = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.BatchNorm2d(16), nn.ReLU())
        self.point = nn.Sequential(nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16))
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(16 * 9, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(x + self.point(self.depthwise(x)))
        return self.head(self.pool(x).flatten(1))


@pytest.fixture(scope="module", params=["onnxruntime", "neutron"])
def trained(request: pytest.FixtureRequest) -> tuple[nn.Module, torch.export.ExportedProgram, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(32, 3, 8, 8)
    model = qbench.fuse(Net())
    model = qbench.prepare_qat(model, qconfig=qbench.get_qconfig(request.param), example_inputs=(x,))
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    target = torch.randint(0, 10, (32,))
    for _ in range(12):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), target).backward()
        optimizer.step()
    return model, qbench.convert(model.eval(), (x,)), x


def trained_codes(model: nn.Module) -> dict[str, list[int]]:
    modules = {path: module for path, module in model.named_modules() if hasattr(module, "parameter_codes")}
    return {path: module.parameter_codes().bias.tolist() for path, module in modules.items()}


@pytest.mark.parametrize("form", ["module", "program"])
def test_upstream_gives_the_trained_codes(trained: Any, form: str) -> None:
    model, program, _ = trained
    theirs = copy.deepcopy(program) if form == "program" else program.module()
    run_upstream(theirs)
    constants = constants_of(theirs)
    expected = trained_codes(model)
    found = {}
    for node in layer_nodes(theirs.graph):
        bias = bias_node(node)
        found[module_path(node)] = constants.get(bias.args[0]).tolist() if is_dequantize(bias) else None
    # It skips the linear layer; of the convolutions no code differs.
    assert len(found) == len(expected) == 4
    assert found.pop("head") is None
    assert found == {path: codes for path, codes in expected.items() if path in found}
    assert len({code for codes in found.values() for code in codes}) >= 40


@pytest.mark.parametrize("form", ["program", "module", "decomposed", "edge"])
def test_pass_gives_the_trained_codes(trained: Any, form: str) -> None:
    model, program, x = trained
    program = copy.deepcopy(program)
    expected = program.module()(x)
    edge = to_edge(program) if form == "edge" else None
    form_of: Any = {
        "program": lambda: program,
        "module": program.module,
        "decomposed": program.run_decompositions,
        "edge": lambda: edge.exported_program(),
    }[form]()
    report = quantize_bias(form_of, symmetric_quant=True)
    assert report.complete and not report.left_float and not report.without_bias
    assert sorted(layer.codes.tolist() for layer in report.quantized) == sorted(trained_codes(model).values())
    if form in ("program", "module"):
        assert {layer.path: layer.codes.tolist() for layer in report.quantized} == trained_codes(model)
    # The bias lay on its grid: no value of the output changes.
    call = form_of if form == "module" else form_of.module()
    assert torch.equal(call(x), expected)
    if edge is not None:
        lowered = run_lowered(edge, x)
        step = next(node.args[1] for node in reversed(program.graph.nodes) if is_dequantize(node))
        # Another convolution kernel: floats are summed in another order, so a code at a tie may move by one.
        assert (lowered - expected).abs().max() <= step * 1.001
        assert (lowered != expected).float().mean() < 0.02


def test_program_of_convert_is_saved_with_integer_biases(trained: Any) -> None:
    _, program, x = trained
    program = copy.deepcopy(program)
    expected = program.module()(x)
    quantize_bias(program)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file)
    assert torch.equal(loaded.module()(x), expected)
    assert loaded.graph_signature.user_inputs == program.graph_signature.user_inputs
    second = quantize_bias(loaded)
    assert not second.modified and len(second.already) == 4


class ConvBn(nn.Module):
    """A convolution without bias: training with PT2E gives it the BatchNorm's."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.linear = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.relu(self.bn(self.conv(x))).amax((2, 3)))


@pytest.fixture(scope="module", params=[True, False], ids=["per channel", "per tensor"])
def pt2e(request: pytest.FixtureRequest) -> tuple[torch.fx.GraphModule, Tensor]:
    quantizer = import_quietly("executorch.backends.xnnpack.quantizer.xnnpack_quantizer")
    ao = import_quietly("torchao.quantization.pt2e.quantize_pt2e")
    pt2e = import_quietly("torchao.quantization.pt2e")
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = quantizer.get_symmetric_quantization_config(is_qat=True, is_per_channel=request.param)
        module = torch.export.export(ConvBn(), (x,), strict=False).module()
        module = ao.prepare_qat_pt2e(module, quantizer.XNNPACKQuantizer().set_global(config))
        for _ in range(3):
            module(torch.randn(4, 3, 8, 8))
        pt2e.move_exported_model_to_eval(module)
        return ao.convert_pt2e(module), x


def by_hand(module: torch.fx.GraphModule) -> list[list[int]]:
    """Codes of each layer's bias by rational arithmetic on what the graph holds."""
    constants = constants_of(module)
    codes = []
    for node in layer_nodes(module.graph):
        layer = read_layer(node, constants)
        grid, weight = find_grid(layer.input, constants), read_dequantize(layer.weight, constants)
        codes.append(expected_codes(constants.get(layer.bias), float(grid.qparams.scale), weight.qparams.scale))
    return codes


@pytest.mark.slow
@pytest.mark.parametrize("form", ["module", "program"])
def test_graph_of_the_pt2e_flow(pt2e: Any, form: str) -> None:
    module, x = pt2e
    module = copy.deepcopy(module)
    expected = by_hand(module)
    before = module(x)
    theirs = copy.deepcopy(module)
    run_upstream(theirs)
    assert [is_dequantize(bias_node(node)) for node in layer_nodes(theirs.graph)] == [True, False]
    form_of: Any = module if form == "module" else torch.export.export(module, (x,), strict=False)
    report = quantize_bias(form_of)
    assert [layer.codes.tolist() for layer in report.quantized] == expected and report.complete
    upstream_bias = bias_node(layer_nodes(theirs.graph)[0]).args[0]
    assert constants_of(theirs).get(upstream_bias).tolist() == expected[0]
    call = form_of if form == "module" else form_of.module()
    step = next(node.args[1] for node in reversed(module.graph.nodes) if is_dequantize(node))
    assert (call(x) - before).abs().max() <= step * 1.001
    assert not quantize_bias(form_of).modified
    program = form_of if form == "program" else torch.export.export(module, (x,), strict=False)
    program.validate()
    assert torch.equal(program.module()(x), call(x))
    assert (run_lowered(to_edge(program), x) - call(x)).abs().max() <= step * 1.001


@pytest.mark.slow
@pytest.mark.parametrize(("name", "convolutions", "count"), [("resnet18", 20, 4800), ("mobilenet_v2", 52, 17056)])
def test_trained_codes_of_whole_networks(name: str, convolutions: int, count: int) -> None:
    from qbench._torchvision import import_torchvision

    model = getattr(import_torchvision().models, name)(num_classes=10)
    x = torch.randn(4, 3, 64, 64)
    model = qbench.prepare_qat(qbench.fuse(model), qconfig=qbench.get_qconfig("onnxruntime"), example_inputs=(x,))
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.randn_like(x)), torch.randint(0, 10, (4,))).backward()
        optimizer.step()
    program = qbench.convert(model.eval(), (x,))
    expected, value, theirs = trained_codes(model), program.module()(x), program.module()
    run_upstream(theirs)
    constants = constants_of(theirs)
    found = {
        module_path(node): constants.get(bias_node(node).args[0]).tolist()
        for node in layer_nodes(theirs.graph)
        if is_dequantize(bias_node(node))
    }
    assert len(found) == convolutions and sum(map(len, found.values())) == count
    assert all(codes == expected[path] for path, codes in found.items())
    report = quantize_bias(program)
    assert {layer.path: layer.codes.tolist() for layer in report.quantized} == expected and report.complete
    assert torch.equal(program.module()(x), value)

"""convert: the form of the program, what of it survives a file, and what is refused.

Programs are read here with torch's own means, not with qbench's readers.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import (
    VALUE_OPS,
    Branchy,
    Calls,
    Gated,
    SmallNet,
    TwoHeads,
    assert_exact,
    conv_bn,
    deployed_layers,
    evaluate,
    images,
    is_dq,
    is_q,
    leaves,
    op_name,
    prepared,
    randomise_statistics,
    train,
)
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.nn import functional as F

import qbench
from qbench import targets
from qbench.errors import ConfigError, ConversionError, LinkError, NumericsError
from qbench.nn.qat.kinds import BatchNormKind
from qbench.nn.qat.layer import QatLayer

# Models that are not fused leave their BatchNorm in float, and preparation says so.
pytestmark = pytest.mark.filterwarnings("ignore:prepare_qat leaves:qbench.errors.QBenchWarning")


class Ways(nn.Module):
    """Between two layers stand max pool, flatten and dropout; there are two inputs and an average."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(*conv_bn(3, 4), nn.ReLU6())
        self.b = nn.ConvTranspose2d(3, 4, 3, padding=1)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(4 * 36, 5)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, list[Tensor]]:
        a, b = F.max_pool2d(self.a(x), 2), F.avg_pool2d(self.b(y), 2)
        return self.fc(self.drop(torch.flatten(a + b, 1))), [a * b]


MODELS: dict[str, Callable[[], nn.Module]] = {
    "residual": SmallNet,
    "gated": Gated,
    "two heads": TwoHeads,
    "ways": Ways,
    "unfused": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3)),
}


def inputs_of(name: str, **options: Any) -> tuple[Tensor, ...]:
    return (images(**options), images(**options) * 0.5) if name == "ways" else (images(**options),)


@pytest.fixture(scope="module")
def made() -> Callable[[str], tuple[nn.Module, ExportedProgram]]:
    """A trained model and its program, by name; made once."""
    cache: dict[str, tuple[nn.Module, ExportedProgram]] = {}

    def make(name: str) -> tuple[nn.Module, ExportedProgram]:
        if name not in cache:
            torch.manual_seed(0)
            model = randomise_statistics(MODELS[name]())
            inputs = inputs_of(name)
            fuse = (lambda m: m) if name == "unfused" else qbench.fuse
            prepare = qbench.prepare_qat(fuse(model), qconfig=qbench.get_qconfig(), example_inputs=inputs)
            trained = train(prepare, *inputs)
            cache[name] = trained, qbench.convert(trained, inputs)
        return cache[name]

    return make


Made = Callable[[str], tuple[nn.Module, ExportedProgram]]


@pytest.mark.parametrize("name", MODELS)
class TestForm:
    def test_it_is_valid_and_exact(self, made: Made, name: str) -> None:
        model, program = made(name)
        program.validate()
        assert_exact(model, program, *inputs_of(name, seed=3))

    def test_its_inputs_and_outputs_are_the_users(self, made: Made, name: str) -> None:
        model, program = made(name)
        given = inputs_of(name)
        assert len(program.graph_signature.user_inputs) == len(given)
        expected = evaluate(model, *given)
        assert len(program.graph_signature.user_outputs) == len(leaves(expected))
        found = program.module()(*given)
        # The module that a program makes has its lists and dictionaries immutable.
        assert _plain(found, Tensor) == _plain(expected, Tensor)
        assert {leaf.dtype for leaf in leaves(found)} == {torch.float32}
        signature = program.graph_signature
        assert not signature.buffers_to_mutate
        assert not signature.user_inputs_to_mutate

    def test_every_layer_has_dq_at_input_and_weight_and_a_bias_on_its_grid(self, made: Made, name: str) -> None:
        model, program = made(name)
        layers = deployed_layers(program)
        assert set(layers) == {path for path, module in model.named_modules() if isinstance(module, QatLayer)}
        for path, layer in layers.items():
            assert layer.weight.dtype == torch.int8
            assert (int(layer.weight.min()), int(layer.weight.max())) >= (-127, 0)
            # The factor of a BatchNorm alone lies in its scales.
            alone = isinstance(model.get_submodule(path), BatchNormKind)
            assert set(layer.weight.unique().abs().tolist()) == {127} if alone else layer.weight.unique().numel() > 10
            assert layer.bias.dtype == torch.float32
            scale = layer.bias_scale()
            codes = torch.round(layer.bias.double() / scale.double())
            assert torch.equal(codes.float() * scale, layer.bias), path
            assert codes.abs().max() <= 2**22

    def test_every_quantized_operation_stands_between_dq_and_q(self, made: Made, name: str) -> None:
        _, program = made(name)
        checked = 0
        for node in program.graph.nodes:
            if op_name(node) in VALUE_OPS and "nn_module_stack" in node.meta and _is_quantized(node):
                assert all(is_dq(source) for source in node.all_input_nodes), node
                assert is_q(_after_relu(node)), node
                checked += 1
        for layer in deployed_layers(program).values():
            assert is_q(_after_relu(layer.node))
        assert checked == {"residual": 2, "gated": 2, "two heads": 1, "ways": 3, "unfused": 0}[name]

    def test_outputs_are_dequantized_codes(self, made: Made, name: str) -> None:
        _, program = made(name)
        (output,) = (node for node in program.graph.nodes if node.op == "output")
        assert all(is_dq(node) for node in output.all_input_nodes)

    def test_no_pair_is_redundant(self, made: Made, name: str) -> None:
        _, program = made(name)
        seen = set()
        for node in program.graph.nodes:
            if is_q(node):
                assert not (is_dq(node.args[0]) and node.args[0].args[1:] == node.args[1:])
            if is_q(node) or is_dq(node):
                assert (node.target, node.args) not in seen
                seen.add((node.target, node.args))
                assert node.users

    def test_nothing_that_nobody_reads_is_stored(self, made: Made, name: str) -> None:
        _, program = made(name)
        read = {node.name for node in program.graph.nodes if node.op == "placeholder" and node.users}
        for spec in program.graph_signature.input_specs:
            assert spec.arg.name in read
        targets_ = {spec.target for spec in program.graph_signature.input_specs if spec.target}
        assert targets_ == {*program.state_dict, *program.constants}


def _plain(value: Any, leaf: type) -> Any:
    """Nested lists, tuples and dictionaries with the shapes of their tensors."""
    if isinstance(value, leaf):
        return tuple(value.shape)
    if isinstance(value, dict):
        return {key: _plain(item, leaf) for key, item in value.items()}
    return (isinstance(value, tuple), [_plain(item, leaf) for item in value])


def _is_quantized(node: fx.Node) -> bool:
    """Whether an operation is inside the deployed form of a QAT module, and not left in float."""
    return any("Reference" in kind for _, kind in node.meta["nn_module_stack"].values())


def _after_relu(node: fx.Node) -> fx.Node:
    (user,) = node.users
    return _after_relu(user) if op_name(user) in ("relu", "hardtanh", "relu6") else user


def test_a_scale_preserving_way_has_the_same_grid_at_both_ends(made: Made) -> None:
    _, program = made("residual")
    (pool,) = (node for node in program.graph.nodes if op_name(node) == "max_pool2d")
    (after,) = pool.users
    assert is_dq(pool.args[0])
    assert is_q(after)
    assert pool.args[0].args[1:] == after.args[1:]


FRESH = """
import sys, torch
from qbench.graph.qdq import quantized_decomposed
quantized_decomposed()  # torch itself does not register the operators
folder = sys.argv[1]
for name in sys.argv[2:]:
    program = torch.export.load(f"{folder}/{name}.pt2")
    program.validate()
    out = program.module()(*torch.load(f"{folder}/{name}.inputs", weights_only=True))
    target = program.graph_module.meta["custom"]["qbench"]["target"]
    torch.save({"outputs": torch.utils._pytree.tree_leaves(out), "target": target,
                "inputs": len(program.graph_signature.user_inputs)}, f"{folder}/{name}.outputs")
"""


def test_programs_survive_files_and_a_fresh_process(made: Made, tmp_path: Path) -> None:
    for name in MODELS:
        torch.export.save(made(name)[1], tmp_path / f"{name}.pt2")
        torch.save(inputs_of(name, seed=3), tmp_path / f"{name}.inputs")
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(tmp_path), *MODELS], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    for name in MODELS:
        found = torch.load(tmp_path / f"{name}.outputs", weights_only=True)
        expected = leaves(evaluate(made(name)[0], *inputs_of(name, seed=3)))
        assert all(torch.equal(a, b) for a, b in zip(found["outputs"], expected, strict=True)), name
        assert found["target"] == "onnxruntime"
        assert found["inputs"] == len(inputs_of(name))


@pytest.mark.parametrize("name", ["residual", "two heads"])
def test_convert_leaves_the_model_as_it_was(made: Made, name: str) -> None:
    model, program = made(name)
    model.train()
    model.apply(qbench.freeze_bn_stats)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    kinds = [type(module) for module in model.modules()]
    again = qbench.convert(model, inputs_of(name))
    assert [module.training for module in model.modules()] == modes
    assert [type(module) for module in model.modules()] == kinds
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    # In training mode or not, the same program comes of it; and it shares no memory with the model.
    assert str(again.graph) == str(program.graph)
    for value in again.state_dict.values():
        value.detach().zero_()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_dynamic_batch(made: Made, tmp_path: Path) -> None:
    model, _ = made("residual")
    program = qbench.convert(model, (images(),), dynamic_shapes={"x": {0: torch.export.Dim("batch", min=1, max=64)}})
    torch.export.save(program, tmp_path / "dynamic.pt2")
    reloaded = torch.export.load(tmp_path / "dynamic.pt2")
    for batch in (1, 4, 7):
        assert_exact(model, program, images(batch, seed=3))
        assert_exact(model, reloaded, images(batch, seed=3))


@pytest.mark.filterwarnings("ignore:prepare_qat leaves:qbench.errors.QBenchWarning")
@pytest.mark.parametrize("target", targets.names())
def test_the_target_is_that_of_the_qconfig_and_may_be_told(target: str) -> None:
    # A linear layer too: some targets quantize nothing else.
    layers = (nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    model = prepared(nn.Sequential(*layers), images(), qconfig=qbench.get_qconfig(target))
    custom = qbench.convert(model, (images(),)).graph_module.meta["custom"]["qbench"]
    assert custom["target"] == target
    told = qbench.convert(model, (images(),), target="xnnpack")
    assert told.graph_module.meta["custom"]["qbench"]["target"] == "xnnpack"


@pytest.mark.parametrize("target", targets.names())
def test_every_operator_carries_the_annotation_of_the_target(made: Made, target: str, tmp_path: Path) -> None:
    model, _ = made("residual")
    program = qbench.convert(model, (images(),), target=target)
    torch.export.save(program, tmp_path / "program.pt2")
    expected = {"quantized": True} if target == "tosa" else None
    for found in (program, torch.export.load(tmp_path / "program.pt2")):
        calls = [node for node in found.graph.nodes if node.op == "call_function"]
        quantizers = [node for node in calls if "quantize_per_" in op_name(node)]
        assert len(calls) > len(quantizers) > 0
        for node in calls:
            told = node.meta.get("custom", {}).get("_arm_annotation_info")
            assert told == (None if node in quantizers else expected), node


def test_each_path_of_a_branch_is_exported_alone() -> None:
    examples = [(images(), True), (images(), False)]
    model = qbench.prepare_qat(Branchy(), qconfig=qbench.get_qconfig(), example_inputs=examples)
    for example in examples * 2:
        model.train()(*example)
    for cond, layers in ((True, {"conv1", "conv3"}), (False, {"conv2", "conv3"})):
        program = qbench.convert(model.eval(), (images(), cond))
        assert set(deployed_layers(program)) == layers
        assert_exact(model, program, images(seed=3), cond)


# What is refused. Each case makes a model that is right but for one thing.


def _ready(model: nn.Module | None = None, **options: Any) -> nn.Module:
    return prepared(SmallNet() if model is None else model, images(), **options)


def _set(model: nn.Module, path: str, value: float) -> nn.Module:
    owner, _, name = path.rpartition(".")
    with torch.no_grad():
        getattr(model.get_submodule(owner), name).view(-1)[0] = value
    return model


class AsksTheData(nn.Module):
    """A branch that depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y if y.mean() > 0 else -y


class LeavesTorch(nn.Module):
    """Uses numpy on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(torch.from_numpy(x.detach().numpy() + 1))


def _wide_sum() -> tuple[nn.Module, Tensor]:
    """70,000 products of 127 · 255: more than an accumulator of 32 bits holds."""
    model = nn.Sequential(nn.Linear(70_000, 2))
    nn.init.ones_(model[0].weight)
    x = torch.rand(2, 70_000)
    return prepared(model, x, qconfig=qbench.get_qconfig()), x


def _narrow_accumulator() -> tuple[nn.Module, Tensor]:
    target = dataclasses.replace(targets.get("onnxruntime"), name="narrow", accumulator_bits=18)
    return _ready(nn.Sequential(nn.Conv2d(3, 4, 3)), qconfig=qbench.get_qconfig(target)), images()


def _two_targets() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    model[0].qconfig, model[1].qconfig = qbench.get_qconfig("onnxruntime"), qbench.get_qconfig("xnnpack")
    return prepared(model, images(), qconfig=qbench.get_qconfig())


def _fresh() -> nn.Module:
    return qbench.prepare_qat(SmallNet(), qconfig=qbench.get_qconfig(), example_inputs=(images(),))


def _huge_bias() -> nn.Module:
    """Behind an input of the smallest scale there is, no weight scale in float32 makes room for this bias."""
    model = _set(_ready(nn.Sequential(nn.Conv2d(3, 4, 3))), "0.bias", 1e30)
    return _set(model, "0.input_quantizers.0.scale", 2.0**-100)


def _unlinked() -> nn.Module:
    model = qbench.prepare_qat(Branchy(), qconfig=qbench.get_qconfig(), example_inputs=(images(), True))
    model(images(), True)
    return model


REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], tuple[str, ...]]] = {
    "a float model": (
        lambda: qbench.convert(SmallNet(), (images(),)),
        ConversionError,
        ("SmallNet has no QAT module", "prepare_qat"),
    ),
    "a fused model": (lambda: qbench.convert(qbench.fuse(SmallNet()), (images(),)), ConversionError, ("prepare_qat",)),
    "a tensor": (lambda: qbench.convert(_ready(), images()), ConfigError, ("Tensor", "convert(model, (x,))")),
    "an unknown target": (
        lambda: qbench.convert(_ready(), (images(),), target="onnx"),
        ConfigError,
        ("'onnx' is unknown", "onnxruntime"),
    ),
    "no data": (
        lambda: qbench.convert(_fresh(), (images(),)),
        NumericsError,
        ("conv1.output_quantizer has seen no data", "training mode"),
    ),
    "not recorded": (
        lambda: qbench.convert(qbench.prepare_qat(SmallNet(), qconfig=qbench.get_qconfig()), (images(),)),
        LinkError,
        ("conv1", "example_inputs"),
    ),
    "not reached": (lambda: qbench.convert(_unlinked(), (images(), True)), LinkError, ("conv2", "example_inputs=[")),
    "fake-quant off": (
        lambda: qbench.convert(_ready().apply(qbench.disable_fake_quant), (images(),)),
        NumericsError,
        ("conv1", "model.apply(qbench.enable_fake_quant)"),
    ),
    "NaN scale": (
        lambda: qbench.convert(_set(_ready(), "conv2.output_quantizer.scale", float("nan")), (images(),)),
        NumericsError,
        ("conv2.output_quantizer", "nan", "positive and finite"),
    ),
    "infinite scale": (
        lambda: qbench.convert(_set(_ready(), "add.output_quantizer.scale", float("inf")), (images(),)),
        NumericsError,
        ("add.output_quantizer", "inf"),
    ),
    "NaN scale of the input": (
        lambda: qbench.convert(_set(_ready(), "conv1.input_quantizers.0.scale", float("nan")), (images(),)),
        NumericsError,
        ("conv1.input_quantizers.0", "nan"),
    ),
    "NaN weight": (
        lambda: qbench.convert(_set(_ready(), "fc.weight", float("nan")), (images(),)),
        NumericsError,
        ("fc.weight", "nan"),
    ),
    "infinite statistic": (
        lambda: qbench.convert(_set(_ready(), "conv3.bn.running_mean", float("inf")), (images(),)),
        NumericsError,
        ("conv3", "running_mean", "inf"),
    ),
    "branch on data": (
        lambda: qbench.convert(_ready(AsksTheData()), (images(),)),
        ConversionError,
        ("AsksTheData", "export one path", "torch.cond"),
    ),
    "leaves torch": (
        lambda: qbench.convert(_ready(LeavesTorch()), (images(),)),
        ConversionError,
        ("LeavesTorch cannot be exported", "torch.export.export"),
    ),
    "inputs that do not fit": (
        lambda: qbench.convert(_ready(), (torch.zeros(1, 5, 12, 12),)),
        ConversionError,
        ("cannot be exported", "channels"),
    ),
    "two targets": (
        lambda: qbench.convert(_two_targets(), (images(),)),
        ConversionError,
        ("onnxruntime", "xnnpack", "target="),
    ),
    "accumulator": (
        lambda: (lambda m, x: qbench.convert(m, (x,)))(*_wide_sum()),
        ConversionError,
        ("0: output channel", "|accumulator| = 2", "32 bits", "weight_bits=4"),
    ),
    "a target's accumulator": (
        lambda: (lambda m, x: qbench.convert(m, (x,)))(*_narrow_accumulator()),
        ConversionError,
        ("18 bits of target narrow",),
    ),
    "a bias that does not fit": (
        lambda: qbench.convert(_huge_bias(), (images(),)),
        NumericsError,
        ("0: the bias 1e+30 of output channel 0 does not fit", "bias_scale='own'"),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    call, kind, words = REFUSED[name]
    with pytest.raises(kind) as error:
        call()
    assert all(word in str(error.value) for word in words), error.value


def test_the_way_out_of_a_branch_works() -> None:
    """One path as a module, as the message says."""

    class Positive(nn.Module):
        def __init__(self, whole: nn.Module) -> None:
            super().__init__()
            self.conv = whole.conv

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x)

    model = _ready(AsksTheData())
    path = Positive(model).eval()
    assert_exact(path, qbench.convert(path, (images(),)), images(seed=3))


def test_a_fuller_accumulator_fits_with_fewer_bits() -> None:
    """The way out that the message names."""
    model = nn.Sequential(nn.Linear(70_000, 2))
    nn.init.ones_(model[0].weight)
    x = torch.rand(2, 70_000)
    model = prepared(model, x, qconfig=qbench.get_qconfig(weight_bits=4))
    assert_exact(model, qbench.convert(model, (x,)), x)


def test_a_model_in_the_middle_of_a_graph_is_prepared_whole() -> None:
    """A part that stays float is exported with the rest."""
    model = Calls(lambda m, x: F.layer_norm(m.a(x), [4, 10, 10]).sigmoid() * 2, a=nn.Conv2d(3, 4, 3))
    model = prepared(model, images())
    assert_exact(model, qbench.convert(model, (images(),)), images(seed=3))

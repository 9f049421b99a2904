"""docs/migration.md: the calls of its tables are read from the page and run, and its names exist."""

from __future__ import annotations

import copy
import fnmatch
import functools
import importlib
import operator
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import images
from torch import nn
from torch_ao_models import QUIET, Block, ao

import qbench
from qbench import mappings
from qbench.fake_quantize import FakeQuantize
from qbench.nn import intrinsic as nni
from qbench.nn.intrinsic import qat as nniqat
from qbench.nn.qat.body import QatModule

pytestmark = [
    *QUIET,
    pytest.mark.filterwarnings("ignore:torch.ao.quantization.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
]

PAGE = (Path(__file__).parents[2] / "docs" / "migration.md").read_text(encoding="utf-8")

Row = tuple[str, ...]


def table(heading: str) -> list[Row]:
    """The rows of the table below a heading, without its head."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|")]
    return [tuple(cell.strip() for cell in row) for row in rows[2:]]


def code(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def call(cell: str) -> str:
    """The only piece of code of a cell."""
    (only,) = code(cell)
    return only


class MyConv(nn.Conv2d):
    """A user's own layer."""


class QatMyConv(qbench.nn.qat.Conv2d):
    float_type = MyConv


class ConvBnMish2d(nni.Fused):
    part_types = (nn.Conv2d, nn.BatchNorm2d, nn.Mish)


class QatConvBnMish2d(nniqat.ConvBn2d):
    float_type = ConvBnMish2d
    activation = nn.Mish


class Chain(nn.Module):
    """Two layers that can be balanced, in a module that can be a block."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.relu1 = nn.Conv2d(3, 8, 3), nn.ReLU()
        self.conv2 = nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv2(self.relu1(self.conv1(x)))

    def fuse_model(self) -> nn.Module:
        return self


class Staged(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stage, self.last = Chain(), nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.stage(x).relu())


class MyBlock(Block):
    """Not traceable: its path depends on a value."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x if x.sum() > -1e9 else -x)


class Branchy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)

    def forward(self, x: torch.Tensor, cond: bool) -> torch.Tensor:
        return self.a(x) if cond else self.b(x)


# How the model of a row is made, where that is not Block: a part of the row's code, and the model.
MODELS: dict[str, Callable[[], nn.Module]] = {
    "MyConv": lambda: nn.Sequential(MyConv(3, 4, 1), nn.ReLU()),
    "MyBlock": MyBlock,
    "equaliz": Chain,
    'pattern="block"': Staged,
}


def float_model(row: Row) -> nn.Module:
    make = next((made for part, made in MODELS.items() if part in row[0]), Block)
    model = make().train()
    model.classes = ["a", "b"]
    return model


@functools.cache
def trained_twin() -> dict[str, torch.Tensor]:
    """State of the QAT twin in torch.ao."""
    model = Block().train().fuse_model()
    model.qconfig = ao.get_default_qat_qconfig("onednn")
    model = ao.prepare_qat(model)
    model(images())
    return model.state_dict()


def before(row: Row) -> dict[str, Any]:
    """What a call of torch.ao finds."""
    names = {name: getattr(ao, name) for name in dir(ao) if not name.startswith("_")}
    names["prepare_qat_fx"] = importlib.import_module("torch.ao.quantization.quantize_fx").prepare_qat_fx
    qconfig = ao.get_default_qat_qconfig("onednn")
    model, fused = float_model(row), float_model(row).fuse_model()
    fused.qconfig = qconfig
    qat = ao.prepare_qat(fused)
    qat(images())
    conv = nn.Conv2d(3, 4, 1)
    conv.qconfig = qconfig
    given = fused if "prepare_qat(" in row[0] else model
    for name in ("_equalize", "_correct_bias"):
        importlib.import_module(f"torch.ao.quantization.{name}")
    if "bias_correction" in row[0]:
        given = ao.fuse_modules(model.eval(), [["conv1", "bn1", "relu1"], ["conv2", "bn2"]])
        names["quantized"] = converted(given)
        names["biases"] = biases(names["quantized"])
    return names | {"torch": torch, "nn": nn, "model": given, "qat": qat, "conv": conv, "qconfig": qconfig,
                    "x": images(), "state": trained_twin()}  # fmt: skip


def converted(model: nn.Module) -> nn.Module:
    """What torch.ao converts the model to, in post-training quantization."""
    model = copy.deepcopy(model)
    model.qconfig = ao.get_default_qconfig("fbgemm")
    model = ao.prepare(model)
    model(images())
    return ao.convert(model)


def biases(model: nn.Module) -> list[torch.Tensor]:
    return [m.bias().clone() for m in model.modules() if callable(getattr(m, "bias", None))]


def after(row: Row) -> dict[str, Any]:
    """What a call of qbench finds; it may name torch.ao's qconfigs."""
    model = float_model(row)
    fused = qbench.fuse(model)
    fused.qconfig = qbench.get_qconfig()
    qat = qbench.prepare_qat(fused, example_inputs=(images(),)) if type(model) in (Block, Staged) else None
    if qat is not None:
        qat(images())
    conv = nn.Conv2d(3, 4, 1)
    conv.qconfig = qbench.get_qconfig()
    given = fused if "prepare_qat(" in row[1] else model
    return {"torch": torch, "nn": nn, "qbench": qbench, "model": given, "qat": qat, "conv": conv, "x": images(),
            "state": trained_twin(), "branchy": Branchy(), "MyConv": MyConv, "QatMyConv": QatMyConv,
            "QatConvBnMish2d": QatConvBnMish2d, "get_default_qat_qconfig": ao.get_default_qat_qconfig}  # fmt: skip


def run(source: str, namespace: dict[str, Any]) -> SimpleNamespace:
    exec(compile(source, "docs/migration.md", "exec"), namespace)
    return SimpleNamespace(**{name: value for name, value in namespace.items() if name.isidentifier()})


def kind(model: nn.Module, path: str) -> str:
    return type(model.get_submodule(path)).__name__


def flags(model: nn.Module, name: str) -> set[bool]:
    return {getattr(q, name) for q in model.modules() if isinstance(q, FakeQuantize)}


def their_flags(model: nn.Module, name: str) -> set[bool]:
    return {bool(q.state_dict()[name]) for q in model.modules() if isinstance(q, ao.FakeQuantizeBase)}


def switch(name: str, value: bool) -> Callable[..., bool]:
    return lambda old, new: their_flags(old.qat, name) == flags(new.qat, name) == {value}


def weights(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters() if name.endswith("weight")}


def frozen(model: nn.Module) -> set[bool]:
    return {module.bn_frozen for module in model.modules() if getattr(module, "bn", None) is not None}


def fuses(*paths: str) -> Callable[..., bool]:
    return lambda old, new: all(kind(old.model, path) == kind(new.model, path) != "Conv2d" for path in paths)


def magnitude(weight: torch.Tensor, axis: int) -> torch.Tensor:
    return weight.movedim(axis, 0).flatten(1).abs().amax(1)


def width(weight: torch.Tensor, axis: int) -> torch.Tensor:
    low, high = weight.movedim(axis, 0).flatten(1).aminmax(dim=1)
    return high - low


def balanced(first: nn.Module, second: nn.Module, span: Callable[..., torch.Tensor] = magnitude) -> bool:
    """Whether the ranges of the channels between two layers are equal."""
    return torch.allclose(span(first.weight, 0), span(second.weight, 1), rtol=1e-3)


def corrected(report: Any) -> bool:
    return sum(layer.after for layer in report.layers) < sum(layer.before for layer in report.layers)


def learned(blocks: int) -> Callable[[Any], bool]:
    return lambda new: (
        len(new.report.blocks) == blocks and all(block.after <= block.before for block in new.report.blocks)
    )


def spec(qconfig: Any) -> Any:
    return qbench.translate_qconfig(qconfig).activation.spec


# A part of the old call → what must hold of the names that both sides end with.
TORCH_AO: dict[str, Callable[[Any, Any], bool]] = {
    '"relu1"]])': fuses("conv1"),
    '["conv2", "bn2"]])': fuses("conv1", "conv2"),
    'model.qconfig = get_default_qat_qconfig("x86")': lambda old, new: (
        (spec(old.model.qconfig).bits, spec(new.model.qconfig).bits) == (7, 8)
    ),
    "qnnpack": lambda old, new: (
        qbench.translate_qconfig(old.model.qconfig).weight.spec.axis is None
        and (new.model.qconfig.target, new.model.qconfig.weight.spec.axis) == ("xnnpack", 0)
    ),
    "onednn": lambda old, new: spec(old.qconfig) == new.qconfig.activation.spec and new.qconfig.target == "onnxruntime",
    "FakeQuantize.with_args": lambda old, new: spec(old.qconfig) == new.qconfig.activation.spec,
    "model.fc.qconfig": lambda old, new: (
        kind(qbench.prepare_qat(qbench.fuse(new.model), qconfig=qbench.get_qconfig(), example_inputs=(new.x,)), "fc")
        == "Linear" and old.model.fc.qconfig is None
    ),
    "prepare_qat(model)": lambda old, new: weights(old.qat) == weights(new.qat),
    "mapping={": lambda old, new: (
        isinstance(new.qat.fc, qbench.nn.qat.Linear) and isinstance(old.qat.fc, torch.ao.nn.qat.Linear)
    ),
    "prepare_qat_fx": lambda old, new: weights(old.qat) == weights(new.qat) and isinstance(new.qat, Block),
    "QConfigMapping": lambda old, new: (
        type(new.qat.fc) is nn.Linear
        and kind(qbench.prepare_qat(qbench.fuse(new.model), qconfig=old.mapping, example_inputs=(new.x,)), "fc")
        == "Linear"
    ),
    "disable_observer": switch("observer_enabled", False),
    "enable_observer": switch("observer_enabled", True),
    "disable_fake_quant": switch("fake_quant_enabled", False),
    "enable_fake_quant": switch("fake_quant_enabled", True),
    "freeze_bn_stats": lambda old, new: (
        frozen(new.qat) == {True} and not any(m.training for m in old.qat.modules() if isinstance(m, nn.BatchNorm2d))
    ),
    "update_bn_stats": lambda old, new: frozen(new.qat) == {False},
    "load_state_dict": lambda old, new: (
        [found.key for found in new.report.keys] == list(old.state)
        and torch.equal(new.qat.fc.weight, old.qat.fc.weight)
    ),
    "from_float": lambda old, new: old.layer.weight.shape == new.layer.weight.shape,
    "convert(": lambda old, new: torch.equal(new.program.module()(new.x), new.qat(new.x)),
    "QuantStub()": lambda old, new: torch.equal(old.stub(old.x), new.stub(new.x)),
    "QuantWrapper": lambda old, new: new.wrapped is new.model,
    "FloatFunctional": lambda old, new: torch.equal(old.y, new.y),
    "_equalize": lambda old, new: (
        balanced(old.model.conv1, old.model.conv2, width) and balanced(new.fused.conv1[0], new.fused.conv2)
    ),
    "_correct_bias": lambda old, new: (
        not all(map(torch.equal, biases(old.quantized), old.biases)) and corrected(new.report)
    ),
}  # fmt: skip


def has_target(name: str) -> Callable[[Any], bool]:
    return lambda new: new.target.name == name


def calibrating(new: Any) -> bool:
    held = {name: value.clone() for name, value in new.qat.named_buffers() if "running_" in name}
    new.qat(new.x)
    same = all(torch.equal(value, dict(new.qat.named_buffers())[name]) for name, value in held.items())
    return same and flags(new.qat, "observer_enabled") == {True} and flags(new.qat, "fake_quant_enabled") == {False}


def made_by(method: str) -> Callable[[Any], bool]:
    def check(new: Any) -> bool:
        fc = new.qat.fc
        return {type(fc.output_quantizer).__name__, type(fc.weight_quantizer).__name__} == {method}

    return check


MQBENCH: dict[str, Callable[[Any], bool]] = {
    "prepare_by_platform(": lambda new: new.qat.conv1.qconfig.target == "tensorrt",
    "OPENVINO": has_target("openvino"),
    "BackendType.SNPE": has_target("snpe"),
    "BackendType.Vitis": has_target("vitis"),
    "ONNX_QNN": has_target("onnxruntime"),
    "Academic": has_target("academic"),
    "w_qscheme": lambda new: (new.qconfig.weight.spec.bits, new.qconfig.weight.spec.axis) == (4, 0),
    "a_observer": lambda new: new.qconfig.activation.observer is qbench.observers.MovingAverageMinMaxObserver,
    "w_observer": lambda new: new.qconfig.weight.observer is qbench.observers.LatestMSEObserver,
    "LearnableFakeQuantize": made_by("LSQ"),
    "PACTFakeQuantize": lambda new: (
        (new.qconfig.activation.fake_quantize, new.qconfig.weight.fake_quantize)
        == (qbench.fake_quantize.PACT, FakeQuantize)
    ),
    "exclude_module_name": lambda new: type(new.qat.fc) is nn.Linear and isinstance(new.qat.conv1, QatModule),
    "exclude_function_type": lambda new: not isinstance(new.qat.skip_add, QatModule),
    "additional_module_type": lambda new: isinstance(new.qat[0], QatMyConv),
    "additional_fusion_pattern": lambda new: (
        type(qbench.fuse(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Mish()))[0]) is ConvBnMish2d
    ),
    "leaf_module": lambda new: isinstance(new.fused, MyBlock),
    "preserve_attr": lambda new: new.classes == ["a", "b"],
    "concrete_args": lambda new: qbench.preparation_report(new.qat).unreached == (),
    "enable_calibration(": calibrating,
    "enable_quantization(": lambda new: (
        flags(new.qat, "observer_enabled") == {False} and flags(new.qat, "fake_quant_enabled") == {True}
    ),
    "disable_all(": lambda new: flags(new.qat, "observer_enabled") == flags(new.qat, "fake_quant_enabled") == {False},
    "enable_calibration(model.eval())": lambda new: (
        new.report.batches == 1 and not new.report.without_grid and flags(new.qat, "fake_quant_enabled") == {True}
    ),
    'pattern="layer"': learned(3),
    'pattern="block"': lambda new: learned(1)(new) and new.report.blocks[0].layers == ("stage.conv1", "stage.conv2"),
    "prob=0.5": learned(3),
    "get_weight_equalization_groups": lambda new: balanced(new.fused.conv1[0], new.fused.conv2),
    "load_state_dict": lambda new: len(new.report.keys) == len(new.state),
    "model_name=": lambda new: Path("net.onnx").stat().st_size > 1000,
    "deploy_to_qlinear": lambda new: len(new.report.fused) > 3,
}  # fmt: skip


def check_of(checks: dict[str, Any], row: Row) -> Any:
    """The check of a row: the longest key that its old call contains."""
    found = sorted((key for key in checks if key in row[0]), key=len)
    assert found, f"no check for the row {row[0]}"
    return checks[found[-1]]


def slowly(rows: list[Row]) -> list[Any]:
    """Exporting takes seconds."""
    return [pytest.param(row, marks=pytest.mark.slow) if "to_onnx" in row[1] else row for row in rows]


@pytest.mark.parametrize("row", table("torch.ao.quantization, call by call"), ids=lambda row: row[0][1:50])
def test_rows_of_torch_ao_do_what_they_say(row: Row) -> None:
    old, new = run(call(row[0]), before(row)), run(call(row[1]), after(row))
    assert check_of(TORCH_AO, row)(old, new)


@pytest.mark.parametrize("row", slowly(table("MQBench, call by call")), ids=lambda row: row[0][1:50])
def test_rows_of_mqbench_do_what_they_say(row: Row, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mappings, "_REGISTERED", [])
    compile(call(row[0]), "the old call", "exec")
    assert check_of(MQBENCH, row)(run(call(row[1]), after(row)))


@pytest.mark.parametrize(
    ("heading", "checks"),
    [("torch.ao.quantization, call by call", TORCH_AO), ("MQBench, call by call", MQBENCH)],
    ids=["torch.ao", "MQBench"],
)
def test_every_check_belongs_to_one_row(heading: str, checks: dict[str, Any]) -> None:
    used = [check_of(checks, row) for row in table(heading)]
    assert len(used) == len({id(check) for check in used}) == len(checks)


def resolve(root: Any, name: str) -> Any:
    return operator.attrgetter(name)(root)


def public(module: str) -> set[str]:
    found = importlib.import_module(f"torch.ao.nn.{module}")
    names = getattr(found, "__all__", None) or importlib.import_module(f"torch.ao.nn.{module}.modules").__all__
    return {f"{module}.{name}" for name in names}


def test_every_public_class_of_torch_ao_has_a_row() -> None:
    listed = [name for row in table("Each class of torch.ao") for name in code(row[0])]
    modules = (
        "intrinsic", "intrinsic.qat", "intrinsic.quantized", "intrinsic.quantized.dynamic", "qat", "qat.dynamic",
        "quantizable", "quantized", "quantized.dynamic", "quantized.reference",
    )  # fmt: skip
    assert sorted(listed) == sorted(set().union(*map(public, modules)))


@pytest.mark.parametrize("row", table("Each class of torch.ao"), ids=lambda row: row[0][1:40])
def test_the_place_of_each_class_exists(row: Row) -> None:
    for name in code(row[1]):
        if name.startswith("get_qconfig("):
            assert eval(f"qbench.{name}", {"qbench": qbench}).weight_only
        elif name != "prepare_qat":
            assert resolve(qbench.nn, name), name


@pytest.mark.parametrize("row", table("Each feature of MQBench"), ids=lambda row: row[0][1:40])
def test_the_place_of_each_feature_exists(row: Row) -> None:
    assert len(row) == 2
    for name in code(row[1]):
        if name.startswith("qbench."):
            assert resolve(qbench, name.removeprefix("qbench.")), name
        elif name != "qbench targets":
            assert name in qbench.targets.names(), name


def rows_with(heading: str, name: str) -> list[Row]:
    return [row for row in table(heading) if any(fnmatch.fnmatchcase(name, cell) for cell in code(row[0]))]


@pytest.mark.parametrize("name", ao.__all__)
def test_every_name_of_torch_ao_quantization_has_one_row(name: str) -> None:
    assert len(rows_with("Each name of torch.ao.quantization", name)) == 1


@pytest.mark.parametrize("row", table("Each name of torch.ao.quantization"), ids=lambda row: row[0][1:40])
def test_the_place_of_each_name_exists(row: Row) -> None:
    assert any(fnmatch.fnmatchcase(name, cell) for name in ao.__all__ for cell in code(row[0]))
    places = [name.removeprefix("qbench.") for name in code(row[1]) if name.startswith("qbench.")]
    assert all(resolve(qbench, name) for name in places)
    assert places or row[1].startswith(("none", "taken"))


# mqbench/prepare_by_platform.py of github.com/ModelTC/MQBench: BackendType, FakeQuantizeDict, ObserverDict.
MQBENCH_NAMES = [
    *("Academic", "Tensorrt", "SNPE", "PPLW8A16", "NNIE", "Vitis", "ONNX_QNN", "PPLCUDA", "OPENVINO", "Tengine_u8"),
    *("Tensorrt_NLP", "Academic_NLP", "Sophgo_TPU"),
    *("FixedFakeQuantize", "LearnableFakeQuantize", "NNIEFakeQuantize", "DoReFaFakeQuantize", "DSQFakeQuantize"),
    *("PACTFakeQuantize", "TqtFakeQuantize", "AdaRoundFakeQuantize", "QDropFakeQuantize", "E4M3FakeQuantize"),
    *("E5M2FakeQuantize", "GPTQFakeQuantize", "FP4FakeQuantize", "GPTQFP4FakeQuantize"),
    *("MinMaxObserver", "EMAMinMaxObserver", "MinMaxFloorObserver", "PoTModeObserver", "EMAMinMaxFloorObserver"),
    *("EMAQuantileObserver", "ClipStdObserver", "LSQObserver", "MSEObserver", "EMAMSEObserver", "KLDObserver"),
]


@pytest.mark.parametrize("name", MQBENCH_NAMES)
def test_every_choice_of_mqbench_has_one_row(name: str) -> None:
    rows = [row for row in table("Each feature of MQBench") if re.search(rf"\b{name}\b", row[0])]
    assert len(rows) == 1

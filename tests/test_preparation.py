"""prepare_qat: what becomes of a model, what stays the user's, what is reported, and what is refused."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import (
    Branchy,
    Calls,
    DropsInTraining,
    Gated,
    SmallNet,
    TwoHeads,
    Untraceable,
    assert_exact,
    conv_bn,
    count,
    images,
    links,
    randomise_statistics,
    train,
)
from torch import Tensor, nn
from torch.nn import functional as F

import qbench
import qbench.nn.intrinsic as nni
import qbench.nn.intrinsic.qat as nniqat
import qbench.nn.qat as nnqat
from qbench.errors import ConfigError, FusionError, NumericsError, PreparationError, QBenchWarning

# Models that are not fused leave their BatchNorm in float, and preparation says so.
pytestmark = pytest.mark.filterwarnings("ignore:prepare_qat leaves:qbench.errors.QBenchWarning")

QCONFIG = qbench.get_qconfig()


def prepare(model: nn.Module, **options: Any) -> nn.Module:
    return qbench.prepare_qat(model, **{"qconfig": QCONFIG, "example_inputs": (images(),), **options})


def test_arguments_have_the_order_of_torch_ao() -> None:
    assert list(inspect.signature(qbench.prepare_qat).parameters)[:3] == ["model", "mapping", "inplace"]
    model = SmallNet()
    model.qconfig = QCONFIG
    assert qbench.prepare_qat(model, None, True) is model
    assert type(model.conv1) is nnqat.Conv2d
    with pytest.raises(TypeError, match="positional"):
        qbench.prepare_qat(SmallNet(), None, False, QCONFIG)


@pytest.mark.parametrize("fused", [True, False])
def test_the_users_model_is_untouched(fused: bool) -> None:
    model = randomise_statistics(SmallNet())
    model = qbench.fuse(model) if fused else model
    kinds, before = [type(module) for module in model.modules()], copy.deepcopy(model.state_dict())
    qat = train(prepare(model), images())
    assert [type(module) for module in model.modules()] == kinds
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert "qconfig" not in vars(model)
    assert not model._forward_pre_hooks
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in qat.parameters()}


def test_in_place_the_parameters_are_the_users() -> None:
    model = SmallNet()
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)  # made before: it must train the prepared model
    assert prepare(model, inplace=True) is model
    assert {name: p for name, p in model.named_parameters() if name in parameters} == parameters
    before = model.conv1.weight.detach().clone()
    model(images()).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model.conv1.weight, before)


def test_a_model_that_is_one_layer() -> None:
    model = train(prepare(nn.Conv2d(3, 4, 3)), images())
    assert type(model) is nnqat.Conv2d
    assert_exact(model, qbench.convert(model, (images(),)), images(seed=3))


# Names of weights, before and after.
NAMES = [
    (SmallNet, False, {"conv1.weight", "bn1.weight", "fc.weight", "fc.bias"}),
    (SmallNet, True, {"fc.weight", "fc.bias"}),
    (Branchy, True, {"conv1.weight", "conv1.bias", "conv2.weight", "conv3.bias"}),
]


@pytest.mark.parametrize(("make", "fused", "names"), NAMES)
def test_weights_of_standalone_layers_keep_their_names_and_values(
    make: type[nn.Module], fused: bool, names: set[str]
) -> None:
    model = make()
    qat = prepare(qbench.fuse(model) if fused else model)
    before, after = model.state_dict(), qat.state_dict()
    assert names <= set(after)
    assert all(torch.equal(after[name], before[name]) for name in names)
    # A float checkpoint of the model fits them.
    if not fused:
        unexpected = qat.load_state_dict(before, strict=False).unexpected_keys
        assert unexpected == []


def test_a_model_that_was_never_fused_is_prepared() -> None:
    model = train(prepare(SmallNet()), images())
    assert count(model) == {"Conv2d": 3, "BatchNorm2d": 3, "Linear": 1, "AdaptiveAvgPool2d": 1}
    assert qbench.preparation_report(model).left_in_float == ()
    assert_exact(model, qbench.convert(model, (images(),)), images(seed=3))


# qconfig and mapping.


def test_a_subtree_may_have_another_qconfig_or_none() -> None:
    model = qbench.fuse(TwoHeads())
    model.left.qconfig = None
    model.aux.qconfig = qbench.get_qconfig(weight_bits=4, bias_bits=8, bias_scale="own")
    model.cat.qconfig = None
    model.qconfig = QCONFIG
    qat = qbench.prepare_qat(model, example_inputs=(images(),))
    assert type(qat.left[0]) is nni.ConvBnReLU2d
    assert qat.aux.weight_quantizer.spec.bits == 4
    assert (qat.aux.bias_quantizer.spec.bits, qat.aux.bias_quantizer.spec.scale) == (8, "own")
    assert qat.joined.weight_quantizer.spec.bits == 8
    left = {found.path: found for found in qbench.preparation_report(qat).left_in_float}
    assert set(left) == {"left.0", "cat"}
    assert {found.reason for found in left.values()} == {"its qconfig is None"}
    # What comes out of the float part is quantized where it is read.
    assert links(qat)["joined"] == ("joined.input_quantizers.0",)
    train(qat, images())
    assert_exact(qat, qbench.convert(qat, (images(),)), images(seed=3))


def test_the_qconfig_of_a_layer_survives_its_fusion() -> None:
    model = SmallNet()
    model.conv1.qconfig = None
    model.conv2.qconfig = qbench.get_qconfig(weight_bits=4)
    for fused in (qbench.fuse(model), qbench.fuse_modules(model, [["conv1", "bn1"], ["conv2", "bn2", "relu"]])):
        qat = prepare(fused)
        assert isinstance(qat.conv1, nni.Fused)
        assert qat.conv2.weight_quantizer.spec.bits == 4
        assert "conv1" in {found.path for found in qbench.preparation_report(qat).left_in_float}


def test_the_qconfig_of_a_layer_alone_is_enough() -> None:
    model = Branchy()
    model.conv3.qconfig = QCONFIG
    qat = qbench.prepare_qat(model, example_inputs=(images(),))
    assert count(qat) == {"Conv2d": 1}
    left = {found.path for found in qbench.preparation_report(qat).left_in_float}
    assert left == {"conv1", "conv2"}


def test_the_argument_is_the_qconfig_of_the_root() -> None:
    model = SmallNet()
    model.qconfig = QCONFIG
    model.fc.qconfig = qbench.get_qconfig(weight_bits=3)
    qat = qbench.prepare_qat(model, qconfig=qbench.get_qconfig(weight_bits=5))
    assert (qat.conv1.weight_quantizer.spec.bits, qat.fc.weight_quantizer.spec.bits) == (5, 3)
    assert model.qconfig is QCONFIG


class LoudConv(nnqat.Conv2d):
    """Another QAT form of Conv2d."""


class Narrow(nn.Conv2d):
    """A user's own type, not known to any table."""


class QatNarrow(nnqat.Conv2d):
    """Its QAT form."""

    float_type = Narrow


def test_mapping_comes_before_the_default() -> None:
    model = Calls(lambda m, x: m.b(m.a(x)), a=nn.Conv2d(3, 4, 3), b=Narrow(4, 4, 1))
    plain = prepare(model)
    assert [type(plain.a), type(plain.b)] == [nnqat.Conv2d, Narrow]
    (left,) = qbench.preparation_report(plain).left_in_float
    assert (left.path, left.kind) == ("b", "Narrow")
    assert "mapping=" in left.reason
    mapped = qbench.prepare_qat(model, {nn.Conv2d: LoudConv, Narrow: QatNarrow}, qconfig=QCONFIG)
    assert [type(mapped.a), type(mapped.b)] == [LoudConv, QatNarrow]
    assert qbench.preparation_report(mapped).left_in_float == ()
    train(mapped, images())
    assert_exact(mapped, qbench.convert(mapped, (images(),)), images(seed=3))


# What stays the user's.


def test_hooks_stay() -> None:
    """On a standalone layer, on a wrapper's first and last part, on a container: each called once a forward."""
    body = nn.Sequential(*conv_bn(3, 4), nn.ReLU(), nn.Flatten())
    model = qbench.fuse(Calls(lambda m, x: m.fc(m.body(x)), body=body, fc=nn.Linear(576, 2)))
    seen: list[str] = []

    def note(name: str) -> Callable[..., None]:
        return lambda *args: seen.append(name)

    wrapper = model.body[0]
    model.body.register_forward_hook(note("body"))
    wrapper.register_forward_pre_hook(note("before wrapper"))
    wrapper[0].register_forward_pre_hook(note("before conv"))
    wrapper[2].register_forward_hook(note("after relu"))
    wrapper.register_forward_hook(note("after wrapper"))
    model.fc.register_forward_pre_hook(note("before fc, with names"), with_kwargs=True)
    model.fc.register_forward_hook(note("after fc"))
    model.fc.register_full_backward_hook(note("backward fc"))
    qat = prepare(model)
    seen.clear()
    qat(images()).sum().backward()
    assert seen[:5] == ["before wrapper", "before conv", "after relu", "after wrapper", "body"]
    assert seen[5:] == ["before fc, with names", "after fc", "backward fc"]


def test_a_hook_that_changes_the_output_still_does_and_is_deployed() -> None:
    model = qbench.fuse(SmallNet())
    model.conv2.register_forward_hook(lambda module, args, out: out.flip(3))
    qat = train(prepare(model), images())
    assert links(qat)["conv3"] == ("conv2.output_quantizer",)
    inner = images(channels=8)
    assert torch.equal(qat.conv2(inner), type(qat.conv2).forward(qat.conv2, inner).flip(3))
    assert_exact(qat, qbench.convert(qat, (images(),)), images(seed=3))


def test_hooks_inside_a_wrapper_that_have_no_place_are_reported() -> None:
    model = SmallNet()
    model.conv1.register_forward_hook(lambda module, args, out: out)
    model.bn2.register_forward_pre_hook(lambda module, args: None)
    with pytest.warns(QBenchWarning, match="inside the wrapper are dropped") as caught:
        qat = prepare(qbench.fuse(model))
    assert len(caught) == 2
    found = {left.path: left.reason for left in qbench.preparation_report(qat).left_in_float if left.kind == "hooks"}
    assert set(found) == {"conv1", "conv2"}
    assert "BatchNorm2d" in found["conv2"]


@pytest.mark.parametrize("fused", [True, False])
def test_a_refusal_leaves_the_model_whole(fused: bool) -> None:
    model = qbench.fuse(SmallNet()) if fused else SmallNet()
    with torch.no_grad():
        model.fc.weight[0, 0] = float("nan")
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(NumericsError, match=r"fc\.weight"):
        qbench.prepare_qat(model, inplace=True, qconfig=QCONFIG, example_inputs=(images(),))
    assert [type(module) for module in model.modules()] == kinds


def test_shared_modules_stay_shared() -> None:
    model = Calls(lambda m, x: m.again(m.conv(x)) + m.list[0](x), conv=nn.Conv2d(3, 3, 3, padding=1))
    model.again = model.conv
    model.list = nn.ModuleList([model.conv, nn.ModuleList([model.conv])])
    qat = prepare(model)
    assert type(qat.conv) is nnqat.Conv2d
    assert qat.conv is qat.again is qat.list[0] is qat.list[1][0]
    assert len(qbench.preparation_report(qat).quantized) == 1
    # Its input is the model's, and its own output: one quantizer.
    assert qat.conv.sources == (qat.conv.output_quantizer,)
    train(qat, images())
    assert_exact(qat, qbench.convert(qat, (images(),)), images(seed=3))


def test_control_flow_class_and_attributes_stay() -> None:
    model = Branchy()
    model.note = {"a": 1}
    qat = prepare(model, example_inputs=[(images(), True), (images(), False)])
    assert type(qat) is Branchy
    assert qat.note == {"a": 1}
    assert not torch.equal(qat(images(), True), qat(images(), False))


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_stays(training: bool) -> None:
    qat = prepare(qbench.fuse(SmallNet()).train(training))
    assert {module.training for module in qat.modules()} == {training}


# What is reported.

LEFT: dict[str, tuple[nn.Module, dict[str, str]]] = {
    "batch norm first": (nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)), {}),
    "batch norm without statistics": (
        nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), nn.Conv2d(3, 4, 3)),
        {"0": "no running statistics"},
    ),
    "other types": (
        nn.Sequential(
            nn.Conv2d(3, 4, 3),
            nn.CrossMapLRN2d(3),
            nn.BatchNorm2d(4, affine=False, track_running_stats=False),
            nn.Conv2d(4, 4, 1),
        ),
        {"1": "CrossMapLRN2d", "2": "no running statistics"},
    ),
    "untraceable": (Untraceable(), {"": "cannot be traced"}),
    "modes": (DropsInTraining(), {}),
    "nothing": (SmallNet(), {}),
    "transparent": (
        nn.Sequential(
            *(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.Dropout(), nn.Identity(), nn.Sequential(), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(100, 2)),
        ),
        {},
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_everything_left_in_float_is_reported(name: str) -> None:
    model, expected = LEFT[name]
    report = qbench.preparation_report(prepare(qbench.fuse(model)))
    left = {found.path: found.reason for found in report.left_in_float}
    assert set(left) == set(expected)
    assert all(expected[path] in reason or expected[path] in str(report) for path, reason in left.items())
    for path, reason in left.items():
        assert f"left in float: {path or '(root)'}" in str(report)
        assert reason in str(report)


@pytest.mark.filterwarnings("error:prepare_qat leaves")
def test_parameters_left_in_float_are_warned_of_unless_that_was_asked_for() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Bilinear(4, 4, 4), nn.LSTM(4, 4))
    with pytest.warns(QBenchWarning, match=r"leaves 2 module\(s\) with parameters in float: 1 \[Bilinear\]"):
        qbench.prepare_qat(model, qconfig=QCONFIG)
    model[1].qconfig = model[2].qconfig = None
    qbench.prepare_qat(model, qconfig=QCONFIG)


@pytest.mark.filterwarnings("error:prepare_qat leaves")
def test_a_forgotten_fuse_is_warned_of() -> None:
    model = SmallNet()
    with pytest.warns(QBenchWarning, match=r"leaves 3 BatchNorm\(s\) .* \(bn1, bn2, bn3\).*qbench\.fuse\(model\)"):
        prepare(model)
    model.bn1.qconfig = model.bn2.qconfig = model.bn3.qconfig = None
    prepare(model)
    prepare(qbench.fuse(SmallNet()))
    prepare(qbench.fuse(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3))))


def test_the_report_says_what_became_of_what() -> None:
    qat = prepare(qbench.fuse(Gated()))
    report = qbench.preparation_report(qat)
    assert {(q.path, q.float_type, q.qat_type) for q in report.quantized} == {
        ("conv.0", "ConvBnReLU2d", "ConvBnReLU2d"),
        ("squeeze", "AdaptiveAvgPool2d", "AdaptiveAvgPool2d"),
        ("excite", "Conv2d", "Conv2d"),
        ("sigmoid", "Sigmoid", "Sigmoid"),
        ("mul", "Mul", "Mul"),
        ("head", "Conv2d", "Conv2d"),
    }
    assert report.links_recorded
    assert str(report).splitlines() == [
        "6 modules quantized",
        "input 0 of conv.0: quantized there, an input of the model, or made in float",
    ]
    assert "the first forward will be recorded" in str(
        qbench.preparation_report(qbench.prepare_qat(SmallNet(), qconfig=QCONFIG))
    )


def test_operations_of_a_python_forward_that_stay_in_float_are_reported() -> None:
    model = Calls(lambda m, x: m.c(F.softplus(m.a(x) + m.b(x)).relu()), **{k: nn.Conv2d(3, 3, 1) for k in "abc"})
    report = qbench.preparation_report(prepare(model))
    assert [str(found.operator) for found in report.float_operations] == ["aten.add", "aten.softplus"]
    add, softplus = report.float_operations
    assert softplus.reads == ("a", "b")  # through the add, which is on no grid
    assert add.reads == ("a", "b")
    assert "computed in float: aten.add of a, b; qbench.nn.Add() quantizes it" in str(report)
    assert qbench.preparation_report(prepare(qbench.fuse(model))).float_operations == ()


def test_a_prepared_model_prints_well() -> None:
    qat = prepare(qbench.fuse(SmallNet()))
    text = repr(qat)
    for line in (
        "SmallNet(",
        "  (conv1): ConvBnReLU2d(",
        "    3, 8, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), bias=False",
        "      (0): FakeQuantize(int8 asymmetric per tensor, no data seen)",
        "    (output_quantizer): FakeQuantize(int8 asymmetric per tensor, no data seen)",
        "    (weight_quantizer): FakeQuantize(int8 symmetric per channel (axis 0))",
        "    (bias_quantizer): BiasQuantizer(int32 at input_weight scale)",
        "  (add): AddReLU(",
        "  (fc): Linear(",
        "    in_features=8, out_features=10, bias=True",
    ):
        assert line in text.splitlines()
    qat(images())
    assert "no data seen" not in repr(qat)
    assert "(output_quantizer): FakeQuantize(int8 asymmetric per tensor, scale=" in repr(qat)
    # Links are no submodules: nothing is printed twice.
    assert text.count("(output_quantizer)") == 6
    qat.apply(qbench.freeze_bn_stats).apply(qbench.disable_observer)
    assert "bias=False, bn_frozen=True" in repr(qat)
    assert "observer off" in repr(qat)
    assert max(map(len, repr(qat).splitlines())) <= 120


# What is refused.


def _nan(model: nn.Module, path: str) -> nn.Module:
    with torch.no_grad():
        dict([*model.named_parameters(), *model.named_buffers()])[path].view(-1)[0] = float("nan")
    return model


def _with_qconfig(value: object) -> nn.Module:
    model = SmallNet()
    model.conv2.qconfig = value
    return model


def _mismatched(model: nn.Module) -> nn.Module:
    model.conv1[1] = nn.BatchNorm2d(99)
    return model


x = images()
REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], tuple[str, ...]]] = {
    "no qconfig": (
        lambda: qbench.prepare_qat(SmallNet()),
        PreparationError,
        ("has a qconfig", "model.qconfig = qbench.get_qconfig()"),
    ),
    "qconfig None": (lambda: qbench.prepare_qat(SmallNet(), qconfig=None), PreparationError, ("qbench.get_qconfig()",)),
    "no module": (lambda: prepare(lambda x: x), PreparationError, ("got function", "torch.nn.Module")),
    "nothing to quantize": (
        lambda: prepare(nn.Sequential(nn.Flatten(), nn.Bilinear(3, 3, 3))),
        PreparationError,
        ("nothing to quantize in Sequential", "Conv2d", "Linear"),
    ),
    "prepared twice": (lambda: prepare(prepare(SmallNet())), PreparationError, ("nothing to quantize",)),
    "a tensor": (lambda: prepare(SmallNet(), example_inputs=x), ConfigError, ("got a tensor", "example_inputs=(x,)")),
    "an array": (
        lambda: prepare(SmallNet(), example_inputs=x.numpy()),
        ConfigError,
        ("ndarray", "example_inputs=(x,)"),
    ),
    "a list of tensors": (lambda: prepare(SmallNet(), example_inputs=[x]), ConfigError, ("example_inputs=(x,)",)),
    "an empty list": (lambda: prepare(SmallNet(), example_inputs=[]), ConfigError, ("example_inputs=(x,)",)),
    "NaN weight": (
        lambda: prepare(_nan(SmallNet(), "conv2.weight")),
        NumericsError,
        ("conv2.weight", "nan", "1 value"),
    ),
    "NaN bias": (lambda: prepare(_nan(SmallNet(), "fc.bias")), NumericsError, ("fc.bias", "nan")),
    "NaN statistics": (
        lambda: prepare(qbench.fuse(_nan(SmallNet(), "bn3.running_var"))),
        NumericsError,
        ("conv3", "running_var", "nan"),
    ),
    "NaN deep inside": (
        lambda: prepare(nn.Sequential(nn.ModuleDict({"a": nn.Sequential(_nan(nn.Conv2d(3, 3, 1), "weight"))}))),
        NumericsError,
        ("0.a.0.weight",),
    ),
    "another library's qconfig": (
        lambda: prepare(_with_qconfig("int8")),
        PreparationError,
        ("conv2.qconfig", "str", "qbench.QConfig"),
    ),
    "qconfig argument": (
        lambda: prepare(SmallNet(), qconfig="onnxruntime"),
        PreparationError,
        ("str", "qbench.get_qconfig"),
    ),
    "mapping to a float type": (
        lambda: prepare(SmallNet(), mapping={nn.Conv2d: nn.Linear}),
        ConfigError,
        ("Linear", "qbench.nn.qat.Conv2d"),
    ),
    "mapping of another type": (
        lambda: prepare(SmallNet(), mapping={nn.Conv2d: nnqat.Linear}),
        FusionError,
        ("conv1", "got Conv2d", "expected Linear"),
    ),
    "parts that do not match": (
        lambda: prepare(_mismatched(qbench.fuse(SmallNet()))),
        FusionError,
        ("conv1", "puts out 8 channels", "has 99"),
    ),
    "report of a float model": (
        lambda: qbench.preparation_report(SmallNet()),
        PreparationError,
        ("SmallNet was not made by prepare_qat",),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    call, kind, words = REFUSED[name]
    with pytest.raises(kind) as error:
        call()
    assert all(word in str(error.value) for word in words), error.value


def test_examples_that_do_not_fit_the_model_keep_the_models_own_error() -> None:
    with pytest.raises(RuntimeError, match="channels"):
        prepare(SmallNet(), example_inputs=(torch.zeros(2, 5, 12, 12),))


def test_eval_before_any_data_warns_and_names_the_quantizer() -> None:
    qat = prepare(SmallNet()).eval()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        out = qat(images())
    assert torch.isfinite(out).all()
    assert all(issubclass(warning.category, QBenchWarning) for warning in found)
    assert "quantizer conv1.input_quantizers.0 has seen no data" in str(found[0].message)


def test_functional_use_of_modules_by_hand() -> None:
    """`qbench.nn.Add` and its kin in a model that is written for them."""

    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 3, padding=1)
            self.add, self.cat, self.mul = qbench.nn.Add(), qbench.nn.Cat(1), qbench.nn.Mul()

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.a(x), self.b(x)
            return self.mul(self.cat(self.add(a, b), a), F.interpolate(self.cat(b, b)[:, :, ::2, ::2], scale_factor=2))

    qat = train(prepare(Written()), images())
    assert count(qat) == {"Conv2d": 2, "Add": 1, "Cat": 1, "Mul": 1}
    assert_exact(qat, qbench.convert(qat, (images(),)), images(seed=3))


def test_wrappers_written_by_hand_are_prepared() -> None:
    model = nn.Sequential(nni.ConvBnReLU2d(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()))
    qat = train(prepare(model), images())
    assert type(qat[0]) is nniqat.ConvBnReLU2d
    assert_exact(qat, qbench.convert(qat, (images(),)), images(seed=3))

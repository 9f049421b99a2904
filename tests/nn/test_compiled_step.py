"""A model that is compiled whole takes the steps of the eager fast path, bit for bit, by operators in C++."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qbench
from qbench.nn import intrinsic as nni
from qbench.nn.intrinsic import qat as nniqat
from qbench.nn.qat import compiled_step as module
from qbench.nn.qat.layer import QatLayer
from qbench.numerics import layer_step
from qbench.numerics.blocks import CHANNELS_LAST
from qbench.numerics.layer_step import Convolution
from qbench.numerics.native import lowering
from qbench.numerics.native.lowering import takes_channels_last
from qbench.observers import MinMaxObserver

from .support import with_input
from .test_fast_path import Learning, batches, network, prepared
from .test_structure import ConvBnHardswish2d, QatConvBnHardswish2d

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),  # dynamo, of its own doing
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]
FORMATS = (torch.contiguous_format, torch.channels_last)


@pytest.fixture(autouse=True)
def anew() -> None:
    torch.compiler.reset()


def steps(model: nn.Module, call: Callable[[Tensor], Tensor], images: list[Tensor]) -> list[Tensor]:
    """Outputs, gradients and the state of each step; the loss is linear, so that its own gradient is exact."""
    found = []
    for x in images:
        model.zero_grad()
        y = call(x)
        (y * 0.5).sum().backward()
        found += [y.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(0.01 * parameter.grad if parameter.grad is not None else 0.0)
        found += [value.clone() for value in model.state_dict().values()]
    return found


def served(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The answers of layers that are asked from now on."""
    answers: list[object] = []
    plain = module.rule_of

    def noted(layer: QatLayer) -> object:
        answers.append(plain(layer))
        return answers[-1]

    monkeypatch.setattr("qbench.nn.qat.layer.rule_of", noted)
    return answers


def compiled(model: nn.Module, backend: str = "aot_eager") -> Any:
    return torch.compile(model, backend=backend, fullgraph=True)


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_steps_are_those_of_the_eager_fast_path(
    backend: str, memory_format: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = prepared(network()).to(memory_format=memory_format).apply(qbench.enable_fast_path)  # type: ignore[call-overload]
    other = copy.deepcopy(model)
    answers = served(monkeypatch)
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = steps(other, compiled(other, backend), batches(memory_format))
    assert len(answers) == 3 and None not in answers
    expected = steps(model, model, batches(memory_format))
    assert len(found) == len(expected) > 60
    same = [torch.equal(a, b) for a, b in zip(found, expected, strict=True)]
    # Inductor may hand memory over in another order, and sums of convolutions then round otherwise.
    assert all(same) if backend == "aot_eager" else sum(same) > 20
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=0.02, atol=0.05 * float(b.double().abs().max()) + 1e-5)


def test_an_activation_behind_a_quantizer_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    float_layer = ConvBnHardswish2d(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Hardswish())
    layer = with_input(QatConvBnHardswish2d.from_float(float_layer, qbench.get_qconfig()), batches()[0])
    layer = layer.train().apply(qbench.enable_fast_path)
    other = copy.deepcopy(layer)
    answers = served(monkeypatch)
    found = steps(other, compiled(other), batches())
    assert [answer.before for answer in answers] == [True]  # type: ignore[attr-defined]
    assert all(map(torch.equal, found, steps(layer, layer, batches())))


def test_sums_are_served_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model = prepared(Learning()).apply(qbench.enable_fast_path)
    other = copy.deepcopy(model)
    answers, plain = [], module.clip_rule_of
    monkeypatch.setattr("qbench.nn.qat.body.clip_rule_of", lambda *given: answers.append(plain(*given)) or answers[-1])
    images = batches(count=4)
    call = compiled(other)
    found, expected = steps(other, call, images[:2]), steps(model, model, images[:2])
    assert len(answers) == 1 and answers[0] is not None
    assert len(found) == len(expected) > 40 and all(map(torch.equal, found, expected))
    for one in (model, other):
        one.apply(qbench.disable_observer)
    found, expected = steps(other, call, images[2:]), steps(model, model, images[2:])
    assert len(answers) == 2 and all(map(torch.equal, found, expected))


def replaced(layer: QatLayer) -> None:
    assert layer.output_quantizer is not None
    layer.output_quantizer.observer = MinMaxObserver(layer.output_quantizer.spec)


SWITCHES: dict[str, Callable[[Any], Any]] = {
    "observer off": lambda layer: layer.apply(qbench.disable_observer),
    "fake-quant off": lambda layer: layer.apply(qbench.disable_fake_quant),
    "statistics frozen": lambda layer: layer.apply(qbench.freeze_bn_stats),
    "another averaging constant": lambda layer: setattr(layer.output_quantizer.observer, "averaging_constant", 0.5),
    "another observer": replaced,
    "another momentum": lambda layer: setattr(layer.bn, "momentum", 0.9),
    "another eps": lambda layer: setattr(layer.bn, "eps", 0.5),
    "another activation": lambda layer: setattr(layer, "activation_module", nn.Hardtanh(0.0, 0.4)),
    "the path off": lambda layer: layer.apply(qbench.disable_fast_path),
}


@pytest.mark.parametrize("name", SWITCHES)
def test_what_is_switched_later_counts(name: str) -> None:
    model = prepared(network()).apply(qbench.enable_fast_path)
    other = copy.deepcopy(model)
    call = compiled(other)
    images = batches(count=4)
    first = steps(other, call, images[:2])
    assert all(map(torch.equal, first, steps(model, model, images[:2])))
    for one in (model, other):
        SWITCHES[name](next(layer for layer in one.modules() if isinstance(layer, QatLayer)))
    found, expected = steps(other, call, images[2:]), steps(model, model, images[2:])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-4, atol=0.03)  # a code, where paths differ


def test_batches_of_another_size_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    model = prepared(network()).apply(qbench.enable_fast_path)
    other = copy.deepcopy(model)
    call = compiled(other)
    images = [x[:size] for x, size in zip(batches(count=4), (5, 4, 2, 3), strict=True)]
    assert all(map(torch.equal, steps(other, call, images), steps(model, model, images)))


LAYERS = {
    "depthwise": (nni.ConvBnReLU2d(nn.Conv2d(6, 12, 3, groups=6), nn.BatchNorm2d(12), nn.ReLU()), (4, 6, 9, 9)),
    "3d, groups": (nni.ConvBnReLU3d(nn.Conv3d(6, 12, 3, groups=2), nn.BatchNorm3d(12), nn.ReLU()), (4, 6, 5, 5, 5)),
    "1d, depthwise": (nni.ConvBnReLU1d(nn.Conv1d(6, 12, 3, groups=6), nn.BatchNorm1d(12), nn.ReLU()), (4, 6, 9)),
    "large maps": (nni.ConvBnReLU2d(nn.Conv2d(6, 12, 3), nn.BatchNorm2d(12), nn.ReLU()), (4, 6, 9, 9)),
    "small maps": (nni.ConvBnReLU2d(nn.Conv2d(64, 48, 3), nn.BatchNorm2d(48), nn.ReLU()), (4, 64, 4, 4)),
    "one value a map": (nni.ConvBnReLU2d(nn.Conv2d(6, 12, 1), nn.BatchNorm2d(12), nn.ReLU()), (4, 6, 9, 9)),
}
#: Whether channels last are faster; None where that is as the input has it.
FASTER = {
    "depthwise": True,
    "3d, groups": True,
    "1d, depthwise": False,
    "large maps": True,
    "small maps": False,
    "one value a map": None,
}


def ready(name: str) -> tuple[Any, Tensor]:
    """A layer on the fast path, and an input for it."""
    float_layer, shape = LAYERS[name]
    kind = next(one for one in vars(nniqat).values() if getattr(one, "float_type", None) is type(float_layer))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    layer = with_input(kind.from_float(copy.deepcopy(float_layer), qbench.get_qconfig()), x)
    return layer.train().apply(qbench.enable_fast_path), x


def orders(x: Tensor) -> list[torch.memory_format]:
    return [torch.contiguous_format, *([CHANNELS_LAST[x.ndim]] if x.ndim in CHANNELS_LAST else [])]


def strides(x: Tensor) -> list[int]:
    """Of axes with more than one place."""
    return [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]


@pytest.mark.parametrize("name", LAYERS)
def test_memory_is_in_the_order_of_eager_mode(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What looks at strides, in a model or outside, finds what it would without a compiler."""
    monkeypatch.setattr(layer_step, "KEPT_WEIGHTS", 1000)
    layer, x = ready(name)
    for of_input in orders(x):
        for of_weight in orders(x):
            found = []
            for call in (lambda one: one, compiled):
                one = copy.deepcopy(layer).to(memory_format=of_weight)
                given = x.clone(memory_format=of_input).requires_grad_()
                out = call(one)(given)
                out.square().sum().backward()
                found.append([out, given.grad, *(parameter.grad for parameter in one.parameters())])
            eager, ours = found
            assert all(map(torch.equal, ours, eager))
            assert list(map(strides, ours)) == list(map(strides, eager))


@pytest.mark.parametrize(("name", "faster"), FASTER.items())
def test_which_order_is_faster(name: str, faster: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Channels last for groups and for large maps, whatever the order of the weight."""
    monkeypatch.setattr(layer_step, "KEPT_WEIGHTS", 1000)
    layer, x = ready(name)
    for weight in (layer.weight.contiguous(memory_format=order) for order in orders(x)):
        for last in (False, True):
            expected = last if faster is None else faster
            assert takes_channels_last(layer.convolution(), x, weight, last) == expected


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_images_of_other_sizes_are_served(backend: str, memory_format: torch.memory_format) -> None:
    model = nn.Sequential(network(), nn.AdaptiveAvgPool2d(1))
    model = prepared(model).to(memory_format=memory_format).apply(qbench.enable_fast_path)  # type: ignore[call-overload]
    other = copy.deepcopy(model)
    call = torch.compile(other, backend=backend, fullgraph=True, dynamic=True)
    x = batches(memory_format)[0]
    images = [x, x[:, :, :10, :9], torch.cat([x, x], 2), torch.cat([x, x], 3)]
    for a, b in zip(steps(other, call, images), steps(model, model, images), strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=0.02, atol=0.05 * float(b.double().abs().max()) + 1e-5)


class Viewing(nn.Module):
    """Convolutions that Inductor gives channels last, behind them one that looks at strides."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.pool = nn.MaxPool2d(2)
        self.last = nn.Linear(8 * 36, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.second(self.first(x)))
        found: Tensor = self.last(x.view(len(x), -1))
        return found


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_model_may_look_at_strides(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = prepared(Viewing()).apply(qbench.enable_fast_path)
    other, last, plain = copy.deepcopy(model), [], Convolution.__call__

    def noted(linear: Convolution, x: Tensor, *rest: Any) -> Tensor:
        if type(x) is Tensor:  # and not one that is traced
            last.append(x.is_contiguous(memory_format=torch.channels_last))
        return plain(linear, x, *rest)

    monkeypatch.setattr(Convolution, "__call__", noted)
    found = steps(other, compiled(other, backend), batches())
    assert last == [backend == "inductor"] * 6  # three steps of two layers
    for a, b in zip(found, steps(model, model, batches()), strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=0.02, atol=0.05 * float(b.double().abs().max()) + 1e-5)


def test_without_a_way_to_tell_inductor_orders_stay(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    register = lowering.register.__wrapped__
    monkeypatch.setitem(sys.modules, "torch._inductor.lowering", None)
    with caplog.at_level("INFO", logger="qbench"):
        register()
    assert "keep the order of memory of eager mode" in caplog.text


def test_what_is_exported_has_no_operators_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is exported runs elsewhere, too."""
    model = prepared(network()).apply(qbench.enable_fast_path)
    model(batches()[0])
    layer = next(module for module in model.modules() if isinstance(module, QatLayer))
    (x,) = layer.quantized_inputs((batches()[0],))
    assert module.compiled_step(layer, x) is not None
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    assert module.compiled_step(layer, x) is None

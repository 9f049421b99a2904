"""A model that is compiled whole takes the steps of the eager fast path, bit for bit, by operators in C++."""

from __future__ import annotations

import copy
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
from qbench.numerics.native.operators import takes_channels_last
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


def in_order(model: nn.Module) -> nn.Module:
    """A model in eager mode whose convolutions take memory in the order of compiled ones."""

    def put(layer: Any, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        last = takes_channels_last(given[0], layer.linear_weight, layer.groups)
        return (given[0].contiguous(memory_format=torch.channels_last if last else torch.contiguous_format),)

    for layer in model.modules():
        if isinstance(layer, QatLayer) and layer.convolution() is not None and layer.batch_norm is not None:
            layer.register_forward_pre_hook(put)
    return model


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
    expected = steps(model, in_order(model), batches(memory_format))
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
    assert all(map(torch.equal, found, steps(layer, in_order(layer), batches())))


def test_sums_are_served_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model = prepared(Learning()).apply(qbench.enable_fast_path)
    other = copy.deepcopy(model)
    answers, plain = [], module.clip_rule_of
    monkeypatch.setattr("qbench.nn.qat.body.clip_rule_of", lambda *given: answers.append(plain(*given)) or answers[-1])
    images = batches(count=4)
    call = compiled(other)
    found, expected = steps(other, call, images[:2]), steps(model, in_order(model), images[:2])
    assert len(answers) == 1 and answers[0] is not None
    assert len(found) == len(expected) > 40 and all(map(torch.equal, found, expected))
    for one in (model, other):
        one.apply(qbench.disable_observer)
    found, expected = steps(other, call, images[2:]), steps(model, in_order(model), images[2:])
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
    assert all(map(torch.equal, first, steps(model, in_order(model), images[:2])))
    for one in (model, other):
        SWITCHES[name](next(layer for layer in one.modules() if isinstance(layer, QatLayer)))
    found, expected = steps(other, call, images[2:]), steps(model, in_order(model), images[2:])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-4, atol=0.03)  # a code, where paths differ


def test_batches_of_another_size_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    model = prepared(network()).apply(qbench.enable_fast_path)
    other = copy.deepcopy(model)
    call = compiled(other)
    images = [x[:size] for x, size in zip(batches(count=4), (5, 4, 2, 3), strict=True)]
    assert all(map(torch.equal, steps(other, call, images), steps(model, in_order(model), images)))


@pytest.mark.parametrize(
    ("float_layer", "shape", "last"),
    [
        (nni.ConvBnReLU2d(nn.Conv2d(6, 12, 3, groups=6), nn.BatchNorm2d(12), nn.ReLU()), (4, 6, 9, 9), True),
        (nni.ConvBnReLU3d(nn.Conv3d(6, 12, 3, groups=2), nn.BatchNorm3d(12), nn.ReLU()), (4, 6, 5, 5, 5), True),
        (nni.ConvBnReLU1d(nn.Conv1d(6, 12, 3, groups=6), nn.BatchNorm1d(12), nn.ReLU()), (4, 6, 9), False),
        (nni.ConvBnReLU2d(nn.Conv2d(6, 12, 3), nn.BatchNorm2d(12), nn.ReLU()), (4, 6, 9, 9), True),
        (nni.ConvBnReLU2d(nn.Conv2d(64, 48, 3), nn.BatchNorm2d(48), nn.ReLU()), (4, 64, 4, 4), False),
        (nni.ConvBnReLU2d(nn.Conv2d(6, 12, 1), nn.BatchNorm2d(12), nn.ReLU()), (4, 6, 9, 9), None),
    ],
    ids=["depthwise", "3d, groups", "1d, depthwise", "large maps", "small maps", "one value a map"],
)
def test_which_order_a_compiled_layer_takes(float_layer: Any, shape: tuple[int, ...], last: bool | None) -> None:
    """Channels last for groups, for large maps and where the weight has them so; of one value a map, as the input."""
    kind = next(one for one in vars(nniqat).values() if getattr(one, "float_type", None) is type(float_layer))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    layer = with_input(kind.from_float(float_layer, qbench.get_qconfig()), x).train().apply(qbench.enable_fast_path)
    order = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim)
    for given_order in (torch.contiguous_format, *([] if order is None else [order])):
        for weight_order in {torch.contiguous_format, given_order}:
            one = copy.deepcopy(layer).to(memory_format=weight_order)
            given = x.clone(memory_format=given_order).requires_grad_()
            out = compiled(one)(given)
            out.square().sum().backward()
            assert given.grad is not None and given.grad.stride() == given.stride()
            assert one.weight.grad is not None and one.weight.grad.stride() == one.weight.stride()
            there = given_order is order if last is None else last or (order is not None and weight_order is order)
            assert out.is_contiguous(memory_format=order if there and order is not None else torch.contiguous_format)


def test_what_is_exported_has_no_operators_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is exported runs elsewhere, too."""
    model = prepared(network()).apply(qbench.enable_fast_path)
    model(batches()[0])
    layer = next(module for module in model.modules() if isinstance(module, QatLayer))
    (x,) = layer.quantized_inputs((batches()[0],))
    assert module.compiled_step(layer, x) is not None
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    assert module.compiled_step(layer, x) is None

"""C++ against PyTorch's operators and generated code: the bits of values and of what is remembered; gradients."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qbench
from qbench.fake_quantize import FakeQuantize
from qbench.fake_quantize.learned import LearnedFakeQuantize
from qbench.fake_quantize.producers import codes_of
from qbench.nn import intrinsic as nni
from qbench.nn.intrinsic import qat as nniqat
from qbench.nn.qat import epilogue as epilogue_module
from qbench.nn.qat import fast_parameters
from qbench.nn.qat import step as step_module
from qbench.nn.qat.epilogue import ClipByNative, clip_of, rule_of
from qbench.nn.qat.layer import QatLayer
from qbench.nn.qat.parameters import Folding, training_parameters
from qbench.numerics import layer_step
from qbench.numerics.fold import BatchNormTensors, WeightLayout
from qbench.numerics.generated import same_bits
from qbench.numerics.native import library as library_module
from qbench.numerics.native import steps as steps_module
from qbench.numerics.native.steps import Following, Remembered, following
from qbench.numerics.qparams import QSpec, fake_quantize, inside_range, quantize
from qbench.numerics.saved_codes import lowering
from qbench.observers import MinMaxObserver, MovingAverageMinMaxObserver

from .support import CASES, Case, batch, case_named, make_layer, with_input, without_native
from .test_fast_path import Learning, batches, network, paths_of_learned_grids, prepared, trained

FORMATS = {4: (torch.contiguous_format, torch.channels_last), 5: (torch.contiguous_format, torch.channels_last_3d)}
SHAPES = (
    *((4, 24, 9, 9), (2, 7, 33, 5), (16, 130, 1, 1), (3, 64, 28, 28)),
    *((2, 1, 40, 40), (1, 3, 50, 2), (2, 5, 4, 6, 7)),
)
SPECS = {
    "int8": QSpec(),
    "uint8": QSpec(signed=False),
    "uint4": QSpec(bits=4, signed=False),
    "int8 symmetric": QSpec(symmetric=True),
    "int16": QSpec(bits=16),
}
ACTIVATIONS = {"relu": (0.0, math.inf), "relu6": (0.0, 6.0), "none": (-math.inf, math.inf), "hardtanh": (-0.7, 0.4)}


def steps_of(spec: QSpec, bounds: tuple[float, float], observer: Any) -> Following:
    found = following(0.1, 1e-5, *bounds, spec, None if observer is None else rule_of(observer), "cpu")
    assert found is not None, library_module.library()
    return found


def images(count: int = 2) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(2)
    for shape in SHAPES:
        for memory_format in FORMATS[len(shape)]:
            for _ in range(count):
                y = torch.randn(shape, generator=generator) * 3 + 1
                yield y.contiguous(memory_format=memory_format)  # type: ignore[call-overload]


@pytest.mark.parametrize("kind", [MovingAverageMinMaxObserver, MinMaxObserver, None], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("spec", SPECS.values(), ids=list(SPECS))
def test_codes_masks_and_ranges_are_those_of_the_steps_for_the_same_statistics(
    spec: QSpec, activation: str, kind: type[Any] | None
) -> None:
    low, high = ACTIVATIONS[activation]
    quantizer = FakeQuantize(spec, (kind or MovingAverageMinMaxObserver)(spec)).train()
    reference = copy.deepcopy(quantizer)
    if kind is None:
        for one in (quantizer, reference):
            one.observer_enabled = False
            one.set_grid(MinMaxObserver(spec)(torch.tensor([-1.5, 2.0])))
    steps = steps_of(spec, (low, high), quantizer.observer if kind else None)
    different, values, cut, generator = 0, 0, 0, torch.Generator().manual_seed(3)
    for y in images():
        channels, wide = y.shape[1], (1, -1, *[1] * (y.ndim - 2))
        gamma, beta, error = torch.randn(3, channels, generator=generator)
        to = Remembered(
            torch.zeros(channels),
            torch.ones(channels),
            None,
            quantizer.observer.min_val,
            quantizer.observer.max_val,
            quantizer.scale,
            quantizer.zero_point,
        )
        found = steps.forward(y, gamma, beta, error, None, to, with_codes=True)
        assert found is not None
        out, kept, coded = found
        mean, inverse = kept[: 2 * channels].view(2, -1)
        factor = inverse * gamma
        v = torch.addcmul(torch.addcmul(beta + error, mean, factor, value=-1).view(wide), y, factor.view(wide))
        a = v.clamp(low, high)
        wanted = reference(a)
        grid = reference.snapshot()
        assert all(map(torch.equal, quantizer.buffers(), reference.buffers()))
        different += int((out != wanted).sum()) + int((wanted != fake_quantize(a, grid)).sum())
        values += out.numel()
        assert (coded is None) == (spec.bits > 8) and out.stride() == y.stride()
        if coded is not None:
            different += int((coded.codes != quantize(a, grid).int() - lowering(spec)).sum())
            assert torch.equal(coded.value(), out)

        given = torch.randn(y.shape, generator=generator)  # of another layout than y, where that is not contiguous
        grad_y, grad_gamma, grad_beta = steps.backward(given, y, kept)
        inside = inside_range(a, grid) & (v > low) & (v < high)
        cut += int((~inside).sum())
        passed = torch.where(inside, given, 0.0).double()
        others = [dim for dim in range(y.ndim) if dim != 1]
        centred = y.double() - mean.double().view(wide)
        along = (passed * centred).sum(others) * inverse.double()
        total, count = passed.sum(others), y.numel() / channels
        slope = (along / count * inverse).view(wide)
        expected = (passed - (total / count).view(wide) - centred * slope) * factor.double().view(wide)
        for mine, theirs in ((grad_y, expected), (grad_gamma, along), (grad_beta, total)):
            torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-4)
    assert different == 0 and values > 300_000
    assert cut > 1_000 or (activation == "none" and kind)  # a range that was widened cuts nothing by itself


def test_statistics_and_gradients_are_those_of_batch_norm() -> None:
    """Against PyTorch in float64, where nothing is rounded away, for data whose mean is large beside its deviation."""
    steps = steps_of(QSpec(bits=16), ACTIVATIONS["none"], None)
    generator = torch.Generator().manual_seed(3)
    for memory_format in FORMATS[4]:
        y = (torch.randn(6, 10, 30, 30, generator=generator) + 300).contiguous(memory_format=memory_format)
        gamma, beta = torch.rand(10, generator=generator) + 0.5, torch.randn(10, generator=generator)
        bn = nn.BatchNorm2d(10).double()
        with torch.no_grad():
            bn.weight.copy_(gamma), bn.bias.copy_(beta)
        ours, theirs = copy.deepcopy(bn).float(), y.double().requires_grad_()
        grid = torch.tensor(4e-4), torch.tensor(0, dtype=torch.int32)
        to = Remembered(ours.running_mean, ours.running_var, ours.num_batches_tracked, grid[0], grid[0], *grid)  # type: ignore[arg-type]
        found = steps.forward(y, gamma, beta, None, None, to)
        assert found is not None
        wanted = bn(theirs)
        assert (found[0] - wanted).abs().max() < 4e-4  # half a step, and float32's own error at 300
        given = torch.randn(y.shape, generator=generator)
        wanted.backward(given.double())
        for (name, mine), their in zip(ours.state_dict().items(), bn.state_dict().values(), strict=True):
            torch.testing.assert_close(mine.double(), their.double(), rtol=1e-4, atol=0, msg=name)
        grads = steps.backward(given, y, found[1])
        for mine, their in zip(grads, (theirs.grad, bn.weight.grad, bn.bias.grad), strict=True):
            assert their is not None
            torch.testing.assert_close(mine.double(), their, rtol=1e-3, atol=1e-3)


def test_what_is_not_a_number_goes_through() -> None:
    steps = steps_of(QSpec(), ACTIVATIONS["relu"], None)
    for bad in (math.nan, math.inf):
        for memory_format in FORMATS[4]:
            y = torch.randn(2, 4, 8, 8).contiguous(memory_format=memory_format)
            y[1, 2, 3, 4] = bad
            grid = torch.tensor(0.02), torch.tensor(-128, dtype=torch.int32)
            to = Remembered(torch.zeros(4), torch.ones(4), None, grid[0], grid[0], *grid)
            found = steps.forward(y, torch.ones(4), torch.zeros(4), None, None, to)
            assert found is not None
            assert found[0].isnan().sum((0, 2, 3)).tolist() == [0, 0, 128, 0]
            assert to.mean.isfinite().tolist() == [True, True, False, True]


def test_channels_that_are_silenced_keep_their_statistics() -> None:
    steps = steps_of(QSpec(), ACTIVATIONS["relu"], None)
    y, silenced = torch.randn(4, 6, 5, 5), torch.arange(6) % 2 == 0
    grid = torch.tensor(0.02), torch.tensor(-128, dtype=torch.int32)
    to = Remembered(torch.full((6,), 7.0), torch.full((6,), 7.0), torch.tensor(4), grid[0], grid[0], *grid)
    steps.forward(y, None, None, None, silenced, to)
    for running in (to.mean, to.var):
        assert (running == 7.0).tolist() == silenced.tolist()
    assert to.batches is not None and int(to.batches) == 5


@pytest.mark.parametrize("kind", [MovingAverageMinMaxObserver, MinMaxObserver, None], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("spec", SPECS.values(), ids=list(SPECS))
def test_what_is_quantized_where_it_lies_has_the_bits_of_the_steps(
    spec: QSpec, activation: str, kind: type[Any] | None
) -> None:
    low, high = ACTIVATIONS[activation]
    quantizer = FakeQuantize(spec, (kind or MovingAverageMinMaxObserver)(spec)).train()
    reference = copy.deepcopy(quantizer)
    for one in (quantizer, reference):
        one.observer_enabled = kind is not None
        one.set_grid(MinMaxObserver(spec)(torch.tensor([-1.5, 2.0])))
    clip = clip_of((low, high), quantizer, "cpu", low_memory=True)
    assert isinstance(clip, ClipByNative)
    for count, v in enumerate(images()):
        if count % 5 == 4 and kind is None:
            v[0, 0, 0, 0], v[-1, -1, 0, 0], v[0, -1, 0, -1] = math.nan, math.inf, -math.inf
        source = v.clone().requires_grad_()
        out = clip(source * 1.0)
        assert out is not None and out.stride() == v.stride() and clip.path == "native"
        other = v.clone().requires_grad_()
        wanted = reference(other.clamp(low, high))
        assert torch.equal(out.nan_to_num(7e7), wanted.nan_to_num(7e7))
        assert all(map(torch.equal, quantizer.buffers(), reference.buffers()))
        given = torch.randn(v.shape)
        out.backward(given), wanted.backward(given)
        finite = (v != low) & (v != high) & ~v.isnan()  # at an end of a clamp PyTorch lets the gradient pass
        assert source.grad is not None and other.grad is not None
        assert torch.equal(source.grad[finite], other.grad[finite]) and not source.grad[v.isnan()].any()
        coded = codes_of(out)
        assert (coded is None) == (spec.bits > 8)
        if coded is not None and not v.isnan().any():
            assert torch.equal(coded.value(), out)


@pytest.mark.parametrize("low_memory", [False, True], ids=["", "low memory"])
@pytest.mark.parametrize("activation", [nn.Hardswish, nn.LeakyReLU], ids=["hardswish", "leaky relu"])
def test_a_layer_whose_activation_has_a_quantizer_before_it(activation: type[nn.Module], low_memory: bool) -> None:
    """The values of its parts one after the other; where the activation's backward allows it, it is written to."""
    float_type = type("Fused", (nni.Fused,), {"part_types": (nn.Conv2d, nn.BatchNorm2d, activation)})
    kind = type("Qat", (nniqat.ConvBn2d,), {"float_type": float_type, "activation": activation})
    parts = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), activation()
    layer = with_input(kind.from_float(float_type(*parts), qbench.get_qconfig()), batches()[0])  # type: ignore[attr-defined]
    layer = layer.train().apply(qbench.enable_fast_path)
    if low_memory:
        layer.apply(qbench.enable_low_memory)
    one, apart = copy.deepcopy(layer), copy.deepcopy(layer)
    apart.convolution = lambda: None  # type: ignore[method-assign]
    ours, theirs = trained(one, batches())[0], trained(apart, batches())[0]
    assert all(map(torch.equal, ours.state_dict().values(), theirs.state_dict().values()))
    y = one(batches()[0])
    assert one.path == "native" and (codes_of(y) is not None) == (low_memory and activation is nn.Hardswish)


def test_activations_that_stand_alone_train_as_on_the_plain_path() -> None:
    """The block of an EfficientNet: Conv–BN, SiLU, which is a table, and the product that scales its channels."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.SiLU())
            self.pool, self.squeeze, self.scale = nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
            self.last = nn.Sequential(nn.Conv2d(16, 8, 1, bias=False), nn.BatchNorm2d(8), nn.Hardswish())

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            share = torch.sigmoid(self.scale(nn.functional.silu(self.squeeze(self.pool(x)))))
            out: Tensor = self.last(share * x)
            return out

    torch.manual_seed(0)
    model = prepared(Block())
    _, expected = trained(model, batches())
    fast, found = trained(model.apply(qbench.enable_fast_path), batches())
    paths = qbench.training_paths(fast).layers
    assert [paths[name] for name in ("first.0", "last.0")] == ["native", "native"]
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).abs().mean() < 2e-2 * theirs.abs().mean()
    low, again = trained(model.apply(qbench.enable_low_memory), batches())
    assert all(map(torch.equal, again, found))
    assert all(map(torch.equal, low.state_dict().values(), fast.state_dict().values()))
    fast.eval()
    program = qbench.convert(fast, example_inputs=(batches()[0],))
    assert int((fast(batches()[0]) != program.module()(batches()[0])).sum()) == 0


def learning(method: str = "lsq") -> nn.Module:
    """A model whose grids are learned, and have been given a gradient, on the fast path."""
    torch.manual_seed(0)
    config = qbench.get_qconfig(method=method)
    model = qbench.prepare_qat(qbench.fuse(Learning()), qconfig=config, example_inputs=(batches()[0],)).train()
    model.apply(qbench.enable_fast_path)
    model(batches()[0]).square().mean().backward()
    model.zero_grad()
    return model


def served(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is learned at each layer that is one function from now on."""
    calls: list[Any] = []
    plain = step_module.layer_step

    def noted(*given: Any) -> Any:
        calls.append(given[6])
        return plain(*given)

    monkeypatch.setattr(step_module, "layer_step", noted)
    return calls


def test_layers_with_learned_grids_are_one_function(monkeypatch: pytest.MonkeyPatch) -> None:
    model = learning()
    calls = served(monkeypatch)
    model(batches()[0]).square().mean().backward()
    assert len(calls) == 2  # those with a BatchNorm
    assert all(one.input_scale is not None and one.step is not None and one.scale is not None for one in calls)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    # The layer that writes an activation and the one that reads it hand their gradients to the same parameter.
    assert calls[0].scale.learned is calls[1].input_scale.learned


def test_buffers_may_be_written_to_between_forward_and_backward() -> None:
    """As DDP does, where a step has two forwards."""
    model = learning()
    other = copy.deepcopy(model)
    for one in (model, other):
        outputs = []
        for image in batches()[:2]:
            outputs.append(one(image).square().mean())
            if one is model:
                for buffer in one.buffers():
                    buffer.copy_(buffer.clone())
        torch.stack(outputs).sum().backward()
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None and torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("memory_format", FORMATS[4], ids=str)
@pytest.mark.parametrize("low_memory", [False, True], ids=["", "low memory"])
def test_an_image_gets_no_gradient_for_the_sake_of_its_scale(
    low_memory: bool, memory_format: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = learning().to(memory_format=memory_format)  # type: ignore[call-overload]
    if low_memory:
        model.apply(qbench.enable_low_memory)
    other, calls = copy.deepcopy(model), served(monkeypatch)
    for image in batches(memory_format):
        asked = image.clone().requires_grad_()
        found, expected = model(image), other(asked)
        assert calls[0].image is image and all(one.image is None for one in calls[1:])
        assert int((found != expected).sum()) == 0
        found.square().mean().backward()
        expected.square().mean().backward()
        assert asked.grad is not None and image.grad is None
        calls.clear()
    (source,) = model.get_submodule("first.0").input_quantizers.values()
    for (name, ours), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None
        if ours is source.change:
            assert ours.grad != 0
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=0.0)
        else:
            assert torch.equal(ours.grad, theirs.grad), name


def test_where_more_than_the_scale_of_an_image_learns_it_is_rounded_before(monkeypatch: pytest.MonkeyPatch) -> None:
    model = learning("lsq_plus")
    calls = served(monkeypatch)
    model(batches()[0]).square().mean().backward()
    assert len(calls) == 2 and calls[0].image is None and calls[0].input_scale is not None


@pytest.mark.parametrize("method", ["lsq", "lsq_plus", "pact"])
def test_what_was_learned_is_what_is_converted(method: str) -> None:
    model, _ = trained(learning(method), batches(count=4))
    assert set(qbench.training_paths(model).layers.values()) == {"native"}
    scales = [q for q in model.modules() if isinstance(q, LearnedFakeQuantize)]
    assert all(bool((q.change != 0).any()) for q in scales)
    program = qbench.convert(model.eval(), example_inputs=(batches()[0],))
    found, expected = program.module()(batches()[1]), model(batches()[1])
    assert int((found != expected).sum()) == 0 and len(expected.unique()) > 30


def linear_layers() -> list[nn.Module]:
    return [nn.Linear(11, 24), nn.ReLU(), nn.Linear(24, 40, bias=False), nn.ReLU6(), nn.Linear(40, 7)]


def convolutions() -> list[nn.Module]:
    return [nn.Conv2d(3, 24, 3), nn.ReLU(), nn.Conv2d(24, 40, 3, groups=4, bias=False), nn.Hardswish()]


WITHOUT_BN = {"linear": (linear_layers, (6, 11)), "conv": (convolutions, (4, 3, 9, 8))}


@pytest.mark.parametrize("low_memory", [False, True], ids=["", "low memory"])
@pytest.mark.parametrize("moved", [False, True], ids=["at the start", "moved"])
@pytest.mark.parametrize("of_weight", ["lsq", "fixed"])
@pytest.mark.parametrize("name", WITHOUT_BN)
def test_layers_without_batch_norm_learn_as_on_the_plain_path(
    name: str, of_weight: str, moved: bool, low_memory: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    layers, shape = WITHOUT_BN[name]
    images, config = torch.randn(shape), qbench.get_qconfig(method="lsq", weight_method=of_weight)
    model = qbench.prepare_qat(qbench.fuse(nn.Sequential(*layers())), qconfig=config, example_inputs=(images,)).train()
    model.apply(qbench.enable_fast_path)
    if low_memory:
        model.apply(qbench.enable_low_memory)
    if moved:
        model(images).square().mean().backward()
        with torch.no_grad():
            for quantizer in model.modules():
                if isinstance(quantizer, LearnedFakeQuantize):  # some beyond 0
                    turned = torch.arange(max(1, quantizer.change.numel())).view(quantizer.change.shape) % 3 == 1
                    quantizer.change.copy_(quantizer.start * torch.where(turned, -1.7, -0.3))
        model.zero_grad()
    other = copy.deepcopy(model).apply(qbench.disable_fast_path)
    calls: list[Any] = []
    apply = fast_parameters._LearnedWeightAndBias.apply

    def noted(*given: Any) -> Any:
        calls.append(given)
        return apply(*given)

    monkeypatch.setattr(fast_parameters._LearnedWeightAndBias, "apply", noted)
    found, expected = model(images), other(images)
    assert len(calls) == sum(isinstance(module, QatLayer) for module in model.modules())
    assert all(given[3] is not None and (given[2] is not None) == (of_weight == "lsq") for given in calls)
    assert int((found != expected).sum()) == 0 and len(found.unique()) > 20
    grad = torch.randn_like(found)
    found.backward(grad)
    expected.backward(grad)
    for (place, ours), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None and theirs.grad.abs().max() > 0
        if place.endswith(("weight", "bias")):
            assert torch.equal(ours.grad, theirs.grad), place
        else:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5 * float(theirs.grad.abs().max()))


def test_a_weight_gradient_that_others_hold_is_not_written_to() -> None:
    case = case_named("linear")
    layer, _ = make_layer(case, config=qbench.get_qconfig(method="lsq"))
    layer.train().apply(qbench.enable_fast_path)
    with torch.no_grad():
        layer(batch(case.shape))
    layer.weight_quantizer.observer_enabled = False
    layer.weight_quantizer.start.mul_(0.02)  # clips
    held: list[tuple[Tensor, Tensor]] = []
    linear = layer.linear

    def watched(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        weight.register_hook(lambda grad: held.append((grad, grad.clone())))
        return linear(x, weight, bias)

    layer.linear = watched  # type: ignore[method-assign]
    layer(batch(case.shape)).square().mean().backward()
    ((grad, before),) = held
    assert torch.equal(grad, before) and layer.weight.grad is not None and not torch.equal(layer.weight.grad, grad)


def test_learned_grids_train_alike_with_low_memory() -> None:
    model = learning()
    low = copy.deepcopy(model).apply(qbench.enable_low_memory)
    images = batches()
    (first, found), (second, expected) = trained(low, images), trained(model, images)
    assert len(found) == len(expected) == 3 and all(map(torch.equal, found, expected))
    assert all(map(torch.equal, first.state_dict().values(), second.state_dict().values()))


@pytest.mark.parametrize("off", ["path", "parameters", "layout"])
def test_what_learns_and_is_not_served_takes_its_steps(off: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = learning()
    other = copy.deepcopy(model).apply(qbench.disable_fast_path)
    if off == "path":
        model.apply(qbench.disable_fast_path)
    elif off == "parameters":
        monkeypatch.setattr(fast_parameters, "_learned_parameters", lambda *_: None)
        model = copy.deepcopy(model)  # nothing is known of it yet
    else:
        layer: Any = model.get_submodule("first.0")
        layer.weight.data = layer.weight.detach().transpose(0, 1).contiguous().transpose(0, 1)
    calls = served(monkeypatch)
    found, expected = model(batches()[0]), other(batches()[0])
    found.square().mean().backward()
    expected.square().mean().backward()
    assert len(calls) == {"path": 0, "parameters": 0, "layout": 1}[off]
    assert int((found != expected).sum()) == 0
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None
        assert (ours.grad - theirs.grad).abs().max() <= 1e-3 * theirs.grad.abs().max() + 1e-7


@pytest.mark.parametrize("memory_format", FORMATS[4], ids=str)
@pytest.mark.parametrize("method", ["lsq", "lsq_plus", "pact", "tqt"])
def test_learned_grids_have_the_codes_and_gradients_of_the_steps(
    method: str, memory_format: torch.memory_format
) -> None:
    assert paths_of_learned_grids(method, memory_format) == {"native"}


@pytest.mark.parametrize("memory_format", FORMATS[4], ids=str)
def test_parameters_are_those_of_the_plain_path(memory_format: torch.memory_format) -> None:
    qconfig, generator, silenced = qbench.get_qconfig(), torch.Generator().manual_seed(0), 0
    for shape in ((24, 16, 3, 3), (9, 1, 5, 5), (64, 32, 1, 1)):
        weight = torch.randn(shape, generator=generator).contiguous(memory_format=memory_format)
        weight[1] = 0.0
        gamma, beta, mean, bias = torch.randn(4, shape[0], generator=generator)
        gamma[2], beta[3], beta[4] = 0.0, 1e7, 40.0
        var = torch.rand(shape[0], generator=generator) + 1e-4
        folding = Folding(WeightLayout(), qconfig.make_weight(axis=0, weight=weight), qconfig.make_bias())
        for scale in (None, torch.tensor(0.02), torch.tensor(3e-7)):
            for own in (None, bias):
                for affine in ((gamma, beta), (None, None)):
                    bn = BatchNormTensors(*affine, mean, var, 1e-3)
                    functions = fast_parameters.native_parameters(folding, weight, bn.eps)
                    assert functions is not None
                    value, step, error, silent, _ = functions(weight, own, *affine, mean, var, scale) or [None] * 5
                    plain = training_parameters(folding, weight, own, bn, scale)
                    assert plain.qparams is not None and step is not None and value is not None and silent is not None
                    assert same_bits(value, plain.weight) and value.stride() == weight.stride()
                    assert same_bits(step, plain.qparams.scale) and same_bits(error, plain.error)
                    assert silent.any() == (plain.silenced is not None and plain.silenced.any())
                    silenced += int(silent.sum())
                    again = torch.empty_like(weight)
                    assert functions.again(weight, step, again) and torch.equal(again, value)
                    # In contiguous memory, whatever that of W is, and back.
                    room, other = torch.full(shape, math.nan), torch.full(shape, math.nan)
                    turned = functions(weight, own, *affine, mean, var, scale, room)
                    assert turned is not None and turned.value is room and torch.equal(room, value)
                    assert functions.again(weight, step, other) and torch.equal(other, value)
                    back = functions.in_order_of(weight, other.clone())
                    assert torch.equal(back, value) and back.stride() == weight.stride()
    assert silenced > 3


@pytest.mark.parametrize("low_memory", [False, True], ids=["", "low memory"])
@pytest.mark.parametrize("options", [{}, {"method": "lsq"}], ids=["", "lsq"])
def test_large_weights_with_channels_last_are_turned_on_small_maps(
    options: dict[str, str], low_memory: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Convolutions are faster on contiguous memory there; nothing outside of them sees it."""
    case = case_named("conv bn")
    layer, _ = make_layer(case, config=qbench.get_qconfig(**options))
    layer = layer.to(memory_format=torch.channels_last).train().apply(qbench.enable_fast_path)
    if low_memory:
        layer.apply(qbench.enable_low_memory)
    x = batch(case.shape, seed=5)[:, :, :5, :5].contiguous(memory_format=torch.channels_last)
    seen: list[bool] = []
    plain = layer_step.Convolution.__call__

    def noted(linear: layer_step.Convolution, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        seen.append(x.is_contiguous() and weight.is_contiguous())
        return plain(linear, x, weight, bias)

    monkeypatch.setattr(layer_step.Convolution, "__call__", noted)
    monkeypatch.setattr(layer_step, "KEPT_WEIGHTS", 20)
    monkeypatch.setattr(layer_step, "KEPT_WEIGHTS_LOW_MEMORY", 20)
    layer(x).square().sum().backward()  # now there are ranges, and starts of what is learned
    layer.zero_grad()
    found = []
    for small in (32, 0):
        monkeypatch.setattr(layer_step, "_SMALL_MAP", small)
        one, given = copy.deepcopy(layer), x.clone().requires_grad_()
        seen.clear()
        out = one(given)
        assert seen == [small > 0] and one.path == "native"
        out.square().sum().backward()
        found.append([out.detach(), given.grad, *(p.grad for p in one.parameters()), *one.state_dict().values()])
    assert len(found[0]) > 12
    for ours, theirs in zip(*found, strict=True):
        assert ours is not None and theirs is not None and ours.stride() == theirs.stride()
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()) + 1e-6)


@pytest.mark.parametrize("case", [case for case in CASES if case.has_bn], ids=lambda case: case.name)
@pytest.mark.parametrize("low_memory", [False, True], ids=["", "low memory"])
def test_a_layer_trains_as_by_generated_code(case: Case, low_memory: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nearly: sums are taken in another order."""
    monkeypatch.setattr(layer_step, "KEPT_WEIGHTS", 20)
    layer, _ = make_layer(case)
    layer.apply(qbench.enable_fast_path)
    if low_memory:
        layer.apply(qbench.enable_low_memory)
    found = []
    for native in (True, False):
        one = copy.deepcopy(layer).train()
        if not native:
            without_native(monkeypatch)
        x = batch(case.shape, seed=5).requires_grad_()
        y = one(x)
        y.square().mean().backward()
        assert one.path in (("native", "fused", "steps") if native else ("generated", "fused", "steps"))
        found.append([y.detach(), x.grad, *(p.grad for p in one.parameters()), *one.state_dict().values()])
    step = layer.output_quantizer.scale if layer.output_quantizer is not None else torch.tensor(1.0)
    assert (found[0][0] - found[1][0]).abs().max() <= 1.01 * step
    for ours, theirs in zip(found[0][1:], found[1][1:], strict=True):
        if isinstance(ours, Tensor) and ours.is_floating_point():
            torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05 * float(theirs.abs().max()) + 1e-6)


@pytest.mark.parametrize("memory_format", FORMATS[4], ids=str)
def test_training_is_that_of_the_plain_path(memory_format: torch.memory_format) -> None:
    model = prepared(network()).to(memory_format=memory_format)  # type: ignore[call-overload]
    data = batches(memory_format)
    plain, expected = trained(model, data)
    fast, found = trained(model.apply(qbench.enable_fast_path), data)
    assert list(qbench.training_paths(fast).layers.values()) == ["native"] * 3
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).abs().mean() < 1e-2 * theirs.abs().mean()
    for (name, value), other in zip(fast.state_dict().items(), plain.state_dict().values(), strict=True):
        if value.is_floating_point():
            torch.testing.assert_close(value, other, rtol=2e-2, atol=2e-3, msg=name)
        else:
            assert torch.equal(value, other), name
    fast.eval()
    program = qbench.convert(fast, example_inputs=(data[0],))
    assert int((fast(data[0]) != program.module()(data[0])).sum()) == 0


@pytest.mark.parametrize("threads", [1, 3])
def test_the_same_step_has_the_same_bits_whenever_it_is_taken(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for memory_format in FORMATS[4]:
            model = prepared(network()).to(memory_format=memory_format).apply(qbench.enable_fast_path)  # type: ignore[call-overload]
            runs = [trained(model, batches(memory_format))[0].state_dict() for _ in range(3)]
            for other in runs[1:]:
                assert all(map(torch.equal, runs[0].values(), other.values()))
    finally:
        torch.set_num_threads(before)


def scattered(layer: QatLayer) -> None:
    layer.bn.weight = nn.Parameter(torch.ones(24)[::2])


def several_uses(layer: QatLayer) -> None:
    assert layer.output_quantizer is not None
    layer.output_quantizer.observer.expect(2)


def cumulative(layer: QatLayer) -> None:
    layer.bn.momentum = None


@pytest.mark.parametrize(
    ("change", "path"),
    [(scattered, "generated"), (several_uses, "generated"), (cumulative, "steps")],
    ids=["γ with gaps in memory", "an observer of several uses", "a cumulative average"],
)
def test_what_it_cannot_serve_is_served_by_another_path(change: Callable[[QatLayer], None], path: str) -> None:
    model = prepared(network()).apply(qbench.enable_fast_path)
    layer = next(module for module in model.modules() if isinstance(module, QatLayer))
    change(layer)
    y = layer(batches()[0])
    y.square().mean().backward()
    assert layer.path == path and torch.isfinite(y).all()


def test_one_value_a_channel_is_refused_by_batch_norm_itself() -> None:
    case = case_named("conv bias bn")
    layer, _ = make_layer(case)
    layer.apply(qbench.enable_fast_path)
    pixels = layer.kernel_size[0] - 2 * layer.padding[0]
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        layer(torch.randn(1, case.shape[1], pixels, pixels))


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has asked for nothing."""
    for module, name in ((steps_module, "following"), (fast_parameters, "_native_parameters")):
        getattr(module, name).cache_clear()
    monkeypatch.setattr(epilogue_module, "following", steps_module.following.__wrapped__)
    yield
    for module, name in ((steps_module, "following"), (fast_parameters, "_native_parameters")):
        getattr(module, name).cache_clear()


def test_without_it_generated_code_goes_on_with_one_quiet_line(
    fresh: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(*_: object) -> object:
        raise RuntimeError("no FMA")

    library_module.library.cache_clear()
    monkeypatch.setattr(library_module, "_compiled", failing)
    try:
        with caplog.at_level(logging.INFO, "qbench"):
            fast, _ = trained(prepared(network()).apply(qbench.enable_fast_path), batches())
    finally:
        library_module.library.cache_clear()
    paths = qbench.training_paths(fast)
    assert set(paths.layers.values()) == {"generated"} and any("no FMA" in line for line in paths.refused)
    assert [record.levelno for record in caplog.records if record.name == "qbench"] == [logging.INFO]


def test_other_bits_than_those_of_operators_are_not_taken(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    functions = library_module.library()
    assert functions is not None

    def nearly(*arguments: Any) -> None:
        functions.forward(*arguments)
        arguments[-2].mul_(1.0000002)

    monkeypatch.setattr(steps_module, "library", lambda: functions._replace(forward=nearly))
    model, _ = trained(prepared(network()).apply(qbench.enable_fast_path), batches())
    assert set(qbench.training_paths(model).layers.values()) == {"generated"}

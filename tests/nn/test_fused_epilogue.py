"""The fused epilogue against the same steps one by one: values, gradients, statistics and ranges, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import qbench
from qbench.errors import NumericsError
from qbench.nn.qat.layer import QatLayer
from qbench.numerics import blocks, fused
from qbench.observers import MinMaxObserver, PercentileObserver

CHANNELS = 12


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few images each."""
    monkeypatch.setattr(blocks, "BLOCK", 512)
    monkeypatch.setattr(blocks, "_largest_cache", lambda: 0)


def conv_net(*after: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    second = nn.Conv2d(CHANNELS, 5, 3, bias=False)
    return nn.Sequential(nn.Conv2d(3, CHANNELS, 3), *after, second, nn.BatchNorm2d(5))


def prepared(model: nn.Module, **options: object) -> nn.Module:
    images = torch.randn(2, 3, 9, 9)
    qconfig = qbench.get_qconfig(**options)  # type: ignore[arg-type]
    return qbench.prepare_qat(qbench.fuse(model), qconfig=qconfig, example_inputs=(images,))


def batches(count: int = 3, memory_format: torch.memory_format = torch.contiguous_format) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(6, 3, 9, 9, generator=generator) * 2).contiguous(memory_format=memory_format) for _ in range(count)
    ]


def trained(model: nn.Module, images: list[Tensor]) -> tuple[nn.Module, list[Tensor]]:
    """Outputs and input gradients of each step, and the model behind them."""
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    found = []
    for x in images:
        x = x.clone().requires_grad_()
        y = model(x)
        generator = torch.Generator().manual_seed(2)
        # In the layout of y: a sum over another one has other roundings.
        y.backward(torch.empty_like(y).copy_(torch.randn(y.shape, generator=generator)))
        assert x.grad is not None
        found += [y.detach(), x.grad]
        optimizer.step()
    return model, found


def step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """No function that does several steps, nor one that saves a mask."""
    for place in ("nn.qat.step", "nn.qat.epilogue", "numerics.straight_through"):
        monkeypatch.setattr(f"qbench.{place}.at_hand", lambda _: False)


def counting(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often the fused functions are called."""
    calls: list[int] = []

    def counted(plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: object) -> Tensor:
            calls.append(1)
            return plain(*args)

        return call

    for plain in (fused.normalize_clip_quantize, fused.clip_quantize):
        monkeypatch.setattr(fused, plain.__name__, counted(plain))
    return calls


def assert_same(one: nn.Module, other: nn.Module) -> None:
    for (name, value), expected in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(value, expected), name


CHAINS: dict[str, Callable[[], list[nn.Module]]] = {
    "bn": lambda: [nn.BatchNorm2d(CHANNELS)],
    "bn, relu": lambda: [nn.BatchNorm2d(CHANNELS), nn.ReLU()],
    "bn, relu6": lambda: [nn.BatchNorm2d(CHANNELS), nn.ReLU6()],
    "bn, hardtanh": lambda: [nn.BatchNorm2d(CHANNELS), nn.Hardtanh(-0.5, 0.75)],
    "bn, hardswish": lambda: [nn.BatchNorm2d(CHANNELS), nn.Hardswish()],
    "bn without affine, relu": lambda: [nn.BatchNorm2d(CHANNELS, affine=False), nn.ReLU()],
    "relu": lambda: [nn.ReLU()],
    "relu6": lambda: [nn.ReLU6()],
}


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("chain", CHAINS)
def test_same_bits_as_the_steps_one_by_one(
    chain: str, memory_format: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = prepared(conv_net(*CHAINS[chain]()))
    images = batches(memory_format=memory_format)
    calls = counting(monkeypatch)
    one, found = trained(model, images)
    wanted_calls = (3 if chain == "bn, hardswish" else 2) * len(images)  # it is a module of its own, behind a quantizer
    assert len(calls) == wanted_calls
    step_by_step(monkeypatch)
    other, expected = trained(model, images)
    assert len(calls) == wanted_calls
    for value, wanted in zip(found, expected, strict=True):
        assert torch.equal(value, wanted)
    assert_same(one, other)


@pytest.mark.parametrize(
    "options",
    [
        {"observer": MinMaxObserver},
        {"observer": PercentileObserver},
        {"activation_bits": 4, "target": "academic"},
        {"target": "tensorrt"},
        {"method": "pact"},
    ],
    ids=str,
)
def test_same_bits_with_other_quantizers(options: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    model = prepared(conv_net(nn.BatchNorm2d(CHANNELS), nn.ReLU()), **options)
    one, found = trained(model, batches())
    step_by_step(monkeypatch)
    other, expected = trained(model, batches())
    assert all(map(torch.equal, found, expected))
    assert_same(one, other)


def test_gradients_of_learned_scales_differ_in_the_order_of_their_sums_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = prepared(conv_net(nn.BatchNorm2d(CHANNELS), nn.ReLU()), method="lsq")
    one, found = trained(model, batches(1))
    step_by_step(monkeypatch)
    other, expected = trained(model, batches(1))
    assert all(map(torch.equal, found, expected))
    for (name, value), wanted in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-6, atol=1e-9, msg=name)


def test_values_outside_the_range_get_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    model = prepared(conv_net(nn.BatchNorm2d(CHANNELS), nn.ReLU()))
    model.train()(batches()[0] * 0.01)
    model.apply(qbench.disable_observer)
    for quantizer in model.modules():
        if isinstance(quantizer, qbench.fake_quantize.FakeQuantize) and not quantizer.stateless:
            quantizer.scale.mul_(0.25)  # three quarters of the range are clipped now
    one, found = trained(model, batches())
    step_by_step(monkeypatch)
    other, expected = trained(model, batches())
    assert all(map(torch.equal, found, expected))
    assert_same(one, other)


@pytest.mark.parametrize("where", ["bn", "activation_module", "output_quantizer"])
def test_a_hook_is_called(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = prepared(conv_net(nn.BatchNorm2d(CHANNELS), nn.ReLU()))
    layer = next(m for m in model.modules() if isinstance(m, QatLayer))
    calls = counting(monkeypatch)
    seen: list[str] = []
    layer.get_submodule(where).register_forward_hook(lambda *_: seen.append(where))
    model.train()(batches()[0])
    assert seen == [where]
    assert len(calls) == 1  # the other layer


def test_an_activation_of_another_kind_is_not_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Odd(nn.ReLU):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) + 1

    model = prepared(conv_net(nn.BatchNorm2d(CHANNELS), nn.ReLU()))
    layer = next(m for m in model.modules() if isinstance(m, QatLayer))
    layer.activation_module = Odd()
    calls = counting(monkeypatch)
    model.train()(batches()[0])
    assert len(calls) == 1


@pytest.mark.parametrize("repeats", [True, False])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 3, 1, 2), (0, 2, 1, 3)])
def test_forward_and_backward_see_the_same_value(
    repeats: bool, order: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where PyTorch's BatchNorm rounds otherwise in training, the forward takes the values that backward will."""
    if not repeats:
        monkeypatch.setattr(fused, "_repeats_batch_norm", lambda _: False)
    torch.manual_seed(0)
    y = torch.randn(CHANNELS, CHANNELS, CHANNELS, CHANNELS).permute(order)
    gamma, shift = torch.randn(CHANNELS), torch.randn(CHANNELS)
    statistics = fused.Statistics(torch.zeros(CHANNELS), torch.ones(CHANNELS), 0.1, 1e-5)
    out, mean, inverse, factor, constant = fused._batch_norm(y, gamma, shift, statistics)
    assert torch.equal(out, fused._normalize(y, factor, constant, torch.empty_like(y)))
    wide = (1, -1, 1, 1)
    assert torch.allclose(out, (y - mean.view(wide)) * (inverse * gamma).view(wide) + shift.view(wide), atol=1e-5)


def test_a_broken_activation_is_seen() -> None:
    model = prepared(conv_net(nn.BatchNorm2d(CHANNELS), nn.ReLU())).train()
    images = batches()[0]
    images[0, 0, 0, 0] = float("nan")
    assert bool(model(images).isnan().any())
    with pytest.raises(NumericsError):
        qbench.convert(model.eval(), (images,))


def test_only_the_convolution_output_and_small_tensors_are_saved() -> None:
    model = prepared(conv_net(nn.BatchNorm2d(CHANNELS), nn.ReLU())).train()
    model(batches()[0])
    layer = next(m for m in model.modules() if isinstance(m, QatLayer))
    saved: list[Tensor] = []
    x = batches()[0].requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = layer(x)
    large = {t.data_ptr(): t for t in saved if t.numel() == y.numel()}
    assert [t.dtype for t in large.values()] == [torch.float32]


class Residual(nn.Module):
    """A block whose branches meet in sums, one of them rectified, one broadcast."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, CHANNELS, 3, padding=1)
        self.second = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.offset = nn.Parameter(torch.randn(1, CHANNELS, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = torch.relu(x + self.second(x))
        return (x - self.second(x)) + self.offset


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_sums_have_the_bits_of_the_steps_one_by_one(
    memory_format: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = prepared(Residual())
    images = batches(memory_format=memory_format)
    calls = counting(monkeypatch)
    one, found = trained(model, images)
    assert len(calls) == len(images) * (2 + 3 + 1)  # two layers, one of them twice, and three sums
    step_by_step(monkeypatch)
    other, expected = trained(model, images)
    assert all(map(torch.equal, found, expected))
    assert_same(one, other)


def test_a_sum_saves_one_byte_a_value() -> None:
    layer = qbench.nn.qat.AddReLU(qconfig=qbench.get_qconfig()).train()
    sources = tuple(layer.qconfig.make_activation() for _ in range(2))
    layer.connect(sources, owned=(0, 1))
    layer.train()
    a, b = (torch.randn(4, 3, 5, 5).requires_grad_() for _ in range(2))
    layer(a, b)
    saved: list[Tensor] = []
    layer.connect(sources)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = layer(a * 1, b * 1)
    assert [t.dtype for t in saved if t.numel() == y.numel()] == [torch.int8]


def test_inputs_are_not_written_to() -> None:
    model = prepared(Residual()).train()
    x = batches()[0]
    before = x.clone()
    model(x)
    assert torch.equal(x, before)

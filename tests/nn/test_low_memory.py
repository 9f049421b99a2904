"""What is saved for backward as codes: the same gradients, bit for bit, from a quarter of the bytes."""

from __future__ import annotations

import copy
import dataclasses
import gc
import pickle

import pytest
import torch
from torch import Tensor, nn

import qbench
from qbench.fake_quantize.producers import codes_of
from qbench.nn.qat.layer import QatLayer
from qbench.numerics import blocks
from qbench.numerics.generated_codes import encoder
from qbench.numerics.qparams import QParams, QSpec
from qbench.numerics.saved_codes import Coded, SavingCodes, encode
from qbench.profiling import saved_for_backward

from .support import CASES, Case, batch, make_layer, without_native


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK", 64)
    monkeypatch.setattr(blocks, "_largest_cache", lambda: 0)


def gradients(layer: nn.Module, x: Tensor) -> tuple[list[Tensor], int]:
    """The output, the gradients of input and parameters, and the bytes of distinct storages that were saved."""
    layer = copy.deepcopy(layer)
    x = x.clone().requires_grad_()
    y, saved = saved_for_backward(lambda: layer(x))
    torch.manual_seed(3)
    y.backward(torch.randn(y.shape))
    found = [y.detach(), x.grad, *(parameter.grad for parameter in layer.parameters())]
    return [tensor for tensor in found if tensor is not None], saved


@pytest.mark.parametrize("frozen", [False, True], ids=["training", "frozen"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_same_gradients(case: Case, frozen: bool) -> None:
    layer, _ = make_layer(case)
    layer.train()
    if frozen:
        layer.apply(qbench.freeze_bn_stats)
    x = batch(case.shape, seed=5)
    expected, _ = gradients(layer, x)
    layer.apply(qbench.enable_low_memory)
    found, _ = gradients(layer, x)
    assert len(found) == len(expected) > 2
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("options", [{"weight_bits": 4}, {"method": "lsq"}, {"target": "tensorrt"}], ids=str)
def test_same_gradients_with_other_quantizers(options: dict[str, object]) -> None:
    case = next(case for case in CASES if case.name == "conv bias bn")
    layer, _ = make_layer(case, **options)
    layer.train()
    x = batch(case.shape, seed=5)
    expected, _ = gradients(layer, x)
    layer.apply(qbench.enable_low_memory)
    found, _ = gradients(layer, x)
    assert all(map(torch.equal, found, expected))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(part for _ in range(4) for part in (nn.Conv2d(16, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU()))
        )

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.body(x)
        return found


def test_saved_bytes_of_a_network() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 16, 40, 40)
    model = qbench.prepare_qat(qbench.fuse(Net()), qconfig=qbench.get_qconfig(), example_inputs=(x,)).train()
    model(x)
    expected, plain = gradients(model, x)
    model.apply(qbench.enable_low_memory)
    found, small = gradients(model, x)
    assert all(map(torch.equal, found, expected))
    float_model = Net().train()
    _, in_float = gradients(float_model, x)
    assert plain < 1.05 * in_float
    assert small < 0.75 * in_float
    model.apply(qbench.disable_low_memory)
    assert gradients(model, x)[1] == plain


@pytest.mark.parametrize("low_memory", [False, True])
def test_real_values_do_not_outlive_the_forward(low_memory: bool) -> None:
    """What is saved as codes is freed: neither autograd nor a hook of ours holds the activation."""
    x = torch.randn(2, 16, 12, 12)
    model = qbench.prepare_qat(qbench.fuse(Net()), qconfig=qbench.get_qconfig(), example_inputs=(x,)).train()
    model.apply(qbench.enable_low_memory if low_memory else qbench.disable_low_memory)
    storages: list[int] = []
    for layer in model.modules():
        if isinstance(layer, QatLayer):
            layer.register_forward_hook(lambda _, __, out: storages.append(out.untyped_storage()._weak_ref()))
    y = model(x)
    gc.collect()
    *inside, last = [not torch.UntypedStorage._expired(storage) for storage in storages]
    assert inside == [not low_memory] * 3
    assert last and y.requires_grad


def test_switches_reach_every_layer_and_do_not_reach_the_float_model() -> None:
    model = qbench.prepare_qat(
        qbench.fuse(Net()), qconfig=qbench.get_qconfig(), example_inputs=(torch.randn(2, 16, 12, 12),)
    )
    model.apply(qbench.enable_low_memory)
    layers = [m for m in model.modules() if isinstance(m, QatLayer)]
    assert layers and all(layer.low_memory for layer in layers)
    assert all(layer.low_memory for layer in copy.deepcopy(model).modules() if isinstance(layer, QatLayer))
    assert not hasattr(layers[0].to_float()[0], "low_memory")
    model.apply(qbench.disable_low_memory)
    assert not any(layer.low_memory for layer in layers)


def grid(scale: float, zero_point: int) -> QParams:
    return QParams(torch.tensor(scale), torch.tensor(zero_point, dtype=torch.int32), 0, 255)


def test_codes_are_the_value() -> None:
    qparams = grid(0.0371, 131)
    x = (torch.arange(256).float() - 131).reshape(4, 64) * qparams.scale
    coded = encode(x, qparams)
    assert coded is not None
    assert coded.codes.dtype == torch.int8
    assert torch.equal(coded.value(), x)


@pytest.mark.parametrize(
    "moved", [grid(0.05, 131), grid(0.0371, 0)], ids=["a scale that moved on", "a zero point that moved on"]
)
def test_what_lies_on_another_grid_is_kept_as_it_is(moved: QParams) -> None:
    x = (torch.arange(256).float() - 131).reshape(4, 64) * torch.tensor(0.0371)
    assert encode(x, moved) is None


def test_views_and_transposes_of_what_is_known_are_saved_as_codes() -> None:
    torch.manual_seed(0)
    qparams = grid(0.5, 100)
    x = (torch.randint(-100, 155, (2, 3, 8)).float() * 0.5).requires_grad_()
    weight = (torch.randint(-100, 155, (5, 8)).float() * 0.5).requires_grad_()
    expected = torch.autograd.grad(nn.functional.linear(x, weight).square().sum(), (x, weight))
    kept: list[object] = []
    saving = SavingCodes((x, qparams), (weight, qparams))
    pack = saving.pack_hook
    saving.pack_hook = lambda tensor: kept.append(found := pack(tensor)) or found
    with saving:
        y = nn.functional.linear(x, weight)
    found = torch.autograd.grad(y.square().sum(), (x, weight))
    assert all(map(torch.equal, found, expected))
    assert kept and not any(isinstance(value, Tensor) for value in kept)


def test_gaps_between_values_are_left_alone() -> None:
    wide = torch.zeros(4, 6).fill_(0.5)
    x = wide[:, ::2].requires_grad_()
    with SavingCodes((x, grid(0.5, 100))):
        y = x * x
    y.sum().backward()
    assert x.grad is not None
    assert bool((x.grad == 1.0).all())


@pytest.mark.parametrize("axis", [None, 0])
def test_generated_code_finds_the_same_codes(axis: int | None) -> None:
    assert encoder("cpu").ready()
    torch.manual_seed(0)
    steps = torch.randint(-128, 128, (9, 6, 5, 3)).float()
    scale = torch.rand(9) + 0.01 if axis == 0 else torch.tensor(0.037)
    zero_point = torch.zeros(9, dtype=torch.int32) if axis == 0 else torch.tensor(-7, dtype=torch.int32)
    grid = QParams(scale, zero_point, -128, 127, axis)
    x = (steps - zero_point.max()) * grid.spread(scale, steps)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        values = x.contiguous(memory_format=memory_format)
        found = [encode(values, grid, fast_path=fast) for fast in (False, True)]
        assert found[0] is not None and found[1] is not None
        assert torch.equal(found[0].codes, found[1].codes) and torch.equal(found[1].value(), x)
        assert found[1].codes.stride() == values.stride()
        for wrong in (values * 1.0000002, values + 0.001, values.clone().fill_(float("nan"))):
            assert encode(wrong, grid, fast_path=True) is None


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 4, 3)
        )

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.body(x)
        return found


@pytest.mark.parametrize("fast", [False, True], ids=["plain", "fast"])
def test_max_pools_keep_codes(fast: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 26, 26)
    model = qbench.prepare_qat(qbench.fuse(Pooled()), qconfig=qbench.get_qconfig(), example_inputs=(x,)).train()
    model.apply(qbench.enable_fast_path if fast else qbench.disable_fast_path)
    model(x)
    expected, plain = gradients(model, x)
    model.apply(qbench.enable_low_memory)
    found, small = gradients(model, x)
    assert all(map(torch.equal, found, expected))
    output, pooled = 4 * 16 * 24 * 24, 4 * 16 * 12 * 12
    # A byte in place of four: of what goes into the pool, and of what goes into the second convolution.
    assert plain - small > 3 * output + 2 * pooled
    pool = model.body[3]
    assert isinstance(pool, nn.MaxPool2d) and type(pool) is not nn.MaxPool2d
    assert type(pickle.loads(pickle.dumps(pool))) is type(pool)
    program = qbench.convert(copy.deepcopy(model).eval(), (x,))
    assert torch.equal(program.module()(x), copy.deepcopy(model).eval()(x))
    model.apply(qbench.disable_low_memory)
    assert type(pool) is nn.MaxPool2d
    assert gradients(model, x)[1] == plain


@pytest.mark.parametrize("path", ["native", "generated"])
@pytest.mark.parametrize("signed", [False, True], ids=["uint8", "int8"])
def test_codes_that_a_layer_writes_are_those_of_its_output(
    signed: bool, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if path == "generated":
        without_native(monkeypatch)
    torch.manual_seed(0)
    x = torch.randn(4, 16, 12, 12)
    spec = QSpec(signed=signed)
    qconfig = dataclasses.replace(qbench.get_qconfig(), activation=spec)
    model = qbench.prepare_qat(qbench.fuse(Net()), qconfig=qconfig, example_inputs=(x,)).train()
    model.apply(qbench.enable_fast_path).apply(qbench.enable_low_memory)
    layers = [layer for layer in model.modules() if isinstance(layer, QatLayer)]
    noted: list[tuple[Tensor, Coded | None, QParams]] = []
    for layer in layers:
        quantizer = layer.output_quantizer
        assert quantizer is not None
        layer.register_forward_hook(
            lambda _, __, out, quantizer=quantizer: noted.append((out.detach(), codes_of(out), quantizer.snapshot()))
        )
    model(x)
    assert [layer.path for layer in layers] == [path] * 4
    for out, coded, grid in noted:
        assert coded is not None and torch.equal(coded.value(), out)
        expected = encode(out, grid)
        assert expected is not None and torch.equal(coded.codes, expected.codes)
        assert coded.codes.stride() == out.stride() and coded.codes.unique().numel() > 50

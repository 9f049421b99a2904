"""Cross-layer equalization: the float output stays, the error of per-tensor weight codes falls."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import qbench
from qbench.errors import ConfigError
from qbench.numerics.fold import WeightLayout
from qbench.numerics.qparams import QSpec, choose_qparams, fake_quantize
from qbench.ptq.chains import Layer
from qbench.ptq.equalization import balance, first_range, second_range
from tests.models import Calls, assert_exact, conv_bn, evaluate, images, leaves, randomise_statistics


def unbalanced(model: nn.Module, orders: float = 2.0) -> nn.Module:
    """Weights whose output channels differ by some orders of magnitude."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, (nn.modules.conv._ConvNd, nn.Linear)):
                axis = 1 if isinstance(layer, nn.modules.conv._ConvTransposeNd) else 0
                sizes = 10 ** (orders * torch.rand(layer.weight.shape[axis], generator=generator))
                shape = [-1 if i == axis else 1 for i in range(layer.weight.ndim)]
                layer.weight.mul_(sizes.reshape(shape))
    return randomise_statistics(model)


def mobile() -> nn.Module:
    """Convolution, depthwise, convolution, as in MobileNet, with an activation that scales."""
    parts = [*conv_bn(3, 8), nn.ReLU(), *conv_bn(8, 8, groups=8), nn.ReLU(inplace=True), *conv_bn(8, 6, 1)]
    return nn.Sequential(*parts)


MODELS: dict[str, tuple[Callable[[], nn.Module], list[tuple[str, str, int]]]] = {
    "depthwise chain": (mobile, [("0", "3", 8), ("3", "6", 8)]),
    "without BatchNorm": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)),
        [("0", "2", 8)],
    ),
    "groups": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 12, 1), nn.LeakyReLU(), nn.Conv2d(12, 6, 3, groups=3), nn.Conv2d(6, 12, 1, groups=2),
            nn.PReLU(12), nn.Conv2d(12, 24, 1, groups=12),
        ),
        [("0", "2", 12), ("2", "3", 6), ("3", "5", 12)],
    ),
    "transposed": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 1), nn.ReLU(), nn.ConvTranspose2d(8, 6, 2, groups=2), nn.BatchNorm2d(6), nn.ReLU(),
            nn.ConvTranspose2d(6, 9, 2, groups=3), nn.ReLU(), nn.Conv2d(9, 4, 1),
        ),
        [("0", "2", 8), ("2", "5", 6), ("5", "7", 9)],
    ),
    "pool, pad, flatten, linear": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 5, 3), nn.ReLU(), nn.MaxPool2d(2), nn.ZeroPad2d(1), nn.AdaptiveAvgPool2d(2), nn.Dropout(),
            nn.Flatten(), nn.Linear(20, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 3, bias=False),
        ),
        [("0", "7", 5), ("7", "10", 7)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("fused", [False, True])
def test_output_stays_and_pairs_are_found(name: str, fused: bool) -> None:
    torch.manual_seed(0)
    make, expected = MODELS[name]
    model = unbalanced(make()).train()
    model = qbench.fuse(model) if fused else model
    before = {k: v.clone() for k, v in model.state_dict().items()}
    new, report = qbench.ptq.equalize(model, example_inputs=(images(),))
    assert [(p.first.split(".")[0], p.second.split(".")[0], p.channels) for p in report.pairs] == expected
    assert report.converged
    assert new.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    x = images(seed=11)
    old, now = evaluate(model.double(), x.double()), evaluate(new.double(), x.double())
    # The factors themselves are float32: each channel is multiplied and divided by the same one, rounded.
    assert float((now - old).abs().max()) <= 64 * torch.finfo(torch.float32).eps * float(old.abs().max())


def per_tensor_error(model: nn.Module) -> float:
    """Squared error of 8-bit per-tensor codes of each layer's folded weight, relative to each channel."""
    spec, total = QSpec(bits=8, symmetric=True, narrow=True), 0.0
    for conv, bn in pairwise(model):
        if isinstance(conv, nn.Conv2d) and isinstance(bn, nn.BatchNorm2d):
            assert bn.running_var is not None
            folded = (conv.weight * (bn.weight / (bn.running_var + bn.eps).sqrt()).reshape(-1, 1, 1, 1)).detach()
            error = fake_quantize(folded, choose_qparams(folded.min(), folded.max(), spec)) - folded
            total += float((error.square().sum((1, 2, 3)) / folded.square().sum((1, 2, 3))).mean())
    return total


def test_the_error_of_per_tensor_codes_falls() -> None:
    torch.manual_seed(0)
    model = unbalanced(mobile())
    new, report = qbench.ptq.equalize(model, example_inputs=(images(),))
    assert per_tensor_error(new) < 0.2 * per_tensor_error(model)
    assert all(pair.spread_after < 0.5 * pair.spread_before for pair in report.pairs)
    assert "0 -> 3" in str(report)


def test_three_layers_end_with_the_cube_root() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    first, middle, last = model[0], model[2], model[4]
    sizes = [
        first.weight.detach().abs().amax((1, 2, 3)),
        middle.weight.detach().abs().amax((1, 2, 3)),
        last.weight.detach().abs().amax((0, 2, 3)),
    ]
    wanted = (sizes[0] * sizes[1] * sizes[2]) ** (1 / 3)
    new, _ = qbench.ptq.equalize(model, example_inputs=(images(),))
    for layer, dims in ((new[0], (1, 2, 3)), (new[2], (1, 2, 3)), (new[4], (0, 2, 3))):
        torch.testing.assert_close(layer.weight.detach().abs().amax(dims), wanted, rtol=5e-3, atol=0.0)


def test_the_equation() -> None:
    first, second = torch.tensor([4.0, 1.0, 0.0, 3.0, 1e-30]), torch.tensor([1.0, 16.0, 2.0, 0.0, 1e-30])
    s = balance(first, second)
    assert s.tolist() == [2.0, 0.25, 1.0, 1.0, 1.0]
    assert torch.equal((first / s)[:2], (second * s)[:2])


def block(activation: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 3, 1), activation, nn.Conv2d(3, 3, 1))


def shared() -> nn.Module:
    conv = nn.Conv2d(3, 3, 1)
    return nn.Sequential(conv, nn.ReLU(), conv)


SKIPPED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "relu6": (lambda: block(nn.ReLU6()), "hardtanh (ReLU6 is one) is not positively homogeneous"),
    "sigmoid": (lambda: block(nn.Sigmoid()), "sigmoid reads it"),
    "no affine": (lambda: block(nn.BatchNorm2d(3, affine=False)), "no γ and β"),
    "no statistics": (lambda: block(nn.BatchNorm2d(3, track_running_stats=False)), "statistics of the batch"),
    "softmax": (lambda: block(nn.Softmax(1)), "_softmax reads it"),
    "mixes channels": (lambda: block(nn.PixelShuffle(1)), "pixel_shuffle reads it"),
    "late BatchNorm": (lambda: block(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3))), "does not follow the layer itself"),
    "twice": (shared, "is read 2 times"),
    "residual": (
        lambda: Calls(lambda m, x: m.two(y := m.one(x)) + y, one=nn.Conv2d(3, 3, 1), two=nn.Conv2d(3, 3, 1)),
        "2 operators read it",
    ),
    "computed": (
        lambda: Calls(
            lambda m, x: m.two(F.conv2d(x, m.one.weight * 2)), one=nn.Conv2d(3, 3, 1), two=nn.Conv2d(3, 3, 1)
        ),
        "computed",
    ),
    "output": (lambda: Calls(lambda m, x: (y := m.one(x), m.two(y)), one=nn.Conv2d(3, 3, 1), two=nn.Conv2d(3, 3, 1)),
               "an output of the model"),
    "padded with ones": (lambda: block(nn.ConstantPad2d(1, 1.0)), "zeros beside the pixels"),
}  # fmt: skip


@pytest.mark.parametrize("name", SKIPPED)
def test_what_cannot_be_balanced_is_named_and_stays(name: str) -> None:
    torch.manual_seed(0)
    make, reason = SKIPPED[name]
    model = make()
    new, report = qbench.ptq.equalize(model, example_inputs=(images(),))
    assert not report.pairs
    assert reason in str(report).replace("\n  ", " ")
    assert len(report.skipped) == 2
    old = model.state_dict()
    assert all(torch.equal(value, old[key]) for key, value in new.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(*(leaves(evaluate(m, images())) for m in (model, new)), strict=True))


def test_a_dead_channel_stays() -> None:
    torch.manual_seed(0)
    model = qbench.fuse(randomise_statistics(mobile()))
    with torch.no_grad():
        model[0][1].weight[2] = 0.0
    new, _ = qbench.ptq.equalize(model, example_inputs=(images(),))
    assert new[0][1].bias[2] == model[0][1].bias[2]
    assert all(bool(torch.isfinite(value).all()) for value in new.state_dict().values())


def test_exact_afterwards() -> None:
    torch.manual_seed(0)
    model, _ = qbench.ptq.equalize(qbench.fuse(unbalanced(mobile())), example_inputs=(images(),))
    qat = qbench.prepare_qat(model, qconfig=qbench.get_qconfig(), example_inputs=(images(),))
    qbench.ptq.calibrate(qat, [images()])
    assert_exact(qat.eval(), qbench.convert(qat, (images(),)), images())


def test_wrong_inputs() -> None:
    with pytest.raises(ConfigError, match=r"example_inputs=\(x,\)"):
        qbench.ptq.equalize(mobile(), example_inputs=images())  # type: ignore[arg-type]
    qat = qbench.prepare_qat(qbench.fuse(mobile()), qconfig=qbench.get_qconfig(), example_inputs=(images(),))
    with pytest.raises(ConfigError, match="equalize the float model"):
        qbench.ptq.equalize(qat, example_inputs=(images(),))


def test_ranges_by_hand() -> None:
    """Which weight belongs to which channel can be read off the numbers."""
    weight = torch.arange(1.0, 13.0).reshape(4, 3, 1, 1)
    transposed = Layer("", weight, None, WeightLayout(transposed=True, groups=2))  # 4 channels to 6
    assert first_range(transposed).tolist() == [4, 5, 6, 10, 11, 12]
    assert second_range(transposed).tolist() == [3, 6, 9, 12]
    grouped = Layer("", weight.reshape(6, 2, 1, 1), None, WeightLayout(groups=3))  # 6 channels to 6, two by two
    assert first_range(grouped).tolist() == [2, 4, 6, 8, 10, 12]
    assert second_range(grouped).tolist() == [3, 4, 7, 8, 11, 12]
    matrix = torch.tensor([[1.0, -5.0, 2.0, 3.0], [4.0, 0.0, -7.0, 6.0]])
    flattened = Layer("", matrix, None, WeightLayout(), features=2)
    assert first_range(flattened).tolist() == [5, 7]
    assert second_range(flattened).tolist() == [5, 7]

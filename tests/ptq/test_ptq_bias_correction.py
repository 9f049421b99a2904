"""Bias correction: the mean of each channel moves to that of the float model; weights and statistics stay."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import qbench
from qbench.errors import ConfigError, NumericsError, PreparationError
from qbench.nn.frozen import FrozenBatchNorm2d
from qbench.nn.qat.layer import QatLayer
from tests.models import SmallNet, assert_exact, conv_bn, images, randomise_statistics

BATCHES = [images(seed=1, batch=8), images(seed=2, batch=8)]


def calibrated(model: nn.Module, bits: int = 3, **options: object) -> nn.Module:
    qconfig = qbench.get_qconfig(weight_bits=bits, **options)  # type: ignore[arg-type]
    fused = qbench.fuse(randomise_statistics(model).train())
    qat = qbench.prepare_qat(fused, qconfig=qconfig, example_inputs=(images(),))
    qbench.ptq.calibrate(qat, BATCHES)
    return qat


MODELS: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm": SmallNet,
    "groups": lambda: nn.Sequential(
        *conv_bn(3, 6), nn.ReLU(), *conv_bn(6, 12, groups=3), nn.ReLU6(), *conv_bn(12, 4, 1)
    ),
    "transposed": lambda: nn.Sequential(
        nn.Conv2d(3, 6, 1), nn.ReLU(), nn.ConvTranspose2d(6, 4, 3, groups=2), nn.ReLU(),
        nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2), nn.BatchNorm2d(6),
    ),
    "no affine": lambda: nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, affine=False), nn.ReLU(), nn.Conv2d(6, 4, 1)
    ),
    "frozen": lambda: nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False), FrozenBatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1)
    ),
    "alone": lambda: nn.Sequential(nn.MaxPool2d(2), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 1)),
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(432, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4)),
}  # fmt: skip


def means(model: nn.Module, path: str) -> Tensor:
    """Mean of each channel of what a layer puts out, its output quantizer left out, over all batches."""
    layer, seen = model.get_submodule(path), []
    hook = layer.output_quantizer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    was = model.training
    with torch.no_grad():
        model.eval()
        for batch in BATCHES:
            model(batch)
    model.train(was)
    hook.remove()
    axis = layer.channel_axis % seen[0].ndim
    return torch.cat(seen).double().mean([dim for dim in range(seen[0].ndim) if dim != axis])


def layers(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, QatLayer)]


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_the_mean_error_of_each_channel_shrinks(name: str, sequential: bool) -> None:
    torch.manual_seed(0)
    model = calibrated(MODELS[name]())
    last = layers(model)[-1]
    model.apply(qbench.disable_fake_quant)
    wanted = means(model, last)
    model.apply(qbench.enable_fake_quant)
    before = (means(model, last) - wanted).abs()
    kept = {k: v.clone() for k, v in model.state_dict().items() if not k.endswith("bias")}
    report = qbench.ptq.correct_biases(model, BATCHES, sequential=sequential)
    after = (means(model, last) - wanted).abs()
    # The last layer's own correction is exact up to the step of its bias's grid.
    assert float(after.mean()) < (0.02 if sequential else 0.9) * float(before.mean())
    assert [layer.path for layer in report.layers] == layers(model)
    assert (report.batches, report.skipped) == (2, ())
    assert sum(layer.after for layer in report.layers) < sum(layer.before for layer in report.layers)
    now = model.state_dict()
    assert all(torch.equal(value, now[key]) for key, value in kept.items())
    assert all(module.training for module in model.modules())
    if sequential:
        assert_exact(model.eval(), qbench.convert(model, (images(),)), images())


def test_a_layer_without_bias_gets_one_and_the_report_says_so() -> None:
    torch.manual_seed(0)
    model = calibrated(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.Conv2d(4, 4, 1)))
    report = qbench.ptq.correct_biases(model, BATCHES)
    assert [(layer.where, layer.created) for layer in report.layers] == [("bias", True), ("bias", False)]
    assert isinstance(model[0].bias, nn.Parameter)
    half_a_step = float(model[0].parameter_codes().bias_scale.max()) / 2
    assert report.layers[0].after <= min(half_a_step, report.layers[0].before / 2)
    assert "bias, new" in str(report)
    assert_exact(model.eval(), qbench.convert(model, (images(),)), images())


def test_it_is_the_mean_over_batches_of_different_sizes() -> None:
    torch.manual_seed(0)
    model = calibrated(nn.Sequential(nn.Conv2d(3, 4, 3)))
    other, x = copy.deepcopy(model), images(seed=5, batch=7)
    qbench.ptq.correct_biases(model, [x[:5], x[5:]])
    qbench.ptq.correct_biases(other, [(x,)])
    torch.testing.assert_close(model[0].bias, other[0].bias, rtol=0.0, atol=1e-6)


def test_refused() -> None:
    torch.manual_seed(0)
    model = calibrated(nn.Sequential(nn.Conv2d(3, 4, 3)))
    with pytest.raises(ConfigError, match="no batch"):
        qbench.ptq.correct_biases(model, [])
    with pytest.raises(ConfigError, match="DoReFaWeight"):
        qbench.ptq.correct_biases(calibrated(nn.Sequential(nn.Conv2d(3, 4, 3)), method="dorefa"), BATCHES)
    with pytest.raises(PreparationError):
        qbench.ptq.correct_biases(SmallNet(), BATCHES)
    qat = qbench.prepare_qat(nn.Conv2d(3, 4, 3), qconfig=qbench.get_qconfig(), example_inputs=(images(),))
    with pytest.raises(NumericsError, match="calibrate"):
        qbench.ptq.correct_biases(qat, BATCHES)

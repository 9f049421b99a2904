"""Each target: a small net is prepared, trained and converted; its rules hold in the codes, the promises are kept."""

from __future__ import annotations

import dataclasses
import functools
import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qbench
from qbench.errors import QBenchWarning
from qbench.fake_quantize import FakeQuantize
from qbench.nn.qat.layer import QatLayer
from qbench.preparation import quantized_modules
from qbench.report.data import Comparison
from qbench.verification.parameters import compare_parameters
from tests.models import SmallNet, images

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in qbench.targets.names()} | {
    "snpe 8-bit bias": ("snpe", {"bias_bits": 8, "bias_scale": "own"}),
    "qnn w4a16": ("qnn", {"weight_bits": 4, "activation_bits": 16}),
    "vulkan 4 bits in groups": ("vulkan", {"weight_bits": 4, "group_size": 4}),
    "academic w2a3": ("academic", {"weight_bits": 2, "activation_bits": 3}),
}
variants = pytest.mark.parametrize("variant", VARIANTS)


@dataclasses.dataclass(frozen=True)
class Trained:
    model: nn.Module
    program: torch.export.ExportedProgram
    report: Any

    @property
    def layers(self) -> dict[str, QatLayer]:
        return {path: m for path, m in quantized_modules(self.model) if isinstance(m, QatLayer)}

    def quantizers(self) -> list[FakeQuantize]:
        return [m for m in self.model.modules() if isinstance(m, FakeQuantize) and not m.observer.stateless]

    def parameters(self) -> tuple[Comparison, ...]:
        return compare_parameters(self.layers, self.program)


def fit(model: nn.Module, steps: int = 3) -> nn.Module:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(steps):
        optimizer.zero_grad()
        model(images(seed=step)).square().mean().backward()
        optimizer.step()
    return model.eval()


@functools.cache
def trained(variant: str) -> Trained:
    name, options = VARIANTS[variant]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        if name == "vulkan":
            warnings.simplefilter("ignore", QBenchWarning)  # it leaves convolutions in float, and says so
        model = qbench.prepare_by_target(SmallNet().train(), name, example_inputs=(images(),), **options)
    fit(model)
    report = qbench.conversion_report(model)
    return Trained(model, qbench.convert(model, (images(),)), report)


def is_power_of_two(scale: Tensor) -> bool:
    return bool((torch.frexp(scale)[0] == 0.5).all())


@variants
def test_trained_codes_are_the_codes_of_the_program(variant: str) -> None:
    found = trained(variant).parameters()
    assert sum(comparison.different for comparison in found) == 0
    assert sum(comparison.compared for comparison in found) == (90 if variant.startswith("vulkan") else 1482)


@variants
def test_qat_eval_gives_the_values_of_the_program(variant: str) -> None:
    found = trained(variant)
    x = images(seed=11)
    mine, its = found.model(x), found.program.module()(x)
    assert int((mine != its).sum()) == 0
    assert mine.unique().numel() >= (2 if "w2a3" in variant else 8)


@variants
def test_codes_stay_inside_their_ranges(variant: str) -> None:
    found = trained(variant)
    for layer in found.layers.values():
        codes, spec, bias = layer.parameter_codes(), layer.weight_quantizer.spec, layer.qconfig.bias
        assert spec.qmin <= int(codes.weight.min()) and int(codes.weight.max()) <= spec.qmax
        assert codes.bias is None or int(codes.bias.abs().max()) <= bias.code_limit
    for quantizer in found.quantizers():
        quantizer.deployed_qparams().check(quantizer.label)


@pytest.mark.parametrize("variant", ["tensorrt", "tflite_16x8", "vitis", "esp_dl", "esp_dl_p4"])
def test_symmetric_activations_have_zero_point_0(variant: str) -> None:
    quantizers = trained(variant).quantizers()
    assert len(quantizers) == (6 if variant == "vitis" else 7)  # there, a pool has one grid at both ends
    assert all(int(quantizer.zero_point) == 0 for quantizer in quantizers)


@pytest.mark.parametrize("variant", sorted(set(VARIANTS) - {"snpe", "snpe 8-bit bias"}))
def test_weights_have_zero_point_0(variant: str) -> None:
    for layer in trained(variant).layers.values():
        assert not layer.parameter_codes().weight_qparams.zero_point.any()


@pytest.mark.parametrize("variant", ["vitis", "esp_dl", "esp_dl_p4"])
def test_power_of_two_targets_have_powers_of_two_everywhere(variant: str) -> None:
    found = trained(variant)
    assert all(is_power_of_two(quantizer.scale) for quantizer in found.quantizers())
    for layer in found.layers.values():
        codes = layer.parameter_codes()
        assert codes.bias_scale is not None
        assert is_power_of_two(codes.weight_qparams.scale) and is_power_of_two(codes.bias_scale)


def test_academic_has_its_first_and_last_layer_at_8_bits() -> None:
    layers = trained("academic w2a3").layers
    assert {path: layer.weight_quantizer.spec.bits for path, layer in layers.items()} == {
        "conv1": 8, "conv2": 2, "conv3": 2, "fc": 8,
    }  # fmt: skip
    assert {path: layer.sources[0].spec.bits for path, layer in layers.items() if layer.sources} == {
        "conv1": 8, "conv2": 3, "conv3": 3, "fc": 8,
    }  # fmt: skip
    assert layers["conv1"].output_quantizer.spec.bits == 3


class TestVitis:
    def test_the_shifts_of_a_trained_net_are_inside(self) -> None:
        assert trained("vitis").report.beyond_limits == ()

    @pytest.mark.parametrize(
        ("exponent", "message"),
        [
            (-40, r"conv2: requantization shift -\d+, the hardware has 0 … 16"),
            (12, r"conv2: requantization shift \d+, the hardware has 0 … 16"),
        ],
    )
    def test_a_shift_that_the_hardware_lacks_is_reported(self, exponent: int, message: str) -> None:
        torch.manual_seed(0)
        model = qbench.prepare_by_target(SmallNet().train(), "vitis", example_inputs=(images(),))
        fit(model, steps=1)
        model.get_submodule("conv2").output_quantizer.scale.fill_(2.0**exponent)
        assert "conv2" in {layer.path for layer in qbench.conversion_report(model).beyond_limits}
        with pytest.warns(QBenchWarning, match=r"outside what target vitis can shift.*conversion_report"):
            qbench.convert(model, (images(),))
        assert any(
            re.search(message, line) for line in str(qbench.conversion_report(model)).splitlines()
        )

    def test_a_bias_of_zeros_has_nothing_to_shift(self) -> None:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU())
        net[0].weight.data.mul_(1e-6)
        model = fit(qbench.prepare_by_target(net, "vitis", example_inputs=(images(),)), steps=1)
        (layer,) = qbench.conversion_report(model).layers
        assert layer.largest_bias_code == 0 and layer.beyond == ()


def large_bias(target: str, bias: float, weight: float = 1e-3) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3))
    net[0].weight.data.mul_(weight / net[0].weight.abs().max())
    net[0].bias.data.copy_(torch.tensor([bias, -bias, 0.5 * bias, 1e-3]))
    model = qbench.prepare_by_target(net, target, example_inputs=(images(),))
    model(images())
    return model.eval()


class TestWideBiases:
    def test_a_bias_beyond_int32_does_not_wrap(self) -> None:
        model = large_bias("tflite_16x8", 1000.0)
        codes = model[0].parameter_codes()
        assert codes.bias is not None and codes.bias_value is not None and codes.bias_scale is not None
        assert int(codes.bias.max()) > 2**31 and int(codes.bias.min()) < -(2**31)
        assert torch.equal(torch.sign(codes.bias).float(), torch.sign(model[0].bias))
        wide = codes.bias.abs() > 2**24  # there, the grid is finer than float32
        assert wide.tolist() == [True, True, True, False]
        assert torch.equal(codes.bias_value[wide], model[0].bias[wide])
        assert torch.equal(torch.round(codes.bias_value.double() / codes.bias_scale.double()).long(), codes.bias)
        assert qbench.conversion_report(model).coarsened == ()
        program = qbench.convert(model, (images(),))
        assert sum(c.different for c in compare_parameters({"0": model[0]}, program)) == 0
        assert int((program.module()(images()) != model(images())).sum()) == 0

    def test_the_pass_that_stores_int32_says_what_saturates(self) -> None:
        program = qbench.convert(large_bias("tflite_16x8", 1000.0), (images(),))
        (saturated,) = qbench.passes.quantize_bias(program).saturated
        assert saturated

    @pytest.mark.parametrize(("target", "limit"), [("esp_dl", 2**19 - 1), ("esp_dl_p4", 2**22), ("tflite", 2**22)])
    def test_a_bias_that_is_too_large_coarsens_the_weights_and_says_so(self, target: str, limit: int) -> None:
        model = large_bias(target, 4e3, weight=1.0)
        codes = model[0].parameter_codes()
        assert codes.bias is not None and limit // 4 < int(codes.bias.abs().max()) <= limit
        assert is_power_of_two(codes.weight_qparams.scale) is (target != "tflite")
        (layer,) = qbench.conversion_report(model).coarsened
        assert layer.largest_coarsening >= 2
        with pytest.warns(QBenchWarning, match="needs coarser weights"):
            qbench.convert(model, (images(),))

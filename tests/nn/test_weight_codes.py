"""Weight codes: one definition in train, eval and the deployed form; channels that are zero, negative or floored."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qbench
from qbench.errors import NumericsError
from qbench.nn import intrinsic as nni
from qbench.nn.intrinsic import qat as nniqat
from qbench.nn.qat.layer import QatLayer
from qbench.nn.reference import ReferenceLayer

from .support import (
    BN_CASES,
    CASES,
    Case,
    batch,
    call,
    case_named,
    expect,
    float_output,
    in_eval,
    make_layer,
    normalized,
    on_grid,
    parts_of,
    same_bits,
    trained,
    with_input,
)

LARGEST_CODE = 2**22


def weight_used(layer: QatLayer, x: Tensor) -> Tensor:
    """The weight that a forward hands to the linear part."""
    seen: list[Tensor] = []
    original = layer.linear

    def spy(x: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> Tensor:
        seen.append(weight.detach().clone())
        return original(x, weight, bias, *args)

    layer.linear = spy  # type: ignore[method-assign]
    try:
        layer(x)
    finally:
        del layer.linear
    (weight,) = seen
    return weight


def config(**weight: Any) -> qbench.QConfig:
    return qbench.QConfig(weight=qbench.QSpec(bits=8, signed=True, symmetric=True, **weight))


class TestOneDefinition:
    @pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
    @pytest.mark.parametrize("bits", [8, 4, 2])
    def test_train_eval_and_deployed_form_have_the_same_codes(self, case: Case, bits: int) -> None:
        layer, module = make_layer(case, weight_bits=bits)
        x = batch(case.shape, seed=2)
        in_eval(layer, x)
        expected = expect(module, layer.sources[0].scale.item(), weight_bits=bits)
        codes = layer.parameter_codes()
        np.testing.assert_array_equal(codes.weight.numpy(), expected.weight_codes)
        np.testing.assert_array_equal(codes.weight_qparams.scale.numpy(), expected.weight_scale)
        assert codes.weight.dtype == torch.int8
        assert np.abs(expected.weight_codes).max() == 2 ** (bits - 1) - 1
        assert torch.equal(weight_used(layer.eval(), x), expected.weight)
        reference = ReferenceLayer(layer)
        np.testing.assert_array_equal(reference.weight_codes.numpy(), expected.weight_codes)
        assert torch.equal(reference.weight(), expected.weight)
        assert torch.equal(reference.bias, expected.bias_hat)
        in_training = expected.unfolded if case.has_bn else expected.weight
        assert torch.equal(weight_used(layer.train(), x), in_training)

    @pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
    def test_the_deployed_form_gives_the_values_of_eval(self, case: Case) -> None:
        layer, _ = make_layer(case)
        x = batch(case.shape, seed=2)
        in_eval(layer, x)
        assert torch.equal(ReferenceLayer(layer)(x), layer(x))

    def test_codes_are_those_of_the_weight_not_of_the_folded_weight(self) -> None:
        # They differ in a few of a million; the layer must use the ones of W.
        conv, bn = nn.Conv2d(64, 64, 5, bias=False), nn.BatchNorm2d(64)
        module = trained(nni.ConvBn2d(conv, bn))
        layer = with_input(nniqat.ConvBn2d.from_float(module, qbench.get_qconfig()), batch((2, 64, 6, 6)))
        differ = 0
        for seed in range(40):
            made = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                bn.weight.copy_(torch.rand(64, generator=made) + 0.5)
                conv.weight.copy_(torch.randn(conv.weight.shape, generator=made))
            expected = expect(module, layer.sources[0].scale.item())
            folded = conv.weight.detach().numpy() * expected.factor.reshape(expected.wide)
            step = np.abs(folded).max((1, 2, 3), keepdims=True) / np.float32(127)
            direct = np.rint(folded * (np.float32(1) / step))
            differ += int((direct != expected.weight_codes).sum())
            np.testing.assert_array_equal(layer.parameter_codes().weight.numpy(), expected.weight_codes)
        assert differ > 0

    @pytest.mark.parametrize("case", BN_CASES, ids=lambda case: case.name)
    def test_statistics_and_gamma_move_the_scale_only(self, case: Case) -> None:
        layer, _ = make_layer(case)
        before = layer.parameter_codes()
        layer.train()(batch(case.shape, seed=4, spread=3.0))
        with torch.no_grad():
            layer.bn.weight.mul_(1.7)
        after = layer.parameter_codes()
        assert torch.equal(before.weight, after.weight)
        assert not torch.equal(before.weight_qparams.scale, after.weight_qparams.scale)

    def test_a_parameter_step_moves_the_codes(self) -> None:
        layer, _ = make_layer(case_named("conv bn"))
        before = layer.parameter_codes().weight
        with torch.no_grad():
            layer.weight.add_(torch.randn_like(layer.weight) * 0.05)
        assert not torch.equal(before, layer.parameter_codes().weight)


class TestFactorSigns:
    CASE = case_named("conv bias bn")

    def layer(self, gamma: list[float], **options: Any) -> tuple[QatLayer, nn.Module]:
        module = trained(self.CASE.make())
        with torch.no_grad():
            module[1].weight.copy_(torch.tensor(gamma))
        layer = self.CASE.qat.from_float(copy.deepcopy(module), qbench.get_qconfig(**options))
        return with_input(layer, batch(self.CASE.shape)), module

    def test_negative_gamma_flips_codes(self) -> None:
        positive, _ = self.layer([0.5, 1.0, 1.5, 2.0, 0.7])
        negative, _ = self.layer([-0.5, 1.0, -1.5, 2.0, -0.7])
        sign = torch.tensor([-1, 1, -1, 1, -1]).reshape(-1, 1, 1, 1)
        a, b = positive.parameter_codes(), negative.parameter_codes()
        assert torch.equal(a.weight * sign, b.weight)
        assert same_bits(a.weight_qparams.scale, b.weight_qparams.scale)
        assert b.weight.min() >= -127 and b.weight.abs().max() == 127

    @pytest.mark.parametrize("kind", ["per channel", "per tensor", "power of two"])
    def test_gamma_zero(self, kind: str) -> None:
        specs = {"per channel": None, "per tensor": config(), "power of two": config(axis=0, power_of_two=True)}
        layer, module = self.layer([0.0, 1.0, 0.0, -2.0, 0.7])
        if specs[kind] is not None:
            layer = with_input(
                self.CASE.qat.from_float(copy.deepcopy(module), specs[kind]), batch(self.CASE.shape)
            )
        x = batch(self.CASE.shape, seed=2)
        codes = layer.parameter_codes()
        assert (codes.weight[[0, 2]] == 0).all() and (codes.weight[[1, 3, 4]] != 0).any()
        assert torch.isfinite(codes.weight_qparams.scale).all() and (codes.weight_qparams.scale > 0).all()
        # What the channel deploys is its bias: β
        beta = module[1].bias.detach()[[0, 2]]
        step = codes.bias_scale.max().item()
        torch.testing.assert_close(codes.bias_value[[0, 2]], beta, rtol=1e-6, atol=0.51 * step)
        for mode in (True, False):
            layer.train(mode)
            layer.zero_grad()
            out = float_output(layer, x)
            assert torch.isfinite(out).all()
            torch.testing.assert_close(
                out[:, [0, 2]], beta.reshape(1, 2, 1, 1).expand_as(out[:, [0, 2]]), rtol=1e-5, atol=0.51 * step
            )
            (out * torch.randn_like(out)).sum().backward()
            for name, parameter in layer.named_parameters():
                assert torch.isfinite(parameter.grad).all(), name
            assert (layer.bn.weight.grad[[0, 2]].abs() > 1e-3).all()  # so that γ can leave zero
            assert (layer.bn.weight.grad[[1, 3, 4]].abs() > 1e-3).all()

    def test_gamma_zero_keeps_statistics_alive(self) -> None:
        layer, module = self.layer([0.0, 1.0, 1.0, 1.0, 1.0])
        x = batch(self.CASE.shape, seed=2)
        layer.train()(x)
        linear, bn, _ = parts_of(module)
        with torch.no_grad():
            y = call(linear, on_grid(x, layer.sources[0]), expect_unfolded(module), linear.bias)
            normalized(y, bn, running=(bn.running_mean, bn.running_var))
        assert same_bits(layer.bn.running_mean, bn.running_mean)
        assert same_bits(layer.bn.running_var, bn.running_var)
        assert layer.bn.running_var[0] > 0.01

    def test_gamma_that_leaves_zero_brings_the_codes_back(self) -> None:
        layer, _ = self.layer([0.0, 1.0, 1.0, 1.0, 1.0])
        with torch.no_grad():
            layer.bn.weight[0] = 1e-8
        assert layer.parameter_codes().weight[0].abs().max() > 0 or (layer.parameter_codes().coarsened[0] > 1)
        with torch.no_grad():
            layer.bn.weight[0] = 0.1
        assert layer.parameter_codes().weight[0].abs().max() == 127

    def test_zero_initialised_residual_behind_a_dead_input(self) -> None:
        # γ = β = 0, and an input of zeros: both scales are the smallest, the bias is 0 and so is its code.
        module = trained(self.CASE.make())
        nn.init.zeros_(module[1].weight), nn.init.zeros_(module[1].bias)
        layer = self.CASE.qat.from_float(module, qbench.get_qconfig())
        with_input(layer, torch.zeros(self.CASE.shape))
        codes = layer.parameter_codes()
        assert (codes.bias == 0).all() and (codes.bias_value == 0).all() and (codes.weight == 0).all()
        assert torch.isfinite(float_output(layer.eval(), torch.zeros(self.CASE.shape))).all()
        assert torch.isfinite(float_output(layer.train(), torch.zeros(self.CASE.shape))).all()


def expect_unfolded(module: nn.Module) -> Tensor:
    """Ŵ/k where some k is 0: rne(W·(1/t))·t."""
    weight = module[0].weight.detach().numpy()
    step = np.abs(weight).max((1, 2, 3), keepdims=True) / np.float32(127)
    return torch.from_numpy(np.rint(weight * (np.float32(1) / step)) * step)


def floored(
    bias: float, *, bits: int = 32, spec: qbench.QConfig | None = None, channel: int = 1
) -> tuple[QatLayer, nn.Module]:
    """A layer of which one channel has a huge β."""
    case = case_named("conv bias bn")
    module = trained(case.make())
    with torch.no_grad():
        module[1].bias[channel] = bias
    options = spec or qbench.get_qconfig(bias_bits=bits)
    layer = case.qat.from_float(copy.deepcopy(module), options)
    return with_input(layer, batch(case.shape)), module


class TestFloor:
    SHAPE = case_named("conv bias bn").shape

    @pytest.mark.parametrize("sign", [1, -1])
    @pytest.mark.parametrize(
        ("bias", "bits"), [(1e3, 32), (1e4, 32), (1e6, 32), (30.0, 16), (100.0, 17), (5e3, 24), (3e3, 23), (1e3, 20)]
    )
    def test_the_step_is_raised_just_enough(self, bias: float, bits: int, sign: int) -> None:
        layer, module = floored(sign * bias, bits=bits)
        plain, _ = make_layer(case_named("conv bias bn"))
        source = layer.sources[0].scale.item()
        limit = min(2 ** (bits - 1) - 1, LARGEST_CODE)
        codes = layer.parameter_codes()
        assert not codes.bias_saturated.any()
        assert 0.9999 * limit <= codes.bias[1].abs() <= limit
        assert torch.sign(codes.bias[1]) == sign
        factor = module[1].weight[1].item() / np.sqrt(module[1].running_var[1].item() + module[1].eps)
        folded = module[1].bias[1].item() + factor * (module[0].bias[1] - module[1].running_mean[1]).item()
        floor = abs(folded) / (limit * source)
        scale = codes.weight_qparams.scale
        assert scale[1].item() == pytest.approx(floor, rel=1e-5)
        # The other channels are what they were.
        others = [0, 2, 3, 4]
        if bits > 20:
            assert torch.equal(codes.weight[others], plain.parameter_codes().weight[others])
            assert same_bits(scale[others], plain.parameter_codes().weight_qparams.scale[others])
            assert (codes.coarsened[others] == 1).all()
        raised_by = floor / plain.parameter_codes().weight_qparams.scale[1].item()
        assert codes.coarsened[1].item() == pytest.approx(raised_by, rel=1e-4)
        # b̂ is within half a step, and a rounding of float32, of b
        step, last_bit = codes.bias_scale[1].item(), 2.0**-23 * abs(folded)
        assert abs(codes.bias_value[1].item() - folded) <= 0.51 * step + 2 * last_bit

    def test_floored_codes_are_coarse_not_wrong(self) -> None:
        layer, module = floored(1e3)
        codes = layer.parameter_codes()
        factor = module[1].weight[1] / torch.sqrt(module[1].running_var[1] + module[1].eps)
        folded = (module[0].weight[1] * factor).detach()
        assert 0 < codes.weight[1].abs().max() < 127
        error = codes.weight[1] * codes.weight_qparams.scale[1] - folded
        assert error.abs().max() <= 0.5001 * codes.weight_qparams.scale[1]

    @pytest.mark.parametrize("bias", [0.3, 1e3, 1e6])
    def test_train_and_eval_use_the_floored_codes(self, bias: float) -> None:
        layer, module = floored(bias)
        x = batch(self.SHAPE, seed=2)
        in_eval(layer, x)
        codes = layer.parameter_codes()
        scale = codes.weight_qparams.scale.reshape(-1, 1, 1, 1)
        assert torch.equal(weight_used(layer.eval(), x), codes.weight * scale)
        factor = torch.from_numpy(
            module[1].weight.detach().numpy()
            / np.sqrt(module[1].running_var.numpy().astype(np.float64) + module[1].eps).astype(np.float32)
        )
        torch.testing.assert_close(
            weight_used(layer.train(), x), codes.weight * scale / factor.reshape(-1, 1, 1, 1), rtol=1e-5, atol=0
        )
        assert torch.equal(ReferenceLayer(layer)(x), layer.eval()(x))

    @pytest.mark.parametrize("bits", [16, 20, 22, 23, 24, 25, 32])
    def test_no_code_is_beyond_the_limit_by_a_rounding(self, bits: int) -> None:
        # 40 000 floored channels: s_w = |k|·(floor/|k|) rounds three times, and the code must still fit.
        limit = min(2 ** (bits - 1) - 1, LARGEST_CODE)
        channels = 4000
        made = torch.Generator().manual_seed(bits)
        worst = 0
        for _ in range(10):
            linear, bn = nn.Linear(1, channels, bias=False), nn.BatchNorm1d(channels)
            with torch.no_grad():
                bn.running_var.copy_(torch.rand(channels, generator=made) * 3 + 1e-3)
                bn.weight.copy_(torch.randn(channels, generator=made))
                bn.bias.copy_(torch.randn(channels, generator=made) * 10 ** (torch.rand(channels, generator=made) * 6))
                linear.weight.mul_(1e-4)
            layer = nniqat.LinearBn1d.from_float(nni.LinearBn1d(linear, bn), qbench.get_qconfig(bias_bits=bits))
            with_input(layer, torch.rand(100, 1, generator=made) * 3 + 0.1)
            codes = layer.parameter_codes()  # raises where a code is saturated
            assert (codes.coarsened > 1).float().mean() > 0.9
            worst = max(worst, int(codes.bias.abs().max()))
        assert limit - 1 <= worst <= limit

    def test_a_floor_on_one_step_for_the_whole_tensor(self) -> None:
        layer, module = floored(1e4, spec=config())
        codes = layer.parameter_codes()
        assert codes.weight_qparams.scale.shape == ()
        assert 0.9999 * LARGEST_CODE <= codes.bias.abs().max() <= LARGEST_CODE
        assert codes.coarsened.shape == () and codes.coarsened > 1
        plain = (module[0].weight * spread_factor(module)).abs().max().item() / 127
        assert codes.weight_qparams.scale.item() == pytest.approx(plain * codes.coarsened.item(), rel=1e-5)

    def test_a_floor_on_powers_of_two_stays_a_power_of_two(self) -> None:
        layer, _ = floored(1e4, spec=config(axis=0, power_of_two=True))
        codes = layer.parameter_codes()
        exponent = torch.log2(codes.weight_qparams.scale.double())
        assert torch.equal(exponent, exponent.round())
        assert 0.49 * LARGEST_CODE <= codes.bias[1].abs() <= LARGEST_CODE
        assert codes.coarsened[1] > 1 and (codes.coarsened[[0, 2, 3, 4]] == 1).all()

    def test_a_small_gamma_is_floored_by_its_own_factor(self) -> None:
        # t = floor/|k|: the smaller |k|, the coarser the codes of W, down to none, and never NaN.
        case = case_named("conv bias bn")
        module = trained(case.make())
        seen = []
        for gamma in (1.0, 1e-2, 1e-3, 1e-4, 1e-6, 1e-12, 1e-30, 1e-38, 1e-43, 1e-45, 0.0):
            with torch.no_grad():
                module[1].weight[1] = gamma
                module[1].bias[1] = 1.0
            layer = with_input(case.qat.from_float(copy.deepcopy(module), qbench.get_qconfig()), batch(case.shape))
            codes = layer.parameter_codes()
            assert torch.isfinite(codes.weight_qparams.scale).all()
            assert codes.bias[1].abs() <= LARGEST_CODE
            bias = layer.quantized_parameters()[1][1].item()
            assert codes.bias_value[1].item() == pytest.approx(bias, abs=0.51 * codes.bias_scale[1].item())
            seen.append(int(codes.weight[1].abs().max()))
            assert torch.isfinite(float_output(layer.train(), batch(case.shape))).all()
        assert seen[0] == 127 and seen[-1] == 0 and sorted(seen, reverse=True) == seen

    def test_a_bias_without_bounds_is_an_error(self) -> None:
        layer, _ = floored(float("inf"))
        with pytest.raises(NumericsError, match=r"bn\.bias holds 1 value\(s\) that are not finite"):
            layer.parameter_codes()


def spread_factor(module: nn.Module) -> Tensor:
    bn = module[1]
    return (bn.weight / torch.sqrt(bn.running_var + bn.eps)).reshape(-1, 1, 1, 1)


class TestSilenced:
    @pytest.mark.parametrize(
        "spec", [None, config(axis=0, power_of_two=True)], ids=["per channel", "power of two"]
    )
    def test_a_silenced_channel_keeps_its_statistics(self, spec: qbench.QConfig | None) -> None:
        layer, module = floored(1e6, spec=spec)
        assert (layer.parameter_codes().weight[1] == 0).all()
        layer.train()
        before = layer.bn.running_mean.clone(), layer.bn.running_var.clone()
        factor = spread_factor(module)[1].item()
        for seed in range(100):
            out = float_output(layer, batch(TestFloor.SHAPE, seed=seed))
            assert torch.isfinite(out).all()
        for buffer, old in zip((layer.bn.running_mean, layer.bn.running_var), before, strict=True):
            assert buffer[1] == old[1]  # bit for bit, though the channel's convolution is a constant
            assert (buffer[[0, 2, 3, 4]] != old[[0, 2, 3, 4]]).all()
        # k stays what it was; with the constant's variance it would have grown a hundredfold.
        now = (layer.bn.weight[1] / torch.sqrt(layer.bn.running_var[1] + layer.bn.eps)).item()
        assert now == pytest.approx(factor, rel=1e-6)

    def test_it_comes_back_when_the_bias_shrinks(self) -> None:
        layer, _ = floored(1e6)
        layer.train()(batch(TestFloor.SHAPE))
        with torch.no_grad():
            layer.bn.bias[1] = 0.5
        assert layer.parameter_codes().weight[1].abs().max() == 127
        assert layer.parameter_codes().coarsened[1] == 1

    def test_it_stays_trainable(self) -> None:
        layer, _ = floored(1e6)
        layer.train()
        out = float_output(layer, batch(TestFloor.SHAPE))
        (out * torch.randn_like(out)).sum().backward()
        assert all(torch.isfinite(parameter.grad).all() for parameter in layer.parameters())
        assert layer.bn.bias.grad[1].abs() > 1e-3

    @pytest.mark.parametrize(
        "spec", [None, config(axis=0, power_of_two=True), config()], ids=["per channel", "power of two", "per tensor"]
    )
    def test_a_pruned_channel_is_not_one_that_the_floor_silenced(self, spec: qbench.QConfig | None) -> None:
        # Its weights are zeros anyway: the floor coarsened nothing, and there is nothing to report.
        case = case_named("conv bias bn")
        module = trained(case.make())
        nn.init.zeros_(module[0].weight[1])
        layer = with_input(case.qat.from_float(module, spec or qbench.get_qconfig()), batch(case.shape))
        codes = layer.parameter_codes()
        assert (codes.weight[1] == 0).all()
        assert (codes.coarsened == 1).all()
        grid, _, _ = layer.quantized_parameters()
        assert not grid.silenced.any()
        bias = layer.quantized_parameters()[1][1].item()
        assert codes.bias_value[1].item() == pytest.approx(bias, abs=0.51 * codes.bias_scale.max().item())


class TestGeneralPath:
    """Per tensor and power-of-two weights: the grid of W_f, divided safely."""

    CASE = case_named("grouped bn relu6")

    @pytest.mark.parametrize("kind", ["per tensor", "power of two", "asymmetric", "unsigned symmetric"])
    def test_codes_are_those_of_the_folded_weight(self, kind: str) -> None:
        specs = {
            "per tensor": config(narrow=True),
            "power of two": config(axis=0, narrow=True, power_of_two=True),
            "asymmetric": qbench.QConfig(weight=qbench.QSpec(bits=8, symmetric=False, axis=0)),
            "unsigned symmetric": qbench.QConfig(weight=qbench.QSpec(bits=8, signed=False, symmetric=True, axis=0)),
        }
        module = trained(self.CASE.make())
        layer = with_input(
            self.CASE.qat.from_float(copy.deepcopy(module), specs[kind]), batch(self.CASE.shape)
        )
        folded = (module[0].weight.detach() * torch.from_numpy(expect(module, 1.0).factor).reshape(-1, 1, 1, 1)).numpy()
        low, high = folded.min((1, 2, 3)), folded.max((1, 2, 3))
        size = np.maximum(-low, high)
        zero = np.zeros(6, np.int64)
        qmin, qmax = -127, 127
        if kind == "per tensor":
            scale = np.full(6, size.max() / np.float32(127), np.float32)
        elif kind == "power of two":
            scale = np.exp2(np.ceil(np.log2((size / np.float32(127)).astype(np.float64)))).astype(np.float32)
        elif kind == "unsigned symmetric":
            scale, zero, qmin, qmax = size / np.float32(127), zero + 128, 0, 255
        else:
            qmin, qmax = -128, 127
            scale = (np.maximum(high, 0) - np.minimum(low, 0)) / np.float32(255)
            zero = qmin - np.rint(np.minimum(low, 0) / scale).astype(np.int64)
        wide = (-1, 1, 1, 1)
        codes = np.clip(np.rint(folded * (np.float32(1) / scale).reshape(wide)) + zero.reshape(wide), qmin, qmax)
        found = layer.parameter_codes()
        np.testing.assert_array_equal(found.weight.numpy(), codes)
        x = batch(self.CASE.shape, seed=2)
        in_eval(layer, x)
        hat = ((codes - zero.reshape(wide)).astype(np.float32)) * scale.reshape(wide)
        assert torch.equal(weight_used(layer.eval(), x), torch.from_numpy(hat))
        assert torch.equal(ReferenceLayer(layer)(x), layer(x))
        unfolded = torch.from_numpy(hat / expect(module, 1.0).factor.reshape(wide))
        torch.testing.assert_close(weight_used(layer.train(), x), unfolded, rtol=1e-6, atol=0)

    @pytest.mark.parametrize("kind", ["per tensor", "power of two"])
    def test_train_output_is_the_equation(self, kind: str) -> None:
        spec = config(narrow=True) if kind == "per tensor" else config(axis=0, narrow=True, power_of_two=True)
        module = trained(self.CASE.make())
        layer = with_input(self.CASE.qat.from_float(copy.deepcopy(module), spec), batch(self.CASE.shape))
        x = batch(self.CASE.shape, seed=2)
        codes = layer.parameter_codes()
        factor = torch.from_numpy(expect(module, 1.0).factor)
        linear, bn, activation = parts_of(module)
        with torch.no_grad():
            scale = codes.weight_qparams.scale
            hat = codes.weight * (scale if scale.ndim == 0 else scale.reshape(-1, 1, 1, 1))
            error = codes.bias_value - torch.from_numpy(expect(module, 1.0).bias)
            y = call(linear, on_grid(x, layer.sources[0]), hat / factor.reshape(-1, 1, 1, 1), linear.bias)
            y = activation(normalized(y, bn) + error.reshape(1, -1, 1, 1))
        torch.testing.assert_close(float_output(layer.train(), x).detach(), y, rtol=1e-5, atol=1e-6)


class TestRefusals:
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    @pytest.mark.parametrize("name", ["weight", "bias", "bn.weight", "bn.running_var"])
    def test_a_value_that_is_not_finite_is_named(self, name: str, value: float) -> None:
        layer, _ = make_layer(case_named("conv bias bn"))
        with torch.no_grad():
            layer.state_dict()[name].view(-1)[0] = value
        with pytest.raises(NumericsError, match=rf"{name} holds 1 value\(s\) that are not finite"):
            layer.parameter_codes()

    def test_no_data(self) -> None:
        layer, _ = make_layer(case_named("conv"))
        layer.connect((layer.qconfig.make_activation(),), owned=(0,))
        with pytest.raises(NumericsError, match="has seen no data: run the prepared model in training mode"):
            layer.parameter_codes()

    @pytest.mark.parametrize("which", ["input", "weight"])
    def test_fake_quant_disabled(self, which: str) -> None:
        layer, _ = make_layer(case_named("conv"))
        quantizer = layer.sources[0] if which == "input" else layer.weight_quantizer
        quantizer.fake_quant_enabled = False
        with pytest.raises(NumericsError, match="fake-quant is disabled, so there are no codes"):
            layer.parameter_codes()

    @pytest.mark.parametrize("scale", [float("nan"), float("inf"), 0.0, -1.0])
    def test_a_broken_input_scale(self, scale: float) -> None:
        layer, _ = make_layer(case_named("conv"))
        layer.sources[0].scale.fill_(scale)
        with pytest.raises(NumericsError, match="scales must be positive and finite"):
            layer.parameter_codes()

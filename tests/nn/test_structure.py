"""New layers are class data: other activations, transposed convolutions in groups, 1d and 3d, fixed statistics."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qbench
import qbench.nn.intrinsic as nni
import qbench.nn.intrinsic.qat as nniqat
from qbench.errors import FusionError
from qbench.nn.qat.kinds import Conv2dKind, ConvTransposeKind
from qbench.nn.qat.layer import QatLayer
from qbench.nn.reference import ReferenceLayer

from .support import batch, call, expect, float_output, in_eval, normalized, on_grid, same_bits, trained, with_input


class ConvBnHardswish2d(nni.Fused):
    part_types = (nn.Conv2d, nn.BatchNorm2d, nn.Hardswish)


class QatConvBnHardswish2d(nniqat.ConvBn2d):
    float_type = ConvBnHardswish2d
    activation = nn.Hardswish


class ConvBnMish2d(nni.Fused):
    part_types = (nn.Conv2d, nn.BatchNorm2d, nn.Mish)


class QatConvBnMish2d(nniqat.ConvBn2d):
    float_type = ConvBnMish2d
    activation = nn.Mish


class ConvLeakyReLU2d(nni.Fused):
    part_types = (nn.Conv2d, nn.LeakyReLU)


class QatConvLeakyReLU2d(Conv2dKind):
    float_type = ConvLeakyReLU2d
    activation = nn.LeakyReLU


class LinearGELU(nni.Fused):
    part_types = (nn.Linear, nn.GELU)


class QatLinearGELU(nniqat.LinearReLU):
    float_type = LinearGELU
    activation = nn.GELU


class FrozenBatchNorm2d(nn.Module):
    """Fixed statistics under BatchNorm's attribute names, like the one in detection models."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.eps = 1e-3
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight / torch.sqrt(self.running_var + self.eps)
        return x * scale.reshape(1, -1, 1, 1) + (self.bias - self.running_mean * scale).reshape(1, -1, 1, 1)


class ConvFrozenBnReLU2d(nni.Fused):
    part_types = (nn.Conv2d, FrozenBatchNorm2d, nn.ReLU)


class QatConvFrozenBnReLU2d(Conv2dKind):
    float_type = ConvFrozenBnReLU2d
    activation = nn.ReLU


class ConvTransposeBn1d(nni.Fused):
    part_types = (nn.ConvTranspose1d, nn.BatchNorm1d)


class QatConvTransposeBn1d(ConvTransposeKind, nn.ConvTranspose1d):
    linear_type = nn.ConvTranspose1d
    channel_axis = -2
    float_type = ConvTransposeBn1d


class ConvTransposeBn3d(nni.Fused):
    part_types = (nn.ConvTranspose3d, nn.BatchNorm3d)


class QatConvTransposeBn3d(ConvTransposeKind, nn.ConvTranspose3d):
    linear_type = nn.ConvTranspose3d
    channel_axis = -4
    float_type = ConvTransposeBn3d


def conv() -> nn.Module:
    return nn.Conv2d(3, 5, 3)


IMAGE = (4, 3, 7, 6)
UNFUSED = [
    (QatConvBnHardswish2d, lambda: ConvBnHardswish2d(conv(), nn.BatchNorm2d(5), nn.Hardswish()), IMAGE),
    (QatConvBnMish2d, lambda: ConvBnMish2d(conv(), nn.BatchNorm2d(5), nn.Mish()), IMAGE),
    (QatConvLeakyReLU2d, lambda: ConvLeakyReLU2d(conv(), nn.LeakyReLU(0.2)), IMAGE),
    (QatLinearGELU, lambda: LinearGELU(nn.Linear(11, 5), nn.GELU()), (6, 11)),
]
unfused = pytest.mark.parametrize(("qat", "make", "shape"), UNFUSED, ids=[row[0].__name__ for row in UNFUSED])


def layer_of(qat, make, shape, **options) -> tuple[QatLayer, nn.Module]:
    module = trained(make())
    layer = qat.from_float(copy.deepcopy(module), qbench.get_qconfig(**options))
    return with_input(layer, batch(shape)), module


@unfused
class TestPreActivationQuantizer:
    @pytest.mark.parametrize("target", ["onnxruntime", "xnnpack", "neutron"])
    def test_it_is_there_on_every_target_that_does_not_fuse_the_activation(self, qat, make, shape, target: str) -> None:
        layer, _ = layer_of(qat, make, shape, target=target)
        assert layer.pre_activation_quantizer is not None
        assert layer.pre_activation_quantizer is not layer.output_quantizer
        assert layer.pre_activation_quantizer.spec == layer.output_quantizer.spec

    def test_eval_is_quantize_activate_quantize(self, qat, make, shape) -> None:
        layer, module = layer_of(qat, make, shape, bias_bits=16)
        x = batch(shape, seed=3)
        in_eval(layer, x)
        expected = expect(module, layer.sources[0].scale.item(), bias_bits=16)
        with torch.no_grad():
            y = call(module[0], on_grid(x, layer.sources[0]), expected.weight, expected.bias_hat)
            before = on_grid(y, layer.pre_activation_quantizer)
            assert before.unique().numel() > 20 and not torch.equal(before, y)
            activated = module[-1](before)
            assert torch.equal(float_output(layer, x), activated)
            assert torch.equal(layer(x), on_grid(activated, layer.output_quantizer))
        assert torch.equal(ReferenceLayer(layer)(x), layer(x))

    def test_training(self, qat, make, shape) -> None:
        layer, module = layer_of(qat, make, shape, bias_bits=16)
        x = batch(shape, seed=3)
        expected = expect(module, layer.sources[0].scale.item(), bias_bits=16)
        layer.train()
        out = float_output(layer, x)
        has_bn = layer.bn is not None
        with torch.no_grad():
            weight, bias = (expected.unfolded, module[0].bias) if has_bn else (expected.weight, expected.bias_hat)
            y = call(module[0], on_grid(x, layer.sources[0]), weight, bias)
            if has_bn:
                y = normalized(y, module[1]) + expected.error.reshape(1, -1, 1, 1)
            assert torch.equal(out, module[-1](on_grid(y, layer.pre_activation_quantizer)))
        out.square().sum().backward()
        for name, parameter in layer.named_parameters():
            assert torch.isfinite(parameter.grad).all(), name
        assert layer.weight.grad.abs().max() > 1e-3

    def test_round_trip_and_copies(self, qat, make, shape) -> None:
        layer, module = layer_of(qat, make, shape)
        x = batch(shape, seed=3)
        in_eval(layer, x)
        wanted = layer(x)
        assert same_bits(layer.to_float().eval()(x), module.eval()(x))
        assert same_bits(pickle.loads(pickle.dumps(layer))(x), wanted)
        fresh, _ = layer_of(qat, make, shape)
        fresh.load_state_dict(layer.state_dict())
        assert same_bits(fresh.eval()(x), wanted)

    def test_switches_reach_it(self, qat, make, shape) -> None:
        layer, _ = layer_of(qat, make, shape)
        layer.apply(qbench.disable_observer)
        layer.apply(qbench.disable_fake_quant)
        assert not layer.pre_activation_quantizer.observer_enabled
        assert not layer.pre_activation_quantizer.fake_quant_enabled


@pytest.mark.parametrize("activation", [nn.ReLU, nn.ReLU6])
@pytest.mark.parametrize("target", qbench.targets.names())
def test_a_fused_activation_has_no_quantizer_before_it(activation: type[nn.Module], target: str) -> None:
    module = nni.ConvReLU2d(nn.Conv2d(3, 4, 3), activation())
    assert nniqat.ConvReLU2d.from_float(module, qbench.get_qconfig(target)).pre_activation_quantizer is None


def test_a_target_that_fuses_hardswish_needs_none() -> None:
    base = qbench.targets.get("onnxruntime")
    target = dataclasses.replace(base, name="mine", fused_activations=(*base.fused_activations, nn.Hardswish))
    module = ConvBnHardswish2d(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Hardswish())
    layer = QatConvBnHardswish2d.from_float(module, qbench.get_qconfig(target))
    assert layer.pre_activation_quantizer is None


class TestFrozenBatchNorm:
    def make(self) -> nn.Module:
        module = ConvFrozenBnReLU2d(nn.Conv2d(3, 5, 3), FrozenBatchNorm2d(5), nn.ReLU())
        return trained(module)

    @pytest.mark.parametrize("training", [True, False])
    def test_both_modes_fold(self, training: bool) -> None:
        module = self.make()
        layer = with_input(
            QatConvFrozenBnReLU2d.from_float(copy.deepcopy(module), qbench.get_qconfig(bias_bits=16)),
            batch((4, 3, 7, 6)),
        )
        x = batch((4, 3, 7, 6), seed=3)
        layer.train(training)
        layer.sources[0].eval()
        expected = expect(module, layer.sources[0].scale.item(), bias_bits=16)
        with torch.no_grad():
            y = call(module[0], on_grid(x, layer.sources[0]), expected.weight, expected.bias_hat).relu()
        assert same_bits(float_output(layer, x), y)
        np.testing.assert_array_equal(layer.parameter_codes().weight.numpy(), expected.weight_codes)
        np.testing.assert_array_equal(layer.parameter_codes().bias.numpy(), expected.bias_codes)

    def test_it_trains_without_touching_the_statistics(self) -> None:
        layer = with_input(QatConvFrozenBnReLU2d.from_float(self.make(), qbench.get_qconfig()), batch((4, 3, 7, 6)))
        layer.train()
        before = {name: buffer.clone() for name, buffer in layer.bn.named_buffers()}
        layer(batch((4, 3, 7, 6))).square().sum().backward()
        assert layer.weight.grad.abs().max() > 1e-3 and layer.bias.grad.abs().max() > 1e-3
        assert all(same_bits(buffer, before[name]) for name, buffer in layer.bn.named_buffers())
        assert {name for name, _ in layer.named_parameters()} == {"weight", "bias"}
        for switch in (qbench.freeze_bn_stats, qbench.update_bn_stats):
            layer.apply(switch)
            layer(batch((4, 3, 7, 6)))

    def test_round_trip(self) -> None:
        module = self.make()
        kept = copy.deepcopy(module)
        back = QatConvFrozenBnReLU2d.from_float(module, qbench.get_qconfig()).to_float()
        x = batch((4, 3, 7, 6), seed=3)
        assert same_bits(back(x), kept(x))

    def test_channels_are_checked(self) -> None:
        with pytest.raises(FusionError, match="Conv2d puts out 5 channels, FrozenBatchNorm2d has 4"):
            ConvFrozenBnReLU2d(nn.Conv2d(3, 5, 3), FrozenBatchNorm2d(4), nn.ReLU())


TRANSPOSED = [
    (nniqat.ConvTransposeBn2d, nni.ConvTransposeBn2d, nn.ConvTranspose2d, nn.BatchNorm2d, 2),
    (QatConvTransposeBn1d, ConvTransposeBn1d, nn.ConvTranspose1d, nn.BatchNorm1d, 1),
    (QatConvTransposeBn3d, ConvTransposeBn3d, nn.ConvTranspose3d, nn.BatchNorm3d, 3),
]


@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize(("qat", "wrapper", "linear", "bn", "dims"), TRANSPOSED, ids=["2d", "1d", "3d"])
class TestTransposed:
    """Weight (in, out/groups, …): a scale along axis 1 serves one output channel of every group."""

    def make(self, qat, wrapper, linear, bn, dims: int, groups: int) -> tuple[QatLayer, nn.Module, Tensor]:
        module = trained(wrapper(linear(6, 6, 3, stride=2, groups=groups, output_padding=1), bn(6)))
        layer = qat.from_float(copy.deepcopy(module), qbench.get_qconfig(bias_bits=20))
        x = batch((3, 6, *[4] * dims))
        return with_input(layer, x), module, x

    def codes_by_loops(self, module: nn.Module, groups: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Codes, scales (out/groups,), k and b_f, one output channel at a time."""
        linear, bn = module[0], module[1]
        deviation = np.sqrt(bn.running_var.numpy().astype(np.float64) + bn.eps).astype(np.float32)
        k = bn.weight.detach().numpy() / deviation
        bias = bn.bias.detach().numpy() + k * (linear.bias.detach().numpy() - bn.running_mean.numpy())
        weight = linear.weight.detach().numpy()
        inputs, outputs = weight.shape[0] // groups, weight.shape[1]
        folded = weight.copy()
        for group in range(groups):
            for out in range(outputs):
                folded[group * inputs : (group + 1) * inputs, out] *= k[group * outputs + out]
        codes, scales = np.zeros(weight.shape), np.zeros(outputs, np.float32)
        for out in range(outputs):
            if groups == 1:  # the codes of W, times the sign of k
                step = np.abs(weight[:, out]).max() / np.float32(127)
                codes[:, out] = np.rint(weight[:, out] * (np.float32(1) / step)) * np.sign(k[out])
                scales[out] = abs(k[out]) * step
            else:
                scales[out] = np.abs(folded[:, out]).max() / np.float32(127)
                codes[:, out] = np.rint(folded[:, out] * (np.float32(1) / scales[out]))
        return codes, scales, k, bias

    def test_codes_and_both_forwards(self, qat, wrapper, linear, bn, dims: int, groups: int) -> None:
        layer, module, x = self.make(qat, wrapper, linear, bn, dims, groups)
        codes, scales, k, bias = self.codes_by_loops(module, groups)
        found = layer.parameter_codes()
        np.testing.assert_array_equal(found.weight.numpy(), codes)
        np.testing.assert_array_equal(found.weight_qparams.scale.numpy(), scales)
        assert found.weight_qparams.axis == 1
        bias_scale = np.float32(layer.sources[0].scale.item()) * np.tile(scales, groups)
        np.testing.assert_array_equal(found.bias_scale.numpy(), bias_scale)
        np.testing.assert_array_equal(found.bias.numpy(), np.rint(bias.astype(np.float64) / bias_scale))
        hat = torch.from_numpy(codes.astype(np.float32) * scales.reshape(1, -1, *[1] * dims))
        in_eval(layer, x)
        with torch.no_grad():
            y = call(module[0], on_grid(x, layer.sources[0]), hat, found.bias_value)
            assert same_bits(float_output(layer, x), y)
        assert torch.equal(ReferenceLayer(layer)(x), layer(x))
        layer.train()
        layer.sources[0].eval()
        per_channel = np.repeat(k.reshape(groups, 1, -1), 6 // groups, axis=1).reshape(6, -1)
        unfolded = hat / torch.from_numpy(per_channel).reshape(6, -1, *[1] * dims)
        with torch.no_grad():
            y = normalized(call(module[0], on_grid(x, layer.sources[0]), unfolded, module[0].bias), module[1])
            y = y + (found.bias_value - torch.from_numpy(bias)).reshape(1, -1, *[1] * dims)
        torch.testing.assert_close(float_output(layer, x).detach(), y, rtol=1e-4, atol=1e-5)

    def test_it_trains(self, qat, wrapper, linear, bn, dims: int, groups: int) -> None:
        layer, _, x = self.make(qat, wrapper, linear, bn, dims, groups)
        layer.train()
        before = layer.bn.running_mean.clone()
        out = layer(x)
        (out * torch.randn_like(out)).sum().backward()
        assert all(torch.isfinite(parameter.grad).all() for parameter in layer.parameters())
        assert layer.weight.grad.abs().amax((0, *range(2, layer.weight.ndim))).min() > 1e-3
        assert not torch.equal(before, layer.bn.running_mean)

    def test_gamma_zero_and_a_floored_channel(self, qat, wrapper, linear, bn, dims: int, groups: int) -> None:
        layer, _, x = self.make(qat, wrapper, linear, bn, dims, groups)
        with torch.no_grad():
            layer.bn.weight[0] = 0.0
            layer.bn.bias[5] = 1e4
        codes = layer.parameter_codes()
        inputs = 6 // groups
        assert (codes.weight[:inputs, 0] == 0).all()
        assert codes.bias.abs().max() <= 2 ** 19
        assert codes.coarsened[(6 // groups) - 1] > 1
        assert codes.bias_value[5].item() == pytest.approx(1e4, rel=1e-3)
        for mode in (True, False):
            out = float_output(layer.train(mode), x)
            assert torch.isfinite(out).all()
        layer.train()(x).sum().backward()
        assert torch.isfinite(layer.bn.weight.grad).all()

    def test_output_size_is_an_argument_of_the_call(self, qat, wrapper, linear, bn, dims: int, groups: int) -> None:
        layer, module, x = self.make(qat, wrapper, linear, bn, dims, groups)
        in_eval(layer, x)
        size = [9] * dims
        assert layer(x, size).shape == module[0](x, size).shape
        assert layer(x, size).shape != layer(x).shape


@pytest.mark.parametrize("options", [{}, {"bias_bits": 8, "bias_scale": "own"}], ids=["int32", "own int8"])
def test_user_patterns_go_the_whole_way(options: dict) -> None:
    model = nn.Sequential(
        ConvBnMish2d(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Mish()),
        ConvFrozenBnReLU2d(nn.Conv2d(6, 6, 3), FrozenBatchNorm2d(6), nn.ReLU()),
        nni.ConvTransposeBn2d(nn.ConvTranspose2d(6, 4, 2, stride=2, groups=2), nn.BatchNorm2d(4)),
        nn.Flatten(),
        nni.LinearBn1d(nn.Linear(4 * 8 * 8, 5), nn.BatchNorm1d(5)),
    )
    x = batch((8, 3, 8, 8))
    mapping = {ConvBnMish2d: QatConvBnMish2d, ConvFrozenBnReLU2d: QatConvFrozenBnReLU2d}
    model = qbench.prepare_qat(model, mapping, qconfig=qbench.get_qconfig(**options), example_inputs=(x,)).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), torch.arange(8) % 5)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    program = qbench.convert(model.eval(), (x,))
    with torch.no_grad():
        assert torch.equal(program.module()(x), model(x))

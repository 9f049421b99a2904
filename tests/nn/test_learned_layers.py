"""Quantizers that learn, on layers: one definition of the weight codes, and the way of a gradient to a learned scale
through activation, weight and bias, against closed forms in float64."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import qbench
from qbench.fake_quantize import DSQ, LSQ, TQT, FakeQuantize
from qbench.nn.qat.layer import QatLayer
from qbench.observers import LatestMinMaxObserver, LatestMSEObserver

from .support import batch, call, case_named, in_eval, make_layer, on_grid, spread_channels

METHODS = ("lsq", "dorefa", "dsq", "tqt")
PER_TENSOR = qbench.QSpec(bits=4, symmetric=True, narrow=True)
NOT_NARROW = qbench.QSpec(bits=4, symmetric=True, axis=0)


def weight_configs() -> dict[str, qbench.QConfig]:
    """Every weight quantizer, on the target's grid and on ones whose codes do not move along with the tensor."""
    found = {name: qbench.get_qconfig(weight_method=name, weight_bits=4) for name in METHODS}
    for kind in (LSQ, DSQ, TQT):
        for spec in (PER_TENSOR, NOT_NARROW):
            weight = qbench.QuantizerConfig(spec, LatestMinMaxObserver, kind)
            found[f"{kind.__name__} {spec}{'' if spec.narrow else ', not narrow'}"] = qbench.QConfig(weight=weight)
    for name in ("mse", "quantile", "power_of_two"):
        found[f"fixed, {name}"] = qbench.get_qconfig(weight_bits=4, weight_observer=name)
    found["fixed, mse, not narrow"] = qbench.QConfig(weight=qbench.QuantizerConfig(NOT_NARROW, LatestMSEObserver))
    return found


CONFIGS = weight_configs()
DEAD = ("conv bias bn", "grouped bn relu6", "transposed bn relu", "linear bn relu")
configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def moved(layer: QatLayer, x: Tensor) -> QatLayer:
    """What is learned, away from its start, so that some weights are clipped."""
    layer.train()
    layer(x)
    with torch.no_grad():
        for quantizer in layer.modules():
            if isinstance(quantizer, FakeQuantize) and quantizer.learned:
                quantizer.change.copy_(-0.3 * quantizer.start.abs() if quantizer.start.ndim else -0.1 * quantizer.start)
    return layer


@configs
class TestOneDefinition:
    @pytest.mark.parametrize("name", ["conv no bias", "conv transposed", "linear", *DEAD])
    def test_train_eval_and_convert_have_the_same_codes(self, name: str, config: qbench.QConfig) -> None:
        case = case_named(name)
        layer, _ = make_layer(case, config=config)
        x = batch(case.shape)
        moved(layer, x)
        with torch.no_grad():
            found = []
            for mode in (True, False):
                layer.train(mode)
                grid = layer.quantized_parameters()[0]
                scale = grid.qparams.spread(grid.qparams.scale, layer.weight)
                factor = 1.0 if grid.factor is None else grid.layout.spread(grid.factor, layer.weight)
                trained, folded = grid.unfolded() * factor, grid.folded()
                found += [torch.round(trained / scale), torch.round(folded / scale), grid.codes().float()]
            deployed = layer.eval().parameter_codes()
        wanted = deployed.weight.float()
        assert [int((codes != wanted).sum()) for codes in found] == [0] * 6
        assert wanted.unique().numel() > 3
        assert wanted.abs().max() <= 8 and torch.isfinite(grid.unfolded()).all()

    @pytest.mark.parametrize("name", DEAD)
    def test_a_dead_channel(self, name: str, config: qbench.QConfig) -> None:
        case = case_named(name)
        layer, _ = make_layer(case, config=config)
        with torch.no_grad():
            layer.bn.weight[1] = 0.0
        layer.train()
        layer(batch(case.shape)).square().sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in layer.parameters() if p.grad is not None)
        codes = in_eval(layer, batch(case.shape)).parameter_codes()
        channel = codes.weight.select(codes.weight_qparams.axis or 0, 1)
        assert layer.layout().groups > 1 or not channel.any() or codes.weight_qparams.axis is None


class TestStarts:
    def test_a_weight_starts_from_itself_whatever_the_statistics_do(self) -> None:
        # Per channel the learned step is that of W: BatchNorm's factor may move as it likes.
        layer, module = make_layer(case_named("conv bias bn"), config=CONFIGS["lsq"])
        layer.train()
        layer(batch((4, 3, 7, 6)))
        wanted = 2 * module[0].weight.detach().abs().mean((1, 2, 3)) / np.sqrt(7)
        torch.testing.assert_close(layer.weight_quantizer.scale, wanted)

    @pytest.mark.parametrize("method", ["lsq", "dsq", "tqt"])
    def test_parameters_have_their_shape_before_any_data(self, method: str) -> None:
        layer, _ = make_layer(case_named("transposed bn relu"), config=CONFIGS[method])
        names = {n: tuple(p.shape) for n, p in layer.named_parameters() if n.startswith("weight_quantizer")}
        assert names["weight_quantizer.change"] == (5,)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        for _ in range(2):
            layer.train()
            layer(batch((2, 3, 4, 5))).square().sum().backward()
            optimizer.step()
        assert layer.weight_quantizer.change.abs().min() > 0

    @pytest.mark.parametrize("method", ["lsq", "dsq", "tqt"])
    def test_a_learned_grid_follows_the_statistics(self, method: str) -> None:
        # A BatchNorm that starts with variance 1 and finds 1/400: k grows by 20, and the grid with it.
        layer, _ = make_layer(case_named("conv bias bn"), config=CONFIGS[method])
        moved(layer, batch((4, 3, 7, 6)))
        before = layer.eval().parameter_codes()
        with torch.no_grad():
            layer.bn.running_var.add_(layer.bn.eps).div_(400).sub_(layer.bn.eps)
        after = layer.parameter_codes()
        ratio = (after.weight_qparams.scale / before.weight_qparams.scale).log2()
        assert float((ratio - np.log2(20)).abs().max()) <= (1.0 if method == "tqt" else 1e-3)
        assert after.weight.abs().max() == 7 and after.weight.unique().numel() > 5

    @pytest.mark.parametrize("method", METHODS)
    def test_without_any_training_the_grid_is_that_of_the_weight(self, method: str) -> None:
        layer, _ = make_layer(case_named("conv"), config=CONFIGS[method])
        codes = in_eval(layer, batch((4, 3, 7, 6))).parameter_codes()
        assert not layer.weight_quantizer.seen_data or method == "dorefa"
        assert codes.weight.unique().numel() > 5

    def test_groups_learn_a_scale_each(self) -> None:
        config = qbench.get_qconfig(activation_bits=None, weight_bits=4, group_size=4, weight_method="lsq")
        layer = qbench.nn.qat.Linear.from_float(nn.Linear(8, 3), config).train()
        layer(torch.randn(5, 8)).square().sum().backward()
        assert layer.weight_quantizer.change.shape == (3, 2) and layer.weight_quantizer.change.grad.abs().min() > 0


def slope_of(position: np.ndarray, low: int | np.ndarray, high: int | np.ndarray) -> np.ndarray:
    """Equation 3 of LSQ."""
    code = np.rint(position)
    return np.where((code >= low) & (code <= high), code - position, np.clip(code, low, high))


def numpy(x: Tensor) -> np.ndarray:
    return x.detach().double().numpy()


class TestThreeWays:
    """∂L/∂s for the scale of a weight and of an input: through what it quantizes, and through the bias."""

    @dataclasses.dataclass
    class Prepared:
        layer: QatLayer
        module: nn.Module
        x: Tensor
        upstream: Tensor

    def prepared(self, name: str) -> TestThreeWays.Prepared:
        config = qbench.get_qconfig(method="lsq", weight_bits=4, activation_bits=4, bias_bits=16)
        case = case_named(name)
        layer, module = make_layer(case, config=config)
        x = batch(case.shape, seed=6)
        source = layer.sources[0]
        moved(layer, x)
        layer.apply(qbench.disable_observer)
        layer.output_quantizer.fake_quant_enabled = False
        layer.zero_grad()
        assert source.change != 0
        with torch.no_grad():
            shape = layer(x).shape  # in training mode: BatchNorm's statistics move, before the figures below are taken
        upstream = torch.randn(shape, generator=torch.Generator().manual_seed(8))
        return self.Prepared(layer, module, x, upstream)

    def check(self, one: Prepared, by_weight: np.ndarray, by_input: np.ndarray, by_bias: np.ndarray) -> None:
        """Compare with what backward left in the parameters.

        Args:
            by_weight: ∂L/∂t through the weight, (out,).
            by_input: ∂L/∂s_in through the activation, ().
            by_bias: ∂L/∂s_b, (out,), before the factor that s_b has in each scale.
        """
        layer = one.layer
        source, weights = layer.sources[0], layer.weight_quantizer
        grid, _, _ = self.figures
        scale_in = float(source.scale)
        factor = np.abs(numpy(grid.factor)) if grid.factor is not None else 1.0
        wanted_weight = by_weight + by_bias * scale_in * factor
        wanted_input = by_input + (by_bias * numpy(grid.qparams.scale)).sum()
        g_weight = 1 / np.sqrt(layer.weight[0].numel() * 7)
        g_input = 1 / np.sqrt(one.x[0].numel() * (7 - int(source.zero_point)))
        assert np.abs(by_bias * scale_in * factor).max() > 1e-3 * np.abs(by_weight).max()
        np.testing.assert_allclose(weights.change.grad.numpy(), wanted_weight * g_weight, rtol=2e-3, atol=2e-4)
        np.testing.assert_allclose(source.change.grad.numpy(), wanted_input * g_input, rtol=2e-3, atol=2e-4)

    def gradients_of(
        self, one: Prepared, weight: np.ndarray, extra: np.ndarray, batch_statistics: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """∂L/∂x̂, ∂L/∂Ŵ (or of Ŵ/k) and ∂L/∂b̂, by plain autograd in float64."""
        linear = one.module if not hasattr(one.module, "__getitem__") else one.module[0]
        x_hat = on_grid(one.x, one.layer.sources[0]).double().requires_grad_()
        w_hat, bias = torch.from_numpy(weight).requires_grad_(), torch.from_numpy(extra).requires_grad_()
        if batch_statistics:
            y = call(linear.double(), x_hat, w_hat, None)
            bn = one.layer.bn
            y = F.batch_norm(y, None, None, bn.weight.double(), bn.bias.double(), True, 0.0, bn.eps)
            y = y + spread_channels(bias, y, 1)
        else:
            y = call(linear.double(), x_hat, w_hat, bias)
        y = one.layer.activation_module(y) if one.layer.activation_module is not None else y
        y.backward(one.upstream.double())
        return x_hat.grad, w_hat.grad, bias.grad, y

    @pytest.mark.parametrize("name", ["linear", "conv", "depthwise bn relu", "grouped bn relu6", "conv1d bn"])
    def test_in_training(self, name: str) -> None:
        one = self.prepared(name)
        layer, x = one.layer, one.x
        with torch.no_grad():
            grid, folded, bias_scale = self.figures = layer.quantized_parameters()
            step = layer.weight_quantizer.scale
            unfolded = grid.unfolded()
        has_bn = layer.bn is not None
        if has_bn:
            bn_before = {key: value.clone() for key, value in layer.bn.state_dict().items()}
        out = layer(x)
        out.backward(one.upstream)
        if has_bn:
            layer.bn.load_state_dict(bn_before)
        f64 = numpy(folded), numpy(bias_scale)
        codes_b = np.clip(np.rint(f64[0] / f64[1]), -(2**15), 2**15 - 1)
        residual_b = codes_b - f64[0] / f64[1]
        extra = codes_b * f64[1] - (f64[0] if has_bn else 0.0)
        to_x, to_w, to_b, y = self.gradients_of(one, numpy(unfolded), extra, has_bn)
        torch.testing.assert_close(out.double(), y, rtol=1e-3, atol=1e-3)
        wide = [-1] + [1] * (layer.weight.ndim - 1)
        slope_w = slope_of(numpy(layer.weight) / numpy(step).reshape(wide), -7, 7)
        by_weight = (slope_w * numpy(to_w)).reshape(len(step), -1).sum(1)
        source = layer.sources[0]
        zero = int(source.zero_point)
        by_input = (slope_of(numpy(x) / float(source.scale), -8 - zero, 7 - zero) * numpy(to_x)).sum()
        self.check(one, by_weight, by_input, residual_b * numpy(to_b))

    @pytest.mark.parametrize("name", ["conv bias bn", "linear bn relu"])
    def test_folded(self, name: str) -> None:
        # Frozen statistics: one call with Ŵ = k·FQ(W; t), so that ∂Ŵ/∂t has the factor k.
        one = self.prepared(name)
        layer, x = one.layer, one.x
        layer.apply(qbench.freeze_bn_stats)
        with torch.no_grad():
            grid, folded, bias_scale = self.figures = layer.quantized_parameters()
            step = layer.weight_quantizer.scale
            weight_hat = grid.folded()
        out = layer(x)
        out.backward(one.upstream)
        f64 = numpy(folded), numpy(bias_scale)
        codes_b = np.rint(f64[0] / f64[1])
        to_x, to_w, to_b, y = self.gradients_of(one, numpy(weight_hat), codes_b * f64[1], False)
        torch.testing.assert_close(out.double(), y, rtol=1e-3, atol=1e-3)
        wide = [-1] + [1] * (layer.weight.ndim - 1)
        slope_w = slope_of(numpy(layer.weight) / numpy(step).reshape(wide), -7, 7) * numpy(grid.factor).reshape(wide)
        by_weight = (slope_w * numpy(to_w)).reshape(len(step), -1).sum(1)
        source = layer.sources[0]
        zero = int(source.zero_point)
        by_input = (slope_of(numpy(x) / float(source.scale), -8 - zero, 7 - zero) * numpy(to_x)).sum()
        self.check(one, by_weight, by_input, (codes_b - f64[0] / f64[1]) * numpy(to_b))

    def test_a_floor_on_the_weight_scale_takes_its_gradient(self) -> None:
        # Where the bias dictates the scale, the learned one is not in use.
        layer, _ = make_layer(case_named("conv bias bn"), config=CONFIGS["lsq"])
        with torch.no_grad():
            layer.bn.bias[1] = 1e7
        layer.train()
        out = layer(batch((4, 3, 7, 6)))
        (out * torch.randn(out.shape)).sum().backward()
        assert layer.quantized_parameters()[0].coarsened[1] > 1
        assert layer.weight_quantizer.change.grad[1] == 0
        assert (layer.weight_quantizer.change.grad != 0).sum() == 4

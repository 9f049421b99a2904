"""Gradients of whole layers against plain autograd in float64, with every rounding residual held constant.

The reference has no rounding and no straight-through estimator: it is the same layer with the constants
`Ŵ − W_f`, `b̂ − b_f` and `x̂ − x` added, and zeros where a quantizer clips.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import qbench
from qbench.nn.qat.layer import QatLayer

from .support import (
    BN_CASES,
    CASES,
    Case,
    batch,
    call,
    case_named,
    float_output,
    in_eval,
    make_layer,
    on_grid,
    parts_of,
)

Gradients = dict[str, Tensor]


def cotangent(like: Tensor) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(8)).to(like.dtype)


def gradients(layer: QatLayer, x: Tensor) -> tuple[Tensor, Gradients]:
    """Output, and gradients of `sum(out · c)` by name; the input's as "x"."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    out = layer(x)
    (out * cotangent(out)).sum().backward()
    found = {name: parameter.grad for name, parameter in layer.named_parameters()}
    return out.detach(), {**found, "x": x.grad}


def passes_through(x: Tensor, quantizer: nn.Module, quantized: Tensor) -> Tensor:
    """`x̂` with gradient 1 where the quantizer does not clip and 0 where it does, float64."""
    spec = quantizer.spec
    scale, zero = np.float64(quantizer.scale.item()), int(quantizer.zero_point)
    code = np.rint(x.detach().numpy().astype(np.float64) / scale) + zero
    inside = torch.from_numpy((code >= spec.qmin) & (code <= spec.qmax))
    return torch.where(inside, x, 0.0) + (quantized.double() - torch.where(inside, x, 0.0)).detach()


def reference(layer: QatLayer, module: nn.Module, x: Tensor, *, batch_statistics: bool) -> tuple[Tensor, Gradients]:
    """The same by autograd in float64 on a copy of the float module."""
    codes = layer.parameter_codes()
    linear, bn, activation = (None if part is None else copy.deepcopy(part).double() for part in parts_of(module))
    x = x.double().requires_grad_()
    x_hat = passes_through(x, layer.sources[0], on_grid(x.detach().float(), layer.sources[0]))
    scale = codes.weight_qparams.scale.double()
    axis = codes.weight_qparams.axis or 0
    wide = [-1 if dim == axis else 1 for dim in range(linear.weight.ndim)]
    zero = codes.weight_qparams.zero_point
    scale, zero = (value if value.ndim == 0 else value.reshape(wide) for value in (scale, zero))
    weight_hat = (codes.weight.int() - zero).double() * scale
    bias = linear.bias if linear.bias is not None else torch.zeros(len(codes.bias)).double()
    bias_hat = codes.bias_value.double()
    if bn is None:
        weight = linear.weight + (weight_hat - linear.weight).detach()
        y = call(linear, x_hat, weight, bias + (bias_hat - bias).detach())
    else:
        factor = bn.weight / torch.sqrt(bn.running_var + bn.eps)
        folded = bn.bias + factor * (bias - bn.running_mean)
        error = (bias_hat - folded).detach()
        if batch_statistics:
            unfolded = weight_hat / factor.detach().reshape(wide)
            y = call(linear, x_hat, linear.weight + (unfolded - linear.weight).detach(), bias)
            y = F.batch_norm(y, None, None, bn.weight, bn.bias, True, 0.0, bn.eps)
            y = y + error.reshape([-1] + [1] * (y.ndim - 2))
        else:
            weight = linear.weight * factor.reshape(wide)
            y = call(linear, x_hat, weight + (weight_hat - weight).detach(), folded + error)
    y = y if activation is None else activation(y)
    quantizer = layer.output_quantizer
    out = passes_through(y, quantizer, on_grid(y.detach().float(), quantizer))
    (out * cotangent(out)).sum().backward()
    found = {name: parameter.grad for name, parameter in linear.named_parameters()}
    if bn is not None:
        found |= {f"bn.{name}": parameter.grad for name, parameter in bn.named_parameters()}
    return out.detach(), {**found, "x": x.grad}


def assert_same(got: Gradients, wanted: Gradients) -> None:
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        size = value.abs().max().item()
        assert size > 1e-3 or name == "bias", name  # behind BatchNorm the gradient of the bias is 0
        torch.testing.assert_close(
            got[name].double(), value, rtol=2e-4, atol=2e-5 * max(size, 1.0), msg=lambda text, n=name: f"{n}: {text}"
        )


def frozen_observers(layer: QatLayer, x: Tensor) -> QatLayer:
    """All ranges as they are for a first batch, from then on fixed; the range clips a little."""
    in_eval(layer, x)
    layer.output_quantizer.scale.mul_(0.6)
    layer.sources[0].scale.mul_(0.7)
    layer.apply(qbench.disable_observer)
    return layer


@pytest.mark.parametrize("options", [{}, {"weight_bits": 4, "bias_bits": 16}], ids=["w8 b32", "w4 b16"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
class TestLayers:
    def test_training(self, case: Case, options: dict) -> None:
        layer, module = make_layer(case, **options)
        x = batch(case.shape, seed=6)
        frozen_observers(layer, x)
        wanted_out, wanted = reference(layer, module, x, batch_statistics=case.has_bn)
        out, got = gradients(layer.train(), x)
        if not case.has_bn:
            step = layer.output_quantizer.scale.item()
            torch.testing.assert_close(out.double(), wanted_out, rtol=0, atol=1.01 * step)
        assert_same(got, wanted)

    def test_frozen_batch_norm_and_eval(self, case: Case, options: dict) -> None:
        layer, module = make_layer(case, **options)
        x = batch(case.shape, seed=6)
        frozen_observers(layer, x)
        _, wanted = reference(layer, module, x, batch_statistics=False)
        _, in_eval_mode = gradients(layer.eval(), x)
        assert_same(in_eval_mode, wanted)
        layer.apply(qbench.freeze_bn_stats)
        _, frozen = gradients(layer.train(), x)
        assert all(torch.equal(frozen[name], in_eval_mode[name]) for name in wanted)


@pytest.mark.parametrize("case", BN_CASES[:3], ids=lambda case: case.name)
@pytest.mark.parametrize(
    "spec",
    [
        qbench.QSpec(bits=8, symmetric=True, narrow=True),
        qbench.QSpec(bits=8, symmetric=True, narrow=True, axis=0, power_of_two=True),
        qbench.QSpec(bits=8, axis=0),
    ],
    ids=str,
)
@pytest.mark.parametrize("batch_statistics", [True, False], ids=["train", "frozen"])
def test_general_weight_path(case: Case, spec: qbench.QSpec, batch_statistics: bool) -> None:
    layer, module = make_layer(case, config=qbench.QConfig(weight=spec))
    x = batch(case.shape, seed=6)
    frozen_observers(layer, x)
    _, wanted = reference(layer, module, x, batch_statistics=batch_statistics)
    layer.train()
    if not batch_statistics:
        layer.apply(qbench.freeze_bn_stats)
    _, got = gradients(layer, x)
    assert_same(got, wanted)


class TestWeight:
    CASE = case_named("conv bias bn")

    @pytest.mark.parametrize("bits", [8, 4, 2])
    def test_the_straight_through_gradient_of_the_weight_is_the_identity(self, bits: int) -> None:
        # Nothing of W is clipped or scaled: the gradient of the layer is that of the convolution at Ŵ/k.
        layer, module = make_layer(self.CASE, weight_bits=bits)
        x = batch(self.CASE.shape, seed=6)
        layer.train()
        layer.output_quantizer.fake_quant_enabled = False
        grid, _, _ = layer.quantized_parameters()
        out = layer(x)
        (out * cotangent(out)).sum().backward()
        weight = grid.unfolded().detach().requires_grad_()
        y = call(module[0], on_grid(x, layer.sources[0]), weight, module[0].bias.detach())
        bn = module[1]
        y = F.batch_norm(y, None, None, bn.weight, bn.bias, True, 0.0, bn.eps)
        (y * cotangent(y)).sum().backward()
        torch.testing.assert_close(layer.weight.grad, weight.grad, rtol=1e-5, atol=1e-6)

    def test_the_floor_does_not_cut_the_gradient(self) -> None:
        layer, module = make_layer(self.CASE)
        with torch.no_grad():
            layer.bn.bias[1] = module[1].bias.data[1] = 1e3
        x = batch(self.CASE.shape, seed=6)
        assert layer.parameter_codes().coarsened[1] > 1.05
        layer.train()
        frozen_observers(layer, x)
        layer.train()
        layer.output_quantizer.fake_quant_enabled = False
        out = layer(x)
        (out * cotangent(out)).sum().backward()
        assert layer.weight.grad[1].abs().max() > 1e-3

    def test_the_bias_error_gives_the_batch_norm_no_gradient(self) -> None:
        # b_f in e is detached: with e or without, γ, β and b get the same gradient.
        found = []
        for options in ({"bias_bits": 8, "bias_scale": "own"}, {}):
            layer, _ = make_layer(self.CASE, **options)
            layer.train()
            layer.output_quantizer.fake_quant_enabled = False
            out = layer(batch(self.CASE.shape, seed=6))
            (out * cotangent(out)).sum().backward()
            found.append({name: parameter.grad for name, parameter in layer.named_parameters()})
        for name in found[0]:
            assert torch.equal(found[0][name], found[1][name]), name


class TestClipping:
    def test_a_clipped_activation_has_gradient_zero(self) -> None:
        case = case_named("conv")
        layer, _ = make_layer(case)
        x = batch(case.shape, seed=6)
        in_eval(layer, x)
        layer.output_quantizer.scale.mul_(0.3)
        y = float_output(layer, x).detach()
        out, _ = gradients(layer, x)
        quantizer = layer.output_quantizer
        low, high = (
            (bound - quantizer.zero_point.item()) * quantizer.scale.item()
            for bound in (quantizer.spec.qmin, quantizer.spec.qmax)
        )
        half = quantizer.scale.item() / 2
        clipped = (y < low - half) | (y > high + half)
        assert 0.1 < clipped.float().mean() < 0.9
        # Through the layer: the gradient of the bias sums over the values that are not clipped.
        weights = cotangent(out)
        expected = torch.where(clipped, 0.0, weights).sum((0, 2, 3))
        torch.testing.assert_close(layer.bias.grad, expected, rtol=1e-4, atol=1e-4)

    def test_a_clipped_input_has_gradient_zero(self) -> None:
        case = case_named("linear")
        layer, _ = make_layer(case)
        in_eval(layer, batch(case.shape))
        layer.apply(qbench.disable_observer)
        x = batch(case.shape, seed=6)
        x[0, 0], x[1, 1] = 1e3, -1e3
        _, found = gradients(layer.train(), x)
        assert found["x"][0, 0] == 0 and found["x"][1, 1] == 0
        assert (found["x"] != 0).float().mean() > 0.8


class TestScales:
    """A learned scale gets its gradient through activation, weight and bias (by autograd on given scales)."""

    def test_input_scale_through_activation_and_bias(self) -> None:
        case = case_named("linear")
        layer, module = make_layer(case, bias_bits=16)
        source = layer.sources[0]
        x = batch(case.shape, seed=6)
        in_eval(layer, x)
        layer.output_quantizer.fake_quant_enabled = False
        scale = source.scale.clone().requires_grad_()
        source.snapshot = lambda: qbench.QParams(scale, source.zero_point, -128, 127)  # type: ignore[method-assign]
        source.scale_in_use = lambda: scale  # type: ignore[method-assign]
        out = layer(x)
        weights = cotangent(out)
        (out * weights).sum().backward()
        s, zero = np.float64(source.scale.item()), int(source.zero_point)
        position = x.numpy().astype(np.float64) / s
        code = np.clip(np.rint(position), -128 - zero, 127 - zero)
        slope = np.where(code == np.rint(position), code - position, code)
        codes = layer.parameter_codes()
        weight_hat = codes.weight.double().numpy() * codes.weight_qparams.scale.double().numpy()[:, None]
        through_activation = (weights.double().numpy() * (slope @ weight_hat.T)).sum()
        # ∂b̂/∂s_in = (q_b − b/s_b)·s_w
        bias = module.bias.detach().double().numpy()
        residual = codes.bias.double().numpy() - bias / codes.bias_scale.double().numpy()
        through_bias = (weights.double().numpy().sum(0) * residual * codes.weight_qparams.scale.double().numpy()).sum()
        assert abs(through_bias) > 1e-5
        assert scale.grad.item() == pytest.approx(through_activation + through_bias, rel=1e-4)

"""The bias error in training: seen in full by what follows, not by the BatchNorm that would cancel it."""

from __future__ import annotations

import copy
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

import qbench
from qbench.nn.qat.layer import QatLayer

from .support import (
    BN_CASES,
    Case,
    batch,
    call,
    case_named,
    channel_axis,
    expect,
    float_output,
    make_layer,
    normalized,
    on_grid,
    parts_of,
    same_bits,
    spread_channels,
)

# A bias width whose rounding is far above the rounding of float32.
COARSE = [("16 bits at input_weight", {"bias_bits": 16}), ("own 8 bits", {"bias_bits": 8, "bias_scale": "own"})]
coarse = pytest.mark.parametrize("options", [options for _, options in COARSE], ids=[name for name, _ in COARSE])


def own_error(bias: np.ndarray, bits: int, *, power_of_two: bool = False) -> np.ndarray:
    """e of a bias with a scale of its own, by numpy."""
    largest = np.abs(bias).max()
    scale = np.float32(largest) / np.float32(2 ** (bits - 1) - 1)
    if power_of_two:
        scale = np.float32(2.0 ** np.ceil(np.log2(np.float64(scale))))
    codes = np.rint(bias.astype(np.float64) / np.float64(scale))
    return codes.astype(np.float32) * scale - bias


def pre_activation_output(layer: QatLayer, x: Tensor) -> Tensor:
    """Output without activation and output quantizer."""
    activation, layer.activation_module = layer.activation_module, None
    try:
        return float_output(layer, x).detach()
    finally:
        layer.activation_module = activation


def expected_error(module: torch.nn.Module, scale: float, options: dict) -> Tensor:
    if options.get("bias_scale") == "own":
        return torch.from_numpy(own_error(expect(module, scale).bias, options["bias_bits"]))
    return expect(module, scale, bias_bits=options["bias_bits"]).error


@pytest.mark.parametrize("case", BN_CASES, ids=lambda case: case.name)
@coarse
def test_train_output_moves_by_exactly_the_error(case: Case, options: dict) -> None:
    layer, module = make_layer(case, **options)
    layer.train()
    x = batch(case.shape, seed=5)
    scale = layer.sources[0].scale.item()
    expected = expect(module, scale)  # weights do not depend on the width of the bias
    linear, bn, _ = parts_of(module)
    with torch.no_grad():
        y = call(linear, on_grid(x, layer.sources[0]), expected.unfolded, linear.bias)
        error = expected_error(module, scale, options)
        without, wanted = normalized(y, bn), normalized(y, bn, error=error)
    got = pre_activation_output(layer, x)
    assert error.abs().max() > (1e-4 if "bias_scale" in options else 1e-6)
    assert same_bits(got, wanted)
    moved = without.double() + spread_channels(error.double(), got, channel_axis(linear))
    torch.testing.assert_close(got.double(), moved, rtol=0, atol=float(without.abs().max()) * 2**-22)


class TestNotAbsorbed:
    CASE = case_named("conv bias bn")
    OPTIONS: ClassVar = {"bias_bits": 8, "bias_scale": "own"}
    STEPS = 60

    def test_running_mean_is_that_of_the_convolution_alone(self) -> None:
        layer, module = make_layer(self.CASE, **self.OPTIONS)
        layer.train()
        linear, bn, _ = parts_of(module)
        scale = layer.sources[0].scale.item()
        error = expected_error(module, scale, self.OPTIONS)
        unfolded = expect(module, scale).unfolded  # codes of W do not move with the statistics
        inside_mean, inside_var = bn.running_mean.clone(), bn.running_var.clone()
        for step in range(self.STEPS):
            x = batch(self.CASE.shape, seed=100 + step)
            with torch.no_grad():
                y = call(linear, on_grid(x, layer.sources[0]), unfolded, linear.bias)
                normalized(y, bn, running=(bn.running_mean, bn.running_var))
                k = torch.from_numpy(expect(module, scale).factor)
                normalized(y + (error / k).reshape(1, -1, 1, 1), bn, running=(inside_mean, inside_var))
            layer(x)
        assert same_bits(layer.bn.running_mean, bn.running_mean)
        assert same_bits(layer.bn.running_var, bn.running_var)
        # The alternative, adding the error before BatchNorm, has drifted by what it should have shown.
        drift = (inside_mean - bn.running_mean).abs().max()
        assert drift > 1e-3
        assert drift > 0.5 * (error / k).abs().max()

    def test_added_before_batch_norm_it_would_not_be_seen(self) -> None:
        layer, module = make_layer(self.CASE, **self.OPTIONS)
        layer.train()
        x = batch(self.CASE.shape, seed=5)
        linear, bn, _ = parts_of(module)
        scale = layer.sources[0].scale.item()
        expected, error = expect(module, scale), expected_error(module, scale, self.OPTIONS)
        with torch.no_grad():
            y = call(linear, on_grid(x, layer.sources[0]), expected.unfolded, linear.bias)
            clean = normalized(y, bn)
            inside = normalized(y + (error / torch.from_numpy(expected.factor)).reshape(1, -1, 1, 1), bn)
        assert (inside - clean).abs().max() < 1e-5
        seen = (pre_activation_output(layer, x) - clean).abs().amax((0, 2, 3))
        torch.testing.assert_close(seen, error.abs(), rtol=1e-3, atol=1e-6)
        assert seen.max() > 100 * (inside - clean).abs().max()

    def test_train_and_eval_have_the_same_error(self) -> None:
        # eval minus the folded layer with a float bias is e; train minus BN of the convolution is e: the same numbers.
        layer, module = make_layer(self.CASE, **self.OPTIONS)
        x = batch(self.CASE.shape, seed=5)
        linear, bn, _ = parts_of(module)
        scale = layer.sources[0].scale.item()
        expected = expect(module, scale)
        x_hat = on_grid(x, layer.sources[0])
        with torch.no_grad():
            layer.eval()
            folded = call(linear, x_hat, expected.weight, torch.from_numpy(expected.bias))
            in_eval = (float_output(layer, x) - folded).mean((0, 2, 3))
            layer.train()
            batch_norm = normalized(call(linear, x_hat, expected.unfolded, linear.bias), bn)
            in_training = (float_output(layer, x) - batch_norm).mean((0, 2, 3))
        assert in_eval.abs().max() > 1e-3
        torch.testing.assert_close(in_eval, in_training, rtol=1e-3, atol=1e-6)

    def test_statistics_settle_where_the_batches_are(self) -> None:
        # With fixed weights and one batch again and again, the running mean is the batch's mean and stays there.
        layer, module = make_layer(self.CASE, **self.OPTIONS)
        layer.train()
        x = batch(self.CASE.shape, seed=5)
        linear, _, _ = parts_of(module)
        unfolded = expect(module, layer.sources[0].scale.item()).unfolded
        with torch.no_grad():
            mean = call(linear, on_grid(x, layer.sources[0]), unfolded, linear.bias).mean((0, 2, 3))
            for _ in range(150):  # momentum 0.3
                layer(x)
        torch.testing.assert_close(layer.bn.running_mean, mean, rtol=1e-5, atol=1e-6)


WIDTHS = [(bits, "input_weight") for bits in (16, 17, 20, 23, 24, 28, 32)]
WIDTHS += [(bits, scale) for bits in (8, 12, 16, 32) for scale in ("own", "own_pow2")]


@pytest.mark.parametrize(("bits", "scale"), WIDTHS)
def test_every_width_and_scale_rule_is_on_its_grid(bits: int, scale: str) -> None:
    case = case_named("grouped bn relu6")
    layer, module = make_layer(case, bias_bits=bits, bias_scale=scale)
    codes = layer.parameter_codes()
    input_scale = layer.sources[0].scale
    bias = expect(module, input_scale.item()).bias
    got = codes.bias_value.numpy()
    if scale == "input_weight":
        assert same_bits(codes.bias_scale, input_scale * codes.weight_qparams.scale)
        step = codes.bias_scale.numpy()
    else:
        assert codes.bias_scale.shape == ()
        step = codes.bias_scale.item()
        assert np.float32(step) * (2 ** (bits - 1) - 1) >= np.abs(bias).max()  # the largest bias fits
        if scale == "own":
            limit = min(2 ** (bits - 1) - 1, 2**22)
            assert np.abs(codes.bias.numpy()).max() == limit  # and uses the whole range
        else:
            assert np.log2(np.float64(step)) == round(np.log2(np.float64(step)))
    np.testing.assert_array_equal(codes.bias.numpy(), np.rint(bias.astype(np.float64) / np.float64(step)))
    np.testing.assert_array_equal(got, codes.bias.numpy().astype(np.float32) * np.float32(step))
    assert (np.abs(got - bias) <= 0.5001 * step).all()
    assert not codes.bias_saturated.any()
    assert codes.bias.dtype == torch.int64
    assert codes.bias.abs().max() <= min(2 ** (bits - 1) - 1, 2**22)


def test_own_scale_leaves_the_weights_alone() -> None:
    case = case_named("conv bias bn")
    wide, _ = make_layer(case)
    narrow, _ = make_layer(case, bias_bits=8, bias_scale="own")
    assert torch.equal(wide.parameter_codes().weight, narrow.parameter_codes().weight)
    assert same_bits(wide.parameter_codes().weight_qparams.scale, narrow.parameter_codes().weight_qparams.scale)
    assert (narrow.parameter_codes().coarsened == 1).all()


def test_a_layer_without_bias_has_codes_of_zero() -> None:
    layer, _ = make_layer(case_named("conv no bias"))
    codes = layer.parameter_codes()
    assert codes.bias.shape == (5,) and (codes.bias == 0).all() and (codes.bias_value == 0).all()


def test_the_bias_error_follows_the_inputs_scale() -> None:
    case = case_named("conv bn")
    layer, module = make_layer(case, bias_bits=16)
    layer.eval()
    for scale in (0.01, 0.017, 0.3):
        layer.sources[0].scale.fill_(scale)
        expected = expect(module, np.float32(scale), bias_bits=16)
        assert same_bits(layer.parameter_codes().bias_value, expected.bias_hat)


def test_same_bias_error_after_a_copy() -> None:
    # The link is a strong reference that is not a submodule: a copy points at its own quantizer.
    layer, _ = make_layer(case_named("conv bn"), bias_bits=16)
    twin = copy.deepcopy(layer)
    assert twin.sources[0] is not layer.sources[0]
    twin.sources[0].scale.mul_(2)
    assert not torch.equal(twin.parameter_codes().bias, layer.parameter_codes().bias)
    assert qbench.get_qconfig(bias_bits=16) == twin.qconfig

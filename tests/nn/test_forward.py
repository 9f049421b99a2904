"""The forward of every kind of layer: eval bit for bit, training with the batch's statistics, frozen BatchNorm."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qbench
from qbench.errors import LinkError, QBenchWarning
from qbench.nn import intrinsic as nni
from qbench.nn.intrinsic import qat as nniqat
from qbench.nn.qat.layer import QatLayer

from .support import (
    BN_CASES,
    CASES,
    Case,
    batch,
    call,
    case_named,
    channel_axis,
    expect,
    float_output,
    in_eval,
    make_layer,
    normalized,
    on_grid,
    parts_of,
    same_bits,
    spread_channels,
)

cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
bn_cases = pytest.mark.parametrize("case", BN_CASES, ids=lambda case: case.name)


def source_of(layer: QatLayer) -> Any:
    return layer.sources[0]


def float64(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).double()


class TestEval:
    @cases
    @pytest.mark.parametrize("bits", [(8, 32), (4, 32), (8, 16)], ids=["w8 b32", "w4 b32", "w8 b16"])
    def test_output_is_one_call_on_the_quantized_tensors_bit_for_bit(self, case: Case, bits: tuple[int, int]) -> None:
        weight_bits, bias_bits = bits
        layer, module = make_layer(case, weight_bits=weight_bits, bias_bits=bias_bits)
        x = batch(case.shape, seed=3)
        in_eval(layer, x)
        linear, _, activation = parts_of(module)
        source = source_of(layer)
        expected = expect(module, source.scale.item(), weight_bits=weight_bits, bias_bits=bias_bits)
        with torch.no_grad():
            y = call(linear, on_grid(x, source), expected.weight, expected.bias_hat)
            y = y if activation is None else activation(y)
            assert same_bits(float_output(layer, x), y)
            assert torch.equal(layer(x), on_grid(y, layer.output_quantizer))

    def test_a_separate_addition_of_the_bias_would_be_seen(self) -> None:
        # The test above can fail: adding the bias after the convolution changes most bit patterns. Which kernel adds it
        # last anyway depends on the CPU: those of AVX-512 do in small dense convolutions, not in depthwise ones.
        depthwise = Case(
            "depthwise bn",
            nniqat.ConvBn2d,
            lambda: nni.ConvBn2d(nn.Conv2d(32, 32, 3, groups=32, bias=False), nn.BatchNorm2d(32)),
            (2, 32, 14, 14),
        )
        assert max(map(self.share_that_a_separate_addition_changes, (case_named("conv bn"), depthwise))) > 0.2

    def share_that_a_separate_addition_changes(self, case: Case) -> float:
        layer, module = make_layer(case)
        x = batch(case.shape, seed=3)
        in_eval(layer, x)
        expected = expect(module, source_of(layer).scale.item())
        with torch.no_grad():
            y = call(module[0], on_grid(x, source_of(layer)), expected.weight, None)
            apart = y + expected.bias_hat.reshape(1, -1, 1, 1)
            return float((apart != float_output(layer, x)).float().mean())

    @cases
    def test_eval_is_the_float_module_up_to_the_grids(self, case: Case) -> None:
        layer, module = make_layer(case)
        x = batch(case.shape)  # what the input quantizer saw: nothing is clipped
        in_eval(layer, x)
        expected = expect(module, source_of(layer).scale.item())
        fan_in = expected.weight_codes.size // len(expected.bias)
        largest = np.abs(expected.weight_codes).max() * expected.weight_scale.max()
        source_step, out_step = source_of(layer).scale.item(), layer.output_quantizer.scale.item()
        rounding = source_step * largest + expected.weight_scale.max() * x.abs().max().item()
        with torch.no_grad():
            difference = (layer(x) - module.eval()(x)).abs()
        assert difference.max() < 0.5 * (fan_in * rounding + out_step)
        assert difference.mean() < 0.1 * fan_in * rounding

    @cases
    def test_eval_changes_nothing(self, case: Case) -> None:
        layer, _ = make_layer(case)
        in_eval(layer, batch(case.shape))
        before = {name: value.clone() for name, value in layer.state_dict().items()}
        layer(batch(case.shape, seed=9, spread=7.0))
        assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


class TestTraining:
    @bn_cases
    @pytest.mark.parametrize("bias_bits", [32, 16])
    def test_output_is_the_batch_norm_of_the_convolution_plus_the_error(self, case: Case, bias_bits: int) -> None:
        layer, module = make_layer(case, bias_bits=bias_bits)
        layer.train()
        for step in range(3):  # the running statistics move: each step uses those before its own update
            x = batch(case.shape, seed=10 + step)
            linear, bn, activation = parts_of(module)
            before = bn.running_mean.clone(), bn.running_var.clone()
            expected = expect(module, source_of(layer).scale.item(), bias_bits=bias_bits)
            with torch.no_grad():
                y = call(linear, on_grid(x, source_of(layer)), expected.unfolded, linear.bias)
                y = normalized(y, bn, error=expected.error, running=(bn.running_mean, bn.running_var))
                y = y if activation is None else activation(y)
            got = float_output(layer, x).detach()
            assert same_bits(got, y)
            assert same_bits(layer.bn.running_mean, bn.running_mean)
            assert same_bits(layer.bn.running_var, bn.running_var)
            assert not torch.equal(before[0], bn.running_mean)

    @bn_cases
    def test_against_the_equation_in_float64(self, case: Case) -> None:
        layer, module = make_layer(case, bias_bits=16)
        layer.train()
        x = batch(case.shape, seed=10)
        expected = expect(module, source_of(layer).scale.item(), bias_bits=16)
        linear, bn, activation = (part if part is None else float64(part) for part in parts_of(module))
        with torch.no_grad():
            folded = expected.weight.double() / torch.from_numpy(expected.factor).double().reshape(expected.wide)
            y = call(linear, on_grid(x, source_of(layer)).double(), folded, None)
            axis = channel_axis(linear)
            bias = torch.zeros(len(expected.bias)).double() if linear.bias is None else linear.bias
            y = y + spread_channels(bias, y, axis)
            y = normalized(y, bn) + spread_channels(expected.error.double(), y, axis)
            y = y if activation is None else activation(y)
        torch.testing.assert_close(float_output(layer, x).double(), y, rtol=1e-4, atol=2e-5)

    def test_the_error_is_that_of_the_statistics_before_the_update(self) -> None:
        case = case_named("conv bias bn")
        layer, module = make_layer(case, bias_bits=16)
        x = batch(case.shape, seed=10, spread=3.0)
        before = expect(module, source_of(layer).scale.item(), bias_bits=16)
        layer.train()
        got = float_output(layer, x).detach()
        _, bn, _ = parts_of(module)
        with torch.no_grad():
            y = call(module[0], on_grid(x, source_of(layer)), before.unfolded, module[0].bias)
            wanted = normalized(y, bn, error=before.error, running=(bn.running_mean, bn.running_var))
            after = expect(module, source_of(layer).scale.item(), bias_bits=16)
        assert same_bits(got, wanted)
        assert not torch.equal(before.error, after.error)
        assert not torch.equal(got, normalized(y, bn, error=after.error))

    @pytest.mark.parametrize("case", [c for c in CASES if not c.has_bn], ids=lambda case: case.name)
    def test_without_batch_norm_training_and_eval_are_one(self, case: Case) -> None:
        layer, _ = make_layer(case)
        x = batch(case.shape, seed=3)
        layer.train()
        in_training = float_output(layer, x).detach()
        assert same_bits(in_training, float_output(layer.eval(), x).detach())

    @bn_cases
    def test_first_batch(self, case: Case) -> None:
        # Nothing was seen before: input and output quantizers take this batch's range, and the bias error is there.
        module = case.make()
        layer = case.qat.from_float(copy.deepcopy(module), qbench.get_qconfig(bias_bits=16))
        source = layer.qconfig.make_activation()
        layer.connect((source,), owned=(0,))
        layer.train()
        source.train()
        x = batch(case.shape)
        out = layer(x)
        assert source.seen_data and layer.output_quantizer.seen_data
        assert source.scale.item() == pytest.approx((x.max().item() - x.min().item()) / 255, rel=1e-6)
        linear, bn, activation = parts_of(module.train())
        expected = expect(module, source.scale.item(), bias_bits=16)
        with torch.no_grad():
            y = call(linear, on_grid(x, source), expected.unfolded, linear.bias)
            y = normalized(y, bn, error=expected.error)
            y = y if activation is None else activation(y)
        assert torch.equal(out, on_grid(y, layer.output_quantizer))
        assert torch.isfinite(out).all()


class TestFrozenBatchNorm:
    @bn_cases
    def test_training_with_frozen_statistics_is_eval(self, case: Case) -> None:
        layer, _ = make_layer(case, bias_bits=16)
        x = batch(case.shape, seed=3)
        in_eval(layer, x)
        wanted = float_output(layer, x)
        layer.train()
        layer.apply(qbench.freeze_bn_stats)
        layer.train()  # survives a second call
        mean, var = layer.bn.running_mean.clone(), layer.bn.running_var.clone()
        batches = layer.bn.num_batches_tracked.clone()
        assert same_bits(float_output(layer, x), wanted)
        assert same_bits(layer.bn.running_mean, mean) and same_bits(layer.bn.running_var, var)
        assert torch.equal(layer.bn.num_batches_tracked, batches)

    @bn_cases
    def test_update_bn_stats_undoes_it(self, case: Case) -> None:
        layer, _ = make_layer(case)
        layer.train()
        x = batch(case.shape, seed=3)
        reference = copy.deepcopy(layer)
        layer.apply(qbench.freeze_bn_stats)
        layer.apply(qbench.update_bn_stats)
        assert layer.bn.training
        assert same_bits(float_output(layer, x).detach(), float_output(reference, x).detach())
        assert same_bits(layer.bn.running_mean, reference.bn.running_mean)

    def test_through_a_model(self) -> None:
        model = qbench.fuse(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1)).eval())
        x = batch((4, 3, 6, 6))
        model = qbench.prepare_qat(model, qconfig=qbench.get_qconfig(), example_inputs=(x,)).train()
        model(x)
        model.apply(qbench.freeze_bn_stats)
        model.eval()
        model.train()
        (layer,) = (m for m in model.modules() if isinstance(m, QatLayer) and m.bn is not None)
        before = layer.bn.running_mean.clone()
        model(x)
        assert same_bits(before, layer.bn.running_mean)
        assert layer.training and not layer.bn.training
        model.apply(qbench.update_bn_stats)
        model(x)
        assert not torch.equal(before, layer.bn.running_mean)

    def test_a_batch_norm_that_the_user_put_in_eval_keeps_its_statistics(self) -> None:
        # The usual way of freezing BatchNorm in a float model.
        case = case_named("conv bias bn")
        layer, _ = make_layer(case, bias_bits=16)
        x = batch(case.shape, seed=3)
        in_eval(layer, x)
        wanted = float_output(layer, x)
        layer.train()
        for module in layer.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        before = layer.bn.running_mean.clone()
        got = float_output(layer, x)
        assert same_bits(before, layer.bn.running_mean)
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


class TestCumulativeAverage:
    def test_momentum_none(self) -> None:
        module = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, momentum=None))
        case = Case("x", case_named("conv bn").qat, lambda: case_named("conv bn").qat.float_type(*module), (4, 3, 6, 6))
        layer = case.qat.from_float(case.make(), qbench.get_qconfig(bias_bits=16))
        source = layer.qconfig.make_activation()
        layer.connect((source,), owned=(0,))
        layer.train(), source.train()
        means = []
        for step in range(3):
            x = batch(case.shape, seed=step)
            seen: list[Tensor] = []
            handle = layer.bn.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].detach()))
            layer(x)
            handle.remove()
            means.append(seen[0].mean((0, 2, 3)))
        torch.testing.assert_close(layer.bn.running_mean, torch.stack(means).mean(0), rtol=1e-5, atol=1e-6)
        assert layer.bn.num_batches_tracked == 3


class TestDisabledFakeQuant:
    def test_without_the_inputs_grid_there_is_no_bias_error(self) -> None:
        case = case_named("conv bn")
        layer, module = make_layer(case, bias_bits=16)
        x = batch(case.shape, seed=3)
        source_of(layer).fake_quant_enabled = False
        linear, bn, _ = parts_of(module)
        expected = expect(module, source_of(layer).scale.item(), bias_bits=16)
        assert expected.error.abs().max() > 1e-5
        layer.eval()
        with torch.no_grad():
            wanted = call(linear, x, expected.weight, torch.from_numpy(expected.bias))
            assert same_bits(float_output(layer, x), wanted)
        layer.train()
        with torch.no_grad():
            wanted = normalized(call(linear, x, expected.unfolded, None), bn)
            assert same_bits(float_output(layer, x), wanted)

    def test_a_source_without_data_gives_no_bias_error(self) -> None:
        case = case_named("conv bn")
        layer, module = make_layer(case, bias_bits=16)
        layer.connect((layer.qconfig.make_activation(),))
        x = batch(case.shape, seed=3)
        expected = expect(module, 1.0)
        layer.eval()
        with torch.no_grad():
            wanted = call(module[0], x, expected.weight, torch.from_numpy(expected.bias))
            assert same_bits(float_output(layer, x), wanted)

    @cases
    def test_everything_disabled_is_the_folded_float_layer(self, case: Case) -> None:
        layer, module = make_layer(case)
        layer.apply(qbench.disable_fake_quant)
        x = batch(case.shape, seed=3)
        with torch.no_grad():
            torch.testing.assert_close(layer.eval()(x), module.eval()(x), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(layer.train()(x), module.train()(x), rtol=1e-4, atol=1e-5)

    @cases
    def test_enabled_again_it_is_what_it_was(self, case: Case) -> None:
        layer, _ = make_layer(case)
        x = batch(case.shape, seed=3)
        in_eval(layer, x)
        before = layer(x).detach()
        layer.apply(qbench.disable_fake_quant)
        assert not torch.equal(layer(x), before)
        layer.apply(qbench.enable_fake_quant)
        assert same_bits(layer(x), before)

    def test_weight_in_float_has_no_bias_error_either(self) -> None:
        case = case_named("conv")
        layer, module = make_layer(case, bias_bits=16)
        layer.weight_quantizer.fake_quant_enabled = False
        x = batch(case.shape, seed=3)
        with torch.no_grad():
            wanted = call(module, on_grid(x, source_of(layer)), module.weight, module.bias)
            assert same_bits(float_output(layer.eval(), x), wanted)


class TestLinks:
    def test_an_unlinked_layer_says_what_to_do(self) -> None:
        layer = case_named("conv").qat.from_float(nn.Conv2d(3, 5, 3), qbench.get_qconfig())
        with pytest.raises(LinkError, match=r"no recorded forward reached it.*example_inputs="):
            layer(batch((1, 3, 5, 5)))
        with pytest.raises(LinkError, match="input 0 has no link"):
            layer.input_qparams()

    def test_an_input_that_arrives_in_float_is_quantized_here(self) -> None:
        case = case_named("conv")
        layer, _ = make_layer(case)
        x = batch(case.shape, seed=4)
        in_eval(layer, x)
        source = source_of(layer)
        assert set(layer.input_quantizers) == {"0"}
        owned = layer.eval()(x)
        layer.connect((source,))
        assert len(layer.input_quantizers) == 0
        assert same_bits(layer(on_grid(x, source)), owned)
        assert not torch.equal(layer(x), owned)

    def test_output_in_eval_without_data_is_float_and_warns(self) -> None:
        layer, _ = make_layer(case_named("conv"))
        with pytest.warns(QBenchWarning, match="has seen no data"):
            layer.eval()(batch(case_named("conv").shape))

"""A quantizer, or a whole layer, that is used more than once in one step: what backward reads must not change."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import qbench
from qbench.fake_quantize import FakeQuantize
from qbench.nn import intrinsic as nni
from qbench.nn.intrinsic import qat as nniqat
from qbench.observers import MovingAverageMinMaxObserver

from .support import batch, call, case_named, make_layer, normalized, on_grid, parts_of, same_bits, trained


def moving(constant: float = 0.5) -> FakeQuantize:
    spec = qbench.QSpec(bits=8)
    return FakeQuantize(spec, MovingAverageMinMaxObserver(spec, averaging_constant=constant)).train()


def test_each_use_has_the_gradient_of_its_own_grid() -> None:
    quantizer = moving()
    first, second = batch((100,), seed=1), batch((100,), seed=2, spread=20.0)
    a, b = first.clone().requires_grad_(), second.clone().requires_grad_()
    out_a = quantizer(a)
    grid_a = quantizer.snapshot()
    out_b = quantizer(b)
    grid_b = quantizer.snapshot()
    assert not torch.equal(grid_a.scale, grid_b.scale)
    (out_a.sum() + out_b.sum()).backward()
    for x, out, grid in ((a, out_a, grid_a), (b, out_b, grid_b)):
        alone = x.detach().clone().requires_grad_()
        wanted = torch.fake_quantize_per_tensor_affine(
            alone, grid.scale.item(), int(grid.zero_point), grid.qmin, grid.qmax
        )
        wanted.sum().backward()
        assert torch.equal(out, wanted)
        assert torch.equal(x.grad, alone.grad)
    assert (b.grad == 0).any()  # the average lags behind: something is clipped


def test_a_snapshot_does_not_move() -> None:
    quantizer = moving()
    quantizer(batch((100,)))
    grid = quantizer.snapshot()
    scale, zero_point = grid.scale.clone(), grid.zero_point.clone()
    quantizer(batch((100,), spread=30.0) + 5)
    assert same_bits(grid.scale, scale) and torch.equal(grid.zero_point, zero_point)
    assert not torch.equal(quantizer.scale, scale)


@pytest.mark.parametrize("name", ["conv", "conv relu", "conv bias bn", "depthwise bn relu", "linear bn"])
def test_a_layer_called_per_pyramid_level(name: str) -> None:
    # Two calls, one backward: gradients are the sum of those of two twins that were called once each.
    case = case_named(name)
    layer, _ = make_layer(case, bias_bits=16)
    layer.train()
    layer.sources[0].observer_enabled = True
    levels = [batch(case.shape, seed=1), batch(case.shape, seed=2, spread=3.0)]
    before = copy.deepcopy(layer.state_dict())
    outputs = [layer(level) for level in levels]
    sum((out * out).sum() for out in outputs).backward()
    got = {key: parameter.grad for key, parameter in layer.named_parameters()}
    twin, _ = make_layer(case, bias_bits=16)
    twin.train()
    twin.sources[0].observer_enabled = True
    twin.load_state_dict(before)
    for level, out in zip(levels, outputs, strict=True):
        again = twin(level)
        assert same_bits(again, out)
        (again * again).sum().backward()
    for key, parameter in twin.named_parameters():
        torch.testing.assert_close(got[key], parameter.grad, rtol=1e-5, atol=1e-5)
    assert same_bits(layer.output_quantizer.scale, twin.output_quantizer.scale)


def test_batch_norm_sees_both_calls_in_order() -> None:
    case = case_named("conv bias bn")
    layer, module = make_layer(case, bias_bits=16)
    layer.train()
    linear, bn, _ = parts_of(module)
    for seed in (1, 2):
        x = batch(case.shape, seed=seed)
        unfolded = layer.quantized_parameters()[0].unfolded().detach()
        layer(x)
        with torch.no_grad():
            y = call(linear, on_grid(x, layer.sources[0]), unfolded, linear.bias)
            normalized(y, bn, running=(bn.running_mean, bn.running_var))
    assert same_bits(layer.bn.running_mean, bn.running_mean)
    assert same_bits(layer.bn.running_var, bn.running_var)


def test_a_silenced_channel_in_a_layer_that_is_called_twice() -> None:
    # Its statistics are put back in place: backward must not refuse, nor be wrong.
    case = case_named("conv bias bn")
    module = trained(case.make())
    with torch.no_grad():
        module[1].bias[1] = 1e6
    layer = case.qat.from_float(module, qbench.get_qconfig())
    source = moving()
    layer.connect((source,), owned=(0,))
    layer.train()
    x = batch(case.shape)
    (layer(x).sum() + (layer(x * 2) ** 2).sum()).backward()
    assert layer.parameter_codes().silenced.tolist() == [False, True, False, False, False]
    assert all(torch.isfinite(parameter.grad).all() for parameter in layer.parameters())


class Branches(nn.Module):
    """One output, read by two layers and by itself through an addition; `inner` is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nni.ConvBnReLU2d(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.inner = nni.ConvBn2d(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.add = qbench.nn.AddReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.add(self.inner(x), self.inner(self.inner(x)))


def test_a_shared_quantizer_in_a_model() -> None:
    x = batch((4, 3, 6, 6))
    model = qbench.prepare_qat(Branches(), qconfig=qbench.get_qconfig(bias_bits=16), example_inputs=(x,)).train()
    # `inner` reads `first` and itself: the hardware has one scale there.
    assert model.first.output_quantizer is model.inner.output_quantizer
    assert model.inner.sources == (model.inner.output_quantizer,)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(3):
        optimizer.zero_grad()
        F.mse_loss(model(batch((4, 3, 6, 6), seed=step)), torch.ones(4, 4, 6, 6)).backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
        optimizer.step()
    assert isinstance(model.inner, nniqat.ConvBn2d)
    assert model.inner.bn.num_batches_tracked == 9  # three calls a step

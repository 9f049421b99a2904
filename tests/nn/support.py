"""Layers to test and the equations that they must satisfy, written here from the equations in numpy and plain torch.

Nothing in `Expected` calls `qbench.numerics`: it is the second opinion.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numerics import support as floor
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

import qbench
from qbench.fake_quantize import FakeQuantize
from qbench.nn import intrinsic as nni
from qbench.nn import qat as nnqat
from qbench.nn.intrinsic import qat as nniqat
from qbench.nn.qat.layer import QatLayer


def without_native(monkeypatch: pytest.MonkeyPatch) -> None:
    """No C++, so that generated code serves what it would."""
    for steps in ("following", "clipping", "learned_rounding"):
        monkeypatch.setattr(f"qbench.nn.qat.epilogue.{steps}", lambda *_: None)
    monkeypatch.setattr("qbench.nn.qat.fast_parameters.native_parameters", lambda *_: None)
    monkeypatch.setattr("qbench.nn.qat.parameters.weight_rounding", lambda *_: None)


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Equal in dtype, shape and every bit; gradients do not matter."""
    return floor.same_bits(left.detach(), right.detach())


@dataclasses.dataclass(frozen=True)
class Case:
    """A float module, the QAT class that it becomes, and the shape of an input."""

    name: str
    qat: type[QatLayer]
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]

    @property
    def has_bn(self) -> bool:
        return self.qat.bn_type() is not None


# Sizes are odd and kernels small: a mistake in an axis or a shape shows.
CASES = [
    Case("conv", nnqat.Conv2d, lambda: nn.Conv2d(3, 5, 3, padding=1), (4, 3, 7, 6)),
    Case("conv no bias", nnqat.Conv2d, lambda: nn.Conv2d(3, 5, 3, bias=False), (4, 3, 7, 6)),
    Case("conv same", nnqat.Conv2d, lambda: nn.Conv2d(3, 5, 3, dilation=2, padding="same"), (4, 3, 7, 6)),
    Case("conv reflect", nnqat.Conv2d, lambda: nn.Conv2d(3, 5, 3, padding=1, padding_mode="reflect"), (4, 3, 7, 6)),
    Case("conv1d", nnqat.Conv1d, lambda: nn.Conv1d(3, 5, 3, stride=2), (4, 3, 9)),
    Case("conv3d", nnqat.Conv3d, lambda: nn.Conv3d(2, 3, 2, padding=1), (2, 2, 4, 3, 3)),
    Case("conv transposed", nnqat.ConvTranspose2d, lambda: nn.ConvTranspose2d(3, 5, 3, stride=2), (2, 3, 4, 5)),
    Case("conv1d transposed", nnqat.ConvTranspose1d, lambda: nn.ConvTranspose1d(3, 5, 3, stride=2), (2, 3, 7)),
    Case("conv3d transposed", nnqat.ConvTranspose3d, lambda: nn.ConvTranspose3d(2, 3, 2, stride=2), (2, 2, 3, 4, 3)),
    Case(
        "transposed relu",
        nniqat.ConvTransposeReLU2d,
        lambda: nni.ConvTransposeReLU2d(nn.ConvTranspose2d(3, 5, 3), nn.Hardtanh(-0.5, 0.5)),
        (2, 3, 4, 5),
    ),
    Case("linear", nnqat.Linear, lambda: nn.Linear(11, 5), (6, 11)),
    Case("linear 3d", nnqat.Linear, lambda: nn.Linear(11, 5), (6, 4, 11)),
    Case("conv relu", nniqat.ConvReLU2d, lambda: nni.ConvReLU2d(nn.Conv2d(3, 5, 3), nn.ReLU()), (4, 3, 7, 6)),
    Case("linear relu6", nniqat.LinearReLU, lambda: nni.LinearReLU(nn.Linear(11, 5), nn.ReLU6()), (6, 11)),
    Case(
        "conv bn",
        nniqat.ConvBn2d,
        lambda: nni.ConvBn2d(nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5, eps=1e-3)),
        (4, 3, 7, 6),
    ),
    Case(
        "conv bias bn",
        nniqat.ConvBn2d,
        lambda: nni.ConvBn2d(nn.Conv2d(3, 5, 3, stride=2, padding=1), nn.BatchNorm2d(5, momentum=0.3)),
        (4, 3, 7, 6),
    ),
    Case(
        "depthwise bn relu",
        nniqat.ConvBnReLU2d,
        lambda: nni.ConvBnReLU2d(nn.Conv2d(6, 6, 3, groups=6, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True)),
        (4, 6, 7, 6),
    ),
    Case(
        "grouped bn relu6",
        nniqat.ConvBnReLU2d,
        lambda: nni.ConvBnReLU2d(nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6, eps=1e-2), nn.ReLU6()),
        (4, 4, 7, 6),
    ),
    Case(
        "conv1d bn",
        nniqat.ConvBn1d,
        lambda: nni.ConvBn1d(nn.Conv1d(3, 5, 3), nn.BatchNorm1d(5)),
        (4, 3, 9),
    ),
    Case(
        "conv3d bn relu",
        nniqat.ConvBnReLU3d,
        lambda: nni.ConvBnReLU3d(nn.Conv3d(2, 3, 2, bias=False), nn.BatchNorm3d(3), nn.ReLU()),
        (3, 2, 4, 3, 3),
    ),
    Case(
        "transposed bn relu",
        nniqat.ConvTransposeBnReLU2d,
        lambda: nni.ConvTransposeBnReLU2d(nn.ConvTranspose2d(3, 5, 3, stride=2), nn.BatchNorm2d(5), nn.ReLU()),
        (2, 3, 4, 5),
    ),
    Case(
        "conv3d transposed bn",
        nniqat.ConvTransposeBn3d,
        lambda: nni.ConvTransposeBn3d(nn.ConvTranspose3d(2, 3, 2, bias=False), nn.BatchNorm3d(3)),
        (3, 2, 3, 4, 3),
    ),
    Case(
        "linear bn", nniqat.LinearBn1d, lambda: nni.LinearBn1d(nn.Linear(11, 5), nn.BatchNorm1d(5)), (16, 11)
    ),
    Case(
        "linear bn relu",
        nniqat.LinearBnReLU1d,
        lambda: nni.LinearBnReLU1d(nn.Linear(11, 5, bias=False), nn.BatchNorm1d(5), nn.ReLU()),
        (16, 11),
    ),
]
BN_CASES = [case for case in CASES if case.has_bn]


def case_named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


def parts_of(module: nn.Module) -> tuple[nn.Module, _BatchNorm | None, nn.Module | None]:
    """The linear part, the BatchNorm and the activation of a float module."""
    parts = list(module) if isinstance(module, nni.Fused) else [module]
    linear, rest = parts[0], parts[1:]
    bn = rest.pop(0) if rest and hasattr(rest[0], "running_mean") else None
    return linear, bn, rest[0] if rest else None  # type: ignore[return-value]


def trained(module: nn.Module, seed: int = 1) -> nn.Module:
    """Parameters and statistics as after some training: none special, factors of both signs."""
    made = torch.Generator().manual_seed(seed)
    linear, bn, _ = parts_of(module)
    with torch.no_grad():
        fan_in = linear.weight[0].numel()
        linear.weight.copy_(torch.randn(linear.weight.shape, generator=made) / fan_in**0.5)
        if linear.bias is not None:
            linear.bias.copy_(torch.randn(linear.bias.shape, generator=made) * 0.3)
        if bn is not None:
            shape = bn.running_mean.shape
            bn.running_mean.copy_(torch.randn(shape, generator=made) * 0.2)
            bn.running_var.copy_(torch.rand(shape, generator=made) * 0.5 + 0.1)
            bn.weight.copy_(torch.rand(shape, generator=made) + 0.5)
            bn.weight[::2] *= -1
            bn.bias.copy_(torch.randn(shape, generator=made) * 0.3)
    return module


def batch(shape: tuple[int, ...], seed: int = 0, spread: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * spread + 0.3


def with_input(layer: QatLayer, x: Tensor) -> QatLayer:
    """Link a layer to an input quantizer of its own that has seen `x` and moves no more."""
    source = layer.qconfig.make_activation()
    source.train()
    source(x)
    source.observer_enabled = False
    layer.connect((source,), owned=(0,))
    source.train(layer.training)
    return layer


def make_layer(case: Case, *, config: qbench.QConfig | None = None, **options: Any) -> tuple[QatLayer, nn.Module]:
    """A QAT layer with a known input grid, and a float module with the same parameters that is not shared with it."""
    module = trained(case.make())
    config = config or qbench.get_qconfig(**options)
    layer = case.qat.from_float(copy.deepcopy(module), config)
    return with_input(layer, batch(case.shape)), module


def in_eval(layer: QatLayer, x: Tensor) -> QatLayer:
    """Let the output quantizer see the layer's own output, then eval."""
    layer.eval()
    layer.output_quantizer.train()
    if layer.pre_activation_quantizer is not None:
        layer.pre_activation_quantizer.train()
    layer(x)
    return layer.eval()


def float_output(layer: QatLayer, x: Tensor) -> Tensor:
    """What the layer hands to its output quantizer."""
    layer.output_quantizer.fake_quant_enabled = False
    try:
        return layer(x)
    finally:
        layer.output_quantizer.fake_quant_enabled = True


def on_grid(x: Tensor, quantizer: FakeQuantize) -> Tensor:
    """torch's own fake-quantize on the stored grid of a per-tensor quantizer."""
    spec = quantizer.spec
    return torch.fake_quantize_per_tensor_affine(
        x, quantizer.scale.item(), int(quantizer.zero_point), spec.qmin, spec.qmax
    )


def call(linear: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """torch's own layer, one call, with these tensors."""
    shell = copy.deepcopy(linear)
    shell._parameters.clear()
    shell.weight, shell.bias = weight, bias
    return shell(x)


def channel_axis(linear: nn.Module) -> int:
    """Axis of the output, from the end."""
    return -1 if isinstance(linear, nn.Linear) else -len(linear.kernel_size) - 1  # type: ignore[arg-type]


def spread_channels(values: Tensor, y: Tensor, axis: int) -> Tensor:
    return values.reshape([-1 if dim == axis % y.ndim else 1 for dim in range(y.ndim)])


@dataclasses.dataclass(frozen=True)
class Expected:
    """Codes and tensors of one layer by the equations, float32 where the equations say so; no floor is active."""

    factor: np.ndarray  # k, (out,); ones without a BatchNorm
    weight_codes: np.ndarray  # of the folded weight
    weight_scale: np.ndarray  # s_w
    step: np.ndarray  # t
    bias: np.ndarray  # b_f
    bias_codes: np.ndarray  # q_b
    bias_scale: np.ndarray  # s_b
    wide: tuple[int, ...]  # shape that spreads (out,) over the weight

    @property
    def weight(self) -> Tensor:
        """Ŵ."""
        codes = self.weight_codes.astype(np.float32)
        return torch.from_numpy(codes * self.weight_scale.reshape(self.wide))

    @property
    def unfolded(self) -> Tensor:
        """Ŵ/k."""
        codes = (self.weight_codes * np.sign(self.factor).astype(np.int64).reshape(self.wide)).astype(np.float32)
        return torch.from_numpy(codes * self.step.reshape(self.wide))

    @property
    def bias_hat(self) -> Tensor:
        """b̂."""
        return torch.from_numpy(self.bias_codes.astype(np.float32) * self.bias_scale)

    @property
    def error(self) -> Tensor:
        """e = b̂ − b_f."""
        return self.bias_hat - torch.from_numpy(self.bias)


def expect(module: nn.Module, input_scale: float, *, weight_bits: int = 8, bias_bits: int = 32) -> Expected:
    """The equations for symmetric per-channel weights and a bias at input·weight scale.

    Raises AssertionError where the bias floor would be active: such layers have tests of their own.
    """
    linear, bn, _ = parts_of(module)
    weight = linear.weight.detach().numpy()
    axis = 1 if isinstance(linear, nn.modules.conv._ConvTransposeNd) else 0
    channels = weight.shape[axis]
    wide = tuple(-1 if dim == axis else 1 for dim in range(weight.ndim))
    bias = np.zeros(channels, np.float32) if linear.bias is None else linear.bias.detach().numpy()
    factor = np.ones(channels, np.float32)
    if bn is not None:
        deviation = np.sqrt(bn.running_var.numpy().astype(np.float64) + bn.eps).astype(np.float32)
        factor = bn.weight.detach().numpy() / deviation
        bias = bn.bias.detach().numpy() + factor * (bias - bn.running_mean.numpy())
    largest_code = 2 ** (weight_bits - 1) - 1
    others = tuple(dim for dim in range(weight.ndim) if dim != axis)
    step = np.abs(weight).max(axis=others) / np.float32(largest_code)
    codes = np.rint(weight * (np.float32(1) / step).reshape(wide)) * np.sign(factor).reshape(wide)
    scale = np.abs(factor) * step
    bias_scale = np.float32(input_scale) * scale
    limit = min(2 ** (bias_bits - 1) - 1, 2**22)
    assert (np.abs(bias) < limit * bias_scale.astype(np.float64)).all(), "the bias floor is active"
    bias_codes = np.rint(bias.astype(np.float64) / bias_scale.astype(np.float64)).astype(np.int64)
    return Expected(factor, codes.astype(np.int64), scale, step, bias, bias_codes, bias_scale, wide)


def normalized(
    y: Tensor, bn: _BatchNorm, *, error: Tensor | None = None, running: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """BatchNorm with the batch's statistics, and the bias error in its shift where given.

    `running` (mean, variance) is updated in place where given.
    """
    mean, variance = running or (None, None)
    momentum = 0.0 if bn.momentum is None else bn.momentum
    shift = bn.bias if error is None else error if bn.bias is None else bn.bias + error
    return F.batch_norm(y, mean, variance, bn.weight, shift, True, momentum, bn.eps)

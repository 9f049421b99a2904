"""The least that PyTorch's operators can do for a layer in QAT: a bound for the plain path, not a way to train.

    forward     range of W, its rounding; convolution; BatchNorm; range of v; rounding
    backward    rounding of a large W; v again; where the gradient passes; BatchNorm; convolution

What no path of operators does without for a convolution with BatchNorm, at the memory of `qbench.numerics.fused`, and
nothing else: grids are constants, biases have no error, no observer moves, sums and other layers stay in float.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

import qbench
from qbench.nn.intrinsic.fused import Fused
from qbench.numerics import fused
from qbench.numerics.blocks import Room, dense, in_rows
from qbench.numerics.interval import passed
from qbench.numerics.layer_step import KEPT_WEIGHTS, Convolution

aten = torch.ops.aten

# A grid of the weight, and one of the activation.
_STEP, _SCALE, _HIGHEST = 0.01, 0.05, 12.75

_WEIGHTS, _ACTIVATIONS = Room(), Room()


def _rounded(weight: Tensor, out: Tensor | None) -> Tensor:
    return torch.mul(weight, 1.0 / _STEP, out=out).round_().mul_(_STEP)


class _Passes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, layer: Passes) -> Tensor:
        rows, large = in_rows(weight), weight.numel() > KEPT_WEIGHTS
        rows.amin(1), rows.amax(1)
        value = _rounded(weight, _WEIGHTS.like(weight) if large else torch.empty_like(weight))
        y = layer.linear(x, value, None)
        v, mean, inverse = aten.native_batch_norm(y, gamma, beta, *layer.running, True, 0.1, layer.eps)
        torch.aminmax(dense(v))
        torch.clamp(v, layer.lowest, _HIGHEST, out=v).mul_(1.0 / _SCALE).round_().mul_(_SCALE)
        ctx.save_for_backward(x, weight if large else value, y, gamma, beta, mean, inverse)
        ctx.layer, ctx.large = layer, large
        return v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, value, y, gamma, beta, mean, inverse = ctx.saved_tensors
        layer, room = ctx.layer, _ACTIVATIONS.like(y)
        assert room is not None  # of convolutions, none has gaps in memory
        if ctx.large:
            value = _rounded(value, _WEIGHTS.like(value))
        v = fused._normalize(y, gamma * inverse, beta, room)
        passed(grads[0], v, layer.lowest, _HIGHEST, out=v)
        grad_y, *to_bn = aten.native_batch_norm_backward(
            v, y, gamma, None, None, mean, inverse, True, layer.eps, [True] * 3
        )
        wanted = [ctx.needs_input_grad[0], True, False]
        grad_x, grad_weight, _ = layer.linear.backward(grad_y, x, value, wanted)
        return grad_x, grad_weight, *to_bn, None


class Passes(nn.Module):
    """A convolution with BatchNorm, and ReLU where there is one, of `qbench.fuse`."""

    def __init__(self, chain: Fused) -> None:
        super().__init__()
        conv, bn, *activation = chain
        self.conv, self.bn, self.lowest = conv, bn, 0.0 if activation else -_HIGHEST
        self.linear = Convolution(conv.stride, conv.padding, conv.dilation, conv.groups)
        self.eps = bn.eps

    @property
    def running(self) -> tuple[Tensor, Tensor]:
        """Of BatchNorm: mean and variance."""
        return self.bn.running_mean, self.bn.running_var  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        """Float to float."""
        out: Tensor = _Passes.apply(x, self.conv.weight, self.bn.weight, self.bn.bias, self)
        return out


def passes_alone(model: nn.Module) -> nn.Module:
    """A float network whose convolutions with BatchNorm do these passes, if they have no bias and pad with zeros."""
    model = qbench.fuse(model)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, Fused) and _is_served(*child):
                setattr(module, name, Passes(child))
    return model.train()


def _is_served(linear: nn.Module, *rest: nn.Module) -> bool:
    plain = type(linear) is nn.Conv2d and linear.bias is None and linear.padding_mode == "zeros"
    return plain and [type(part) for part in rest] in ([nn.BatchNorm2d], [nn.BatchNorm2d, nn.ReLU])

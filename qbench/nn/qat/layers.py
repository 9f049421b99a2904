"""QAT forms of standalone layers and operations: class data only."""

from __future__ import annotations

from torch import nn

from qbench.nn import ops
from qbench.nn.qat.body import QatOp
from qbench.nn.qat.kinds import Conv1dKind, Conv2dKind, Conv3dKind, ConvTranspose2dKind, LinearLayerKind


class Conv1d(Conv1dKind):
    """Conv1d with quantized weight, bias and output."""

    float_type = nn.Conv1d


class Conv2d(Conv2dKind):
    """Conv2d with quantized weight, bias and output."""

    float_type = nn.Conv2d


class Conv3d(Conv3dKind):
    """Conv3d with quantized weight, bias and output."""

    float_type = nn.Conv3d


class ConvTranspose2d(ConvTranspose2dKind):
    """ConvTranspose2d with quantized weight, bias and output."""

    float_type = nn.ConvTranspose2d


class Linear(LinearLayerKind):
    """Linear with quantized weight, bias and output."""

    float_type = nn.Linear


class Add(QatOp, ops.Add):
    """Add with a quantized output."""

    float_type = ops.Add


class AddReLU(QatOp, ops.AddReLU):
    """AddReLU with a quantized output."""

    float_type = ops.AddReLU


class Sub(QatOp, ops.Sub):
    """Sub with a quantized output."""

    float_type = ops.Sub


class Mul(QatOp, ops.Mul):
    """Mul with a quantized output."""

    float_type = ops.Mul


class Cat(QatOp, ops.Cat):
    """Cat with a quantized output."""

    float_type = ops.Cat


class Mean(QatOp, ops.Mean):
    """Mean with a quantized output: an average of codes lies between codes."""

    float_type = ops.Mean


class AdaptiveAvgPool2d(QatOp, nn.AdaptiveAvgPool2d):
    """AdaptiveAvgPool2d with a quantized output: an average of codes lies between codes."""

    float_type = nn.AdaptiveAvgPool2d


class AvgPool2d(QatOp, nn.AvgPool2d):
    """AvgPool2d with a quantized output."""

    float_type = nn.AvgPool2d

"""QAT forms of standalone layers and operations: class data only."""

from __future__ import annotations

from torch import nn

from qbench.nn import frozen, ops
from qbench.nn.qat.body import QatOp
from qbench.nn.qat.kinds import (
    BatchNorm1dKind,
    BatchNorm2dKind,
    BatchNorm3dKind,
    Conv1dKind,
    Conv2dKind,
    Conv3dKind,
    ConvTranspose1dKind,
    ConvTranspose2dKind,
    ConvTranspose3dKind,
    LinearLayerKind,
)


class Conv1d(Conv1dKind):
    """Conv1d with quantized weight, bias and output."""

    float_type = nn.Conv1d


class Conv2d(Conv2dKind):
    """Conv2d with quantized weight, bias and output."""

    float_type = nn.Conv2d


class Conv3d(Conv3dKind):
    """Conv3d with quantized weight, bias and output."""

    float_type = nn.Conv3d


class ConvTranspose1d(ConvTranspose1dKind):
    """ConvTranspose1d with quantized weight, bias and output."""

    float_type = nn.ConvTranspose1d


class ConvTranspose2d(ConvTranspose2dKind):
    """ConvTranspose2d with quantized weight, bias and output."""

    float_type = nn.ConvTranspose2d


class ConvTranspose3d(ConvTranspose3dKind):
    """ConvTranspose3d with quantized weight, bias and output."""

    float_type = nn.ConvTranspose3d


class Linear(LinearLayerKind):
    """Linear with quantized weight, bias and output."""

    float_type = nn.Linear


class BatchNorm1d(BatchNorm1dKind):
    """BatchNorm1d that stands alone, with quantized factor, bias and output."""

    float_type = nn.BatchNorm1d


class BatchNorm2d(BatchNorm2dKind):
    """BatchNorm2d that stands alone, with quantized factor, bias and output."""

    float_type = nn.BatchNorm2d


class BatchNorm3d(BatchNorm3dKind):
    """BatchNorm3d that stands alone, with quantized factor, bias and output."""

    float_type = nn.BatchNorm3d


class FrozenBatchNorm1d(BatchNorm1dKind):
    """FrozenBatchNorm1d that stands alone, with quantized factor, bias and output."""

    float_type = linear_type = frozen.FrozenBatchNorm1d


class FrozenBatchNorm2d(BatchNorm2dKind):
    """FrozenBatchNorm2d that stands alone, with quantized factor, bias and output."""

    float_type = linear_type = frozen.FrozenBatchNorm2d


class FrozenBatchNorm3d(BatchNorm3dKind):
    """FrozenBatchNorm3d that stands alone, with quantized factor, bias and output."""

    float_type = linear_type = frozen.FrozenBatchNorm3d


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

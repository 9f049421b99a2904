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
from qbench.nn.qat.sums import Sum


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


class Add(Sum, ops.Add):
    """Add with a quantized output."""

    float_type = sum_type = ops.Add


class AddReLU(Sum, ops.AddReLU):
    """AddReLU with a quantized output."""

    float_type = ops.AddReLU
    sum_type = ops.Add
    rectified = True


class Sub(Sum, ops.Sub):
    """Sub with a quantized output."""

    float_type = sum_type = ops.Sub


class Mul(QatOp, ops.Mul):
    """Mul with a quantized output."""

    float_type = ops.Mul
    owns_output = True


class Cat(QatOp, ops.Cat):
    """Cat with a quantized output."""

    float_type = ops.Cat


class Mean(QatOp, ops.Mean):
    """Mean with a quantized output: an average of codes lies between codes."""

    float_type = ops.Mean
    owns_output = True


class Div(QatOp, ops.Div):
    """Div with a quantized output."""

    float_type = ops.Div


class MatMul(QatOp, ops.MatMul):
    """MatMul with a quantized output."""

    float_type = ops.MatMul
    symmetric_parameters = True


class Stack(QatOp, ops.Stack):
    """Stack with a quantized output."""

    float_type = ops.Stack


class Clamp(QatOp, ops.Clamp):
    """Clamp with a quantized output: its bounds need not be codes of the input's grid."""

    float_type = ops.Clamp


class AdaptiveAvgPool1d(QatOp, nn.AdaptiveAvgPool1d):
    """AdaptiveAvgPool1d with a quantized output: what it puts out of codes lies between codes."""

    float_type = nn.AdaptiveAvgPool1d
    owns_output = True


class AdaptiveAvgPool2d(QatOp, nn.AdaptiveAvgPool2d):
    """AdaptiveAvgPool2d with a quantized output: what it puts out of codes lies between codes."""

    float_type = nn.AdaptiveAvgPool2d
    owns_output = True


class AdaptiveAvgPool3d(QatOp, nn.AdaptiveAvgPool3d):
    """AdaptiveAvgPool3d with a quantized output: what it puts out of codes lies between codes."""

    float_type = nn.AdaptiveAvgPool3d
    owns_output = True


class AvgPool1d(QatOp, nn.AvgPool1d):
    """AvgPool1d with a quantized output: what it puts out of codes lies between codes."""

    float_type = nn.AvgPool1d
    owns_output = True


class AvgPool2d(QatOp, nn.AvgPool2d):
    """AvgPool2d with a quantized output: what it puts out of codes lies between codes."""

    float_type = nn.AvgPool2d
    owns_output = True


class AvgPool3d(QatOp, nn.AvgPool3d):
    """AvgPool3d with a quantized output: what it puts out of codes lies between codes."""

    float_type = nn.AvgPool3d
    owns_output = True


class LPPool1d(QatOp, nn.LPPool1d):
    """LPPool1d with a quantized output: what it puts out of codes lies between codes."""

    float_type = nn.LPPool1d


class LPPool2d(QatOp, nn.LPPool2d):
    """LPPool2d with a quantized output: what it puts out of codes lies between codes."""

    float_type = nn.LPPool2d


class LPPool3d(QatOp, nn.LPPool3d):
    """LPPool3d with a quantized output: what it puts out of codes lies between codes."""

    float_type = nn.LPPool3d


class Interpolate(QatOp, ops.Interpolate):
    """Interpolate with a quantized output, where it computes values; `"nearest"` repeats them and keeps the grid."""

    float_type = ops.Interpolate
    data_inputs = 1

    @classmethod
    def keeps_grid(cls, module: nn.Module) -> bool:
        """See `QatModule.keeps_grid`."""
        return str(module.mode).startswith("nearest")


class Upsample(QatOp, nn.Upsample):
    """Upsample with a quantized output, where it computes values; `"nearest"` repeats them and keeps the grid."""

    float_type = nn.Upsample

    @classmethod
    def keeps_grid(cls, module: nn.Module) -> bool:
        """See `QatModule.keeps_grid`."""
        return str(module.mode).startswith("nearest")


class UpsamplingBilinear2d(QatOp, nn.UpsamplingBilinear2d):
    """UpsamplingBilinear2d with a quantized output."""

    float_type = nn.UpsamplingBilinear2d

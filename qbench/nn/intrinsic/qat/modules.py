"""QAT forms of the float wrappers: class data only."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from qbench.nn import intrinsic as nni
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


class ConvBn1d(Conv1dKind):
    """ConvBn1d with quantized folded weight, bias and output."""

    float_type: ClassVar[type[nni.Fused]] = nni.ConvBn1d


class ConvBnReLU1d(ConvBn1d):
    """ConvBnReLU1d with quantized folded weight, bias and output."""

    float_type: ClassVar[type[nni.Fused]] = nni.ConvBnReLU1d
    activation = nn.ReLU


class ConvReLU1d(Conv1dKind):
    """ConvReLU1d with quantized folded weight, bias and output."""

    float_type: ClassVar[type[nni.Fused]] = nni.ConvReLU1d
    activation = nn.ReLU


class ConvBn2d(Conv2dKind):
    """ConvBn2d with quantized folded weight, bias and output."""

    float_type: ClassVar[type[nni.Fused]] = nni.ConvBn2d


class ConvBnReLU2d(ConvBn2d):
    """ConvBnReLU2d with quantized folded weight, bias and output."""

    float_type: ClassVar[type[nni.Fused]] = nni.ConvBnReLU2d
    activation = nn.ReLU


class ConvReLU2d(Conv2dKind):
    """ConvReLU2d with quantized folded weight, bias and output."""

    float_type: ClassVar[type[nni.Fused]] = nni.ConvReLU2d
    activation = nn.ReLU


class ConvBn3d(Conv3dKind):
    """ConvBn3d with quantized folded weight, bias and output."""

    float_type: ClassVar[type[nni.Fused]] = nni.ConvBn3d


class ConvBnReLU3d(ConvBn3d):
    """ConvBnReLU3d with quantized folded weight, bias and output."""

    float_type: ClassVar[type[nni.Fused]] = nni.ConvBnReLU3d
    activation = nn.ReLU


class ConvReLU3d(Conv3dKind):
    """ConvReLU3d with quantized folded weight, bias and output."""

    float_type: ClassVar[type[nni.Fused]] = nni.ConvReLU3d
    activation = nn.ReLU


class ConvTransposeBn1d(ConvTranspose1dKind):
    """ConvTransposeBn1d with quantized folded weight, bias and output."""

    float_type: ClassVar[type[nni.Fused]] = nni.ConvTransposeBn1d


class ConvTransposeBnReLU1d(ConvTransposeBn1d):
    """ConvTransposeBnReLU1d with quantized folded weight, bias and output."""

    float_type: ClassVar[type[nni.Fused]] = nni.ConvTransposeBnReLU1d
    activation = nn.ReLU


class ConvTransposeReLU1d(ConvTranspose1dKind):
    """ConvTransposeReLU1d with quantized folded weight, bias and output."""

    float_type: ClassVar[type[nni.Fused]] = nni.ConvTransposeReLU1d
    activation = nn.ReLU


class ConvTransposeBn2d(ConvTranspose2dKind):
    """ConvTransposeBn2d with quantized folded weight, bias and output."""

    float_type: ClassVar[type[nni.Fused]] = nni.ConvTransposeBn2d


class ConvTransposeBnReLU2d(ConvTransposeBn2d):
    """ConvTransposeBnReLU2d with quantized folded weight, bias and output."""

    float_type: ClassVar[type[nni.Fused]] = nni.ConvTransposeBnReLU2d
    activation = nn.ReLU


class ConvTransposeReLU2d(ConvTranspose2dKind):
    """ConvTransposeReLU2d with quantized folded weight, bias and output."""

    float_type: ClassVar[type[nni.Fused]] = nni.ConvTransposeReLU2d
    activation = nn.ReLU


class ConvTransposeBn3d(ConvTranspose3dKind):
    """ConvTransposeBn3d with quantized folded weight, bias and output."""

    float_type: ClassVar[type[nni.Fused]] = nni.ConvTransposeBn3d


class ConvTransposeBnReLU3d(ConvTransposeBn3d):
    """ConvTransposeBnReLU3d with quantized folded weight, bias and output."""

    float_type: ClassVar[type[nni.Fused]] = nni.ConvTransposeBnReLU3d
    activation = nn.ReLU


class ConvTransposeReLU3d(ConvTranspose3dKind):
    """ConvTransposeReLU3d with quantized folded weight, bias and output."""

    float_type: ClassVar[type[nni.Fused]] = nni.ConvTransposeReLU3d
    activation = nn.ReLU


class LinearReLU(LinearLayerKind):
    """LinearReLU with quantized folded weight, bias and output."""

    float_type: ClassVar[type[nni.Fused]] = nni.LinearReLU
    activation = nn.ReLU


class LinearBn1d(LinearLayerKind):
    """LinearBn1d with quantized folded weight, bias and output."""

    float_type: ClassVar[type[nni.Fused]] = nni.LinearBn1d


class LinearBnReLU1d(LinearBn1d):
    """LinearBnReLU1d with quantized folded weight, bias and output."""

    float_type: ClassVar[type[nni.Fused]] = nni.LinearBnReLU1d
    activation = nn.ReLU


class BnReLU1d(BatchNorm1dKind):
    """BnReLU1d with quantized factor, bias and output."""

    float_type: ClassVar[type[nni.Fused]] = nni.BnReLU1d
    activation = nn.ReLU


class BnReLU2d(BatchNorm2dKind):
    """BnReLU2d with quantized factor, bias and output."""

    float_type: ClassVar[type[nni.Fused]] = nni.BnReLU2d
    activation = nn.ReLU


class BnReLU3d(BatchNorm3dKind):
    """BnReLU3d with quantized factor, bias and output."""

    float_type: ClassVar[type[nni.Fused]] = nni.BnReLU3d
    activation = nn.ReLU

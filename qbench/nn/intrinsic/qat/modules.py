"""QAT forms of the float wrappers: class data only."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from qbench.nn import intrinsic as nni
from qbench.nn.qat.kinds import Conv1dKind, Conv2dKind, Conv3dKind, ConvTranspose2dKind, LinearLayerKind


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


class ConvTransposeBn2d(ConvTranspose2dKind):
    """ConvTransposeBn2d with quantized folded weight, bias and output."""

    float_type: ClassVar[type[nni.Fused]] = nni.ConvTransposeBn2d


class ConvTransposeBnReLU2d(ConvTransposeBn2d):
    """ConvTransposeBnReLU2d with quantized folded weight, bias and output."""

    float_type: ClassVar[type[nni.Fused]] = nni.ConvTransposeBnReLU2d
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

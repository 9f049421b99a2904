"""The float wrappers: class data only."""

from __future__ import annotations

from torch import nn

from qbench.nn.intrinsic.fused import Fused

# Both are computed inside the op before them; ReLU6 is ReLU with a lower top of the range.
_RELU = (nn.ReLU, nn.ReLU6)


class ConvBn1d(Fused):
    """Conv1d, BatchNorm1d."""

    part_types = (nn.Conv1d, nn.BatchNorm1d)


class ConvBnReLU1d(Fused):
    """Conv1d, BatchNorm1d, ReLU or ReLU6."""

    part_types = (nn.Conv1d, nn.BatchNorm1d, _RELU)


class ConvReLU1d(Fused):
    """Conv1d, ReLU or ReLU6."""

    part_types = (nn.Conv1d, _RELU)


class ConvBn2d(Fused):
    """Conv2d, BatchNorm2d."""

    part_types = (nn.Conv2d, nn.BatchNorm2d)


class ConvBnReLU2d(Fused):
    """Conv2d, BatchNorm2d, ReLU or ReLU6."""

    part_types = (nn.Conv2d, nn.BatchNorm2d, _RELU)


class ConvReLU2d(Fused):
    """Conv2d, ReLU or ReLU6."""

    part_types = (nn.Conv2d, _RELU)


class ConvBn3d(Fused):
    """Conv3d, BatchNorm3d."""

    part_types = (nn.Conv3d, nn.BatchNorm3d)


class ConvBnReLU3d(Fused):
    """Conv3d, BatchNorm3d, ReLU or ReLU6."""

    part_types = (nn.Conv3d, nn.BatchNorm3d, _RELU)


class ConvReLU3d(Fused):
    """Conv3d, ReLU or ReLU6."""

    part_types = (nn.Conv3d, _RELU)


class ConvTransposeBn2d(Fused):
    """ConvTranspose2d, BatchNorm2d."""

    part_types = (nn.ConvTranspose2d, nn.BatchNorm2d)


class ConvTransposeBnReLU2d(Fused):
    """ConvTranspose2d, BatchNorm2d, ReLU or ReLU6."""

    part_types = (nn.ConvTranspose2d, nn.BatchNorm2d, _RELU)


class LinearReLU(Fused):
    """Linear, ReLU or ReLU6."""

    part_types = (nn.Linear, _RELU)


class LinearBn1d(Fused):
    """Linear, BatchNorm1d."""

    part_types = (nn.Linear, nn.BatchNorm1d)


class LinearBnReLU1d(Fused):
    """Linear, BatchNorm1d, ReLU or ReLU6."""

    part_types = (nn.Linear, nn.BatchNorm1d, _RELU)

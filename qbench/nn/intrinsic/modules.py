"""The float wrappers: class data only."""

from __future__ import annotations

from torch import nn

from qbench.nn.frozen import FrozenBatchNorm1d, FrozenBatchNorm2d, FrozenBatchNorm3d
from qbench.nn.intrinsic.fused import Fused

# All are computed inside the op before them: ReLU6 and Hardtanh are ReLU with other bounds.
_RELU = (nn.ReLU, nn.ReLU6, nn.Hardtanh)
# What folds: with statistics of its own, or with fixed ones.
_BN1D = (nn.BatchNorm1d, FrozenBatchNorm1d)
_BN2D = (nn.BatchNorm2d, FrozenBatchNorm2d)
_BN3D = (nn.BatchNorm3d, FrozenBatchNorm3d)


class ConvBn1d(Fused):
    """Conv1d, BatchNorm1d."""

    part_types = (nn.Conv1d, _BN1D)


class ConvBnReLU1d(Fused):
    """Conv1d, BatchNorm1d, ReLU or a clamp."""

    part_types = (nn.Conv1d, _BN1D, _RELU)


class ConvReLU1d(Fused):
    """Conv1d, ReLU or a clamp."""

    part_types = (nn.Conv1d, _RELU)


class ConvBn2d(Fused):
    """Conv2d, BatchNorm2d."""

    part_types = (nn.Conv2d, _BN2D)


class ConvBnReLU2d(Fused):
    """Conv2d, BatchNorm2d, ReLU or a clamp."""

    part_types = (nn.Conv2d, _BN2D, _RELU)


class ConvReLU2d(Fused):
    """Conv2d, ReLU or a clamp."""

    part_types = (nn.Conv2d, _RELU)


class ConvBn3d(Fused):
    """Conv3d, BatchNorm3d."""

    part_types = (nn.Conv3d, _BN3D)


class ConvBnReLU3d(Fused):
    """Conv3d, BatchNorm3d, ReLU or a clamp."""

    part_types = (nn.Conv3d, _BN3D, _RELU)


class ConvReLU3d(Fused):
    """Conv3d, ReLU or a clamp."""

    part_types = (nn.Conv3d, _RELU)


class ConvTransposeBn1d(Fused):
    """ConvTranspose1d, BatchNorm1d."""

    part_types = (nn.ConvTranspose1d, _BN1D)


class ConvTransposeBnReLU1d(Fused):
    """ConvTranspose1d, BatchNorm1d, ReLU or a clamp."""

    part_types = (nn.ConvTranspose1d, _BN1D, _RELU)


class ConvTransposeReLU1d(Fused):
    """ConvTranspose1d, ReLU or a clamp."""

    part_types = (nn.ConvTranspose1d, _RELU)


class ConvTransposeBn2d(Fused):
    """ConvTranspose2d, BatchNorm2d."""

    part_types = (nn.ConvTranspose2d, _BN2D)


class ConvTransposeBnReLU2d(Fused):
    """ConvTranspose2d, BatchNorm2d, ReLU or a clamp."""

    part_types = (nn.ConvTranspose2d, _BN2D, _RELU)


class ConvTransposeReLU2d(Fused):
    """ConvTranspose2d, ReLU or a clamp."""

    part_types = (nn.ConvTranspose2d, _RELU)


class ConvTransposeBn3d(Fused):
    """ConvTranspose3d, BatchNorm3d."""

    part_types = (nn.ConvTranspose3d, _BN3D)


class ConvTransposeBnReLU3d(Fused):
    """ConvTranspose3d, BatchNorm3d, ReLU or a clamp."""

    part_types = (nn.ConvTranspose3d, _BN3D, _RELU)


class ConvTransposeReLU3d(Fused):
    """ConvTranspose3d, ReLU or a clamp."""

    part_types = (nn.ConvTranspose3d, _RELU)


class LinearReLU(Fused):
    """Linear, ReLU or a clamp."""

    part_types = (nn.Linear, _RELU)


class LinearBn1d(Fused):
    """Linear, BatchNorm1d."""

    part_types = (nn.Linear, _BN1D)


class LinearBnReLU1d(Fused):
    """Linear, BatchNorm1d, ReLU or a clamp."""

    part_types = (nn.Linear, _BN1D, _RELU)


class BnReLU1d(Fused):
    """BatchNorm1d that nothing before it can take, ReLU or a clamp."""

    part_types = (_BN1D, _RELU)


class BnReLU2d(Fused):
    """BatchNorm2d that nothing before it can take, ReLU or a clamp."""

    part_types = (_BN2D, _RELU)


class BnReLU3d(Fused):
    """BatchNorm3d that nothing before it can take, ReLU or a clamp."""

    part_types = (_BN3D, _RELU)

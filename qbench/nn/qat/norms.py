"""QAT forms of normalizations whose statistics are those of the input at hand: class data only.

    y = FQ(norm(x̂; γ, β))        x̂ on the grid of its linked quantizer, y on a grid of its own

Nothing folds: mean and variance are known only when the input is. So they compute in float between two quantized
boundaries, with γ and β in float, here and in what is deployed.
"""

from __future__ import annotations

from torch import nn

from qbench.nn import ops
from qbench.nn.qat.body import QatOp


class LayerNorm(QatOp, nn.LayerNorm):
    """LayerNorm with a quantized output."""

    float_type = nn.LayerNorm


class GroupNorm(QatOp, nn.GroupNorm):
    """GroupNorm with a quantized output."""

    float_type = nn.GroupNorm


class InstanceNorm1d(QatOp, nn.InstanceNorm1d):
    """InstanceNorm1d with a quantized output."""

    float_type = nn.InstanceNorm1d


class InstanceNorm2d(QatOp, nn.InstanceNorm2d):
    """InstanceNorm2d with a quantized output."""

    float_type = nn.InstanceNorm2d


class InstanceNorm3d(QatOp, nn.InstanceNorm3d):
    """InstanceNorm3d with a quantized output."""

    float_type = nn.InstanceNorm3d


class LocalResponseNorm(QatOp, nn.LocalResponseNorm):
    """LocalResponseNorm with a quantized output."""

    float_type = nn.LocalResponseNorm


class RMSNorm(QatOp, nn.RMSNorm):
    """RMSNorm with a quantized output."""

    float_type = nn.RMSNorm


class NormalizeLayer(QatOp, ops.NormalizeLayer):
    """NormalizeLayer with a quantized output; factor and offset stay float."""

    float_type = ops.NormalizeLayer
    data_inputs = 1


class NormalizeGroups(QatOp, ops.NormalizeGroups):
    """NormalizeGroups with a quantized output; factor and offset stay float."""

    float_type = ops.NormalizeGroups
    data_inputs = 1

"""Attention as modules that can be quantized, each made from the module that it stands for."""

from qbench.nn.attention.base import ExplicitAttention
from qbench.nn.attention.multihead import ExplicitMultiheadAttention
from qbench.nn.attention.operations import CosineProduct, MaskedSoftmax, Normalize, ScaledLinear
from qbench.nn.attention.position import ContinuousPositionBias, RelativePositionBias
from qbench.nn.attention.windows import (
    ExplicitRelativePositionalAttention,
    ExplicitShiftedWindowAttention,
    ExplicitShiftedWindowAttentionV2,
)

__all__ = [
    "ContinuousPositionBias",
    "CosineProduct",
    "ExplicitAttention",
    "ExplicitMultiheadAttention",
    "ExplicitRelativePositionalAttention",
    "ExplicitShiftedWindowAttention",
    "ExplicitShiftedWindowAttentionV2",
    "MaskedSoftmax",
    "Normalize",
    "RelativePositionBias",
    "ScaledLinear",
]

"""Rewrites of Q/DQ programs."""

from __future__ import annotations

from qbench.passes.bias import QuantizeFusedConvBnBiasAtenPass, quantize_bias
from qbench.passes.bias_report import BiasReport, LayerNote, QuantizedBias, SaturatedBias
from qbench.passes.fusion_report import FloatOperator, FusionReport
from qbench.passes.qdq_fusion import FUSION_RULES, fuse_qdq

__all__ = [
    "quantize_bias",
    "fuse_qdq",
    "FUSION_RULES",
    "FusionReport",
    "FloatOperator",
    "QuantizeFusedConvBnBiasAtenPass",
    "BiasReport",
    "QuantizedBias",
    "SaturatedBias",
    "LayerNote",
]

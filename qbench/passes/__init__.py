"""Rewrites of Q/DQ programs."""

from __future__ import annotations

from qbench.graph.rules import Miss, Refusal, Refused, Rewrite, Rule
from qbench.passes.bias import QuantizeFusedConvBnBiasAtenPass, quantize_bias
from qbench.passes.bias_report import BiasReport, LayerNote, QuantizedBias, SaturatedBias
from qbench.passes.fusion_report import FloatOperator, FusionReport
from qbench.passes.qdq_fusion import FUSION_RULES, fuse_qdq
from qbench.passes.qdq_fusion.context import FusionContext

__all__ = [
    "quantize_bias",
    "fuse_qdq",
    "FUSION_RULES",
    "Rule",
    "Refusal",
    "Refused",
    "Rewrite",
    "Miss",
    "FusionContext",
    "FusionReport",
    "FloatOperator",
    "QuantizeFusedConvBnBiasAtenPass",
    "BiasReport",
    "QuantizedBias",
    "SaturatedBias",
    "LayerNote",
]

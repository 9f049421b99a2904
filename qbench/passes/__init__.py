"""Rewrites of Q/DQ programs."""

from __future__ import annotations

from qbench.passes.bias import QuantizeFusedConvBnBiasAtenPass, quantize_bias
from qbench.passes.bias_report import BiasReport, LayerNote, QuantizedBias, SaturatedBias

__all__ = [
    "quantize_bias",
    "QuantizeFusedConvBnBiasAtenPass",
    "BiasReport",
    "QuantizedBias",
    "SaturatedBias",
    "LayerNote",
]

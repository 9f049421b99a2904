"""Deployed form of QAT modules, which `convert` exports."""

from qbench.nn.reference.modules import (
    QuantizeDequantize,
    ReferenceLayer,
    ReferenceModule,
    ReferenceOp,
    reference_of,
)

__all__ = ["QuantizeDequantize", "ReferenceLayer", "ReferenceModule", "ReferenceOp", "reference_of"]

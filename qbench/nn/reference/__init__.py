"""Deployed form of QAT modules, which `convert` exports."""

from qbench.nn.qat.attention import PositionBiasModule
from qbench.nn.qat.body import QatModule
from qbench.nn.qat.embedding import Embedding, EmbeddingBag
from qbench.nn.qat.layer import QatLayer
from qbench.nn.reference.attention import ReferencePositionBias
from qbench.nn.reference.embedding import ReferenceEmbedding, ReferenceEmbeddingBag
from qbench.nn.reference.modules import QuantizeDequantize, ReferenceLayer, ReferenceModule, ReferenceOp

__all__ = [
    "QuantizeDequantize",
    "ReferenceEmbedding",
    "ReferenceEmbeddingBag",
    "ReferenceLayer",
    "ReferenceModule",
    "ReferenceOp",
    "ReferencePositionBias",
    "reference_of",
]


def reference_of(qat: QatModule) -> ReferenceModule:
    """The deployed form of a QAT module."""
    if isinstance(qat, Embedding):
        return ReferenceEmbedding(qat)
    if isinstance(qat, EmbeddingBag):
        return ReferenceEmbeddingBag(qat)
    if isinstance(qat, PositionBiasModule):
        return ReferencePositionBias(qat)
    return ReferenceLayer(qat) if isinstance(qat, QatLayer) else ReferenceOp(qat)  # type: ignore[arg-type]

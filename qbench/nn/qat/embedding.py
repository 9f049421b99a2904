"""QAT forms of tables that are looked up.

    Embedding       y = Ê[i]             Ê = FQ(E; s, z)      y lies on the table's own grid: nothing is computed
    EmbeddingBag    y = FQ(Σ Ê[i])       Ê = FQ(E; s_row)     a sum, or a mean, gets a grid of its own

The grid of an Embedding is per tensor, that of an activation, because what reads it needs one `s_in`: then a lookup
moves codes, and the table is stored as codes of 8 bits. A scale for each row would be finer, but the rows that one
output holds would lie on different grids, and each would have to be dequantized, in float. An EmbeddingBag computes
anyway, so its rows have scales of their own, those of a weight.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from qbench.errors import FusionError
from qbench.fake_quantize import FakeQuantize
from qbench.nn.qat.body import QatModule
from qbench.nn.qat.epilogue import epilogue
from qbench.qconfig import QConfig


class TableModule(QatModule):
    """Base of QAT tables: their inputs are indices, so they have no links."""

    data_inputs = 0
    weight: Tensor

    def __init__(self, *args: Any, qconfig: QConfig, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._add_quantizers(qconfig)

    @classmethod
    def accepts(cls, module: nn.Module, qconfig: QConfig) -> str:
        """See `QatModule.accepts`."""
        if getattr(module, "max_norm", None) is not None:
            return "max_norm rewrites rows of the table while it is looked up: leave it out to quantize the table"
        return "weight-only quantization takes convolutions and linear layers" if qconfig.weight_only else ""

    def _add_quantizers(self, qconfig: QConfig) -> None:
        reason = self.accepts(self, qconfig)
        if reason:
            raise FusionError(f"{type(self).__name__}: {reason}")
        super()._add_quantizers(qconfig)
        self._sources = ()


class Embedding(TableModule, nn.Embedding):
    """Embedding with a quantized table, on whose grid its output lies."""

    float_type = nn.Embedding

    def forward(self, input: Tensor) -> Tensor:
        """Indices of any shape -> (*shape, columns), on the table's grid."""
        table = self.weight if self.output_quantizer is None else self.output_quantizer(self.weight)
        return F.embedding(input, table, self.padding_idx, None, 2.0, self.scale_grad_by_freq, self.sparse)


class EmbeddingBag(TableModule, nn.EmbeddingBag):
    """EmbeddingBag with a quantized table and output."""

    float_type = nn.EmbeddingBag
    weight_quantizer: FakeQuantize

    def _add_quantizers(self, qconfig: QConfig) -> None:
        super()._add_quantizers(qconfig)
        self.weight_quantizer = qconfig.make_weight(axis=0)

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        """Indices and where each bag starts -> (bags, columns)."""
        y = bag(self, self.weight_quantizer(self.weight), input, offsets, per_sample_weights)
        return epilogue(y, self.output_quantizer)


def bag(
    module: nn.EmbeddingBag, table: Tensor, input: Tensor, offsets: Tensor | None, weights: Tensor | None
) -> Tensor:
    """What an EmbeddingBag computes with this table in place of its own."""
    return F.embedding_bag(
        input,
        table,
        offsets,
        mode=module.mode,
        sparse=module.sparse,
        per_sample_weights=weights,
        include_last_offset=module.include_last_offset,
        padding_idx=module.padding_idx,
    )

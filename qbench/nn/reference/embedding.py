"""Deployed form of tables: codes that are looked up."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qbench.graph.qdq import quantized_decomposed
from qbench.nn.qat.embedding import Embedding, EmbeddingBag, bag
from qbench.nn.reference.modules import QuantizeDequantize, ReferenceModule
from qbench.numerics.qparams import quantize


class ReferenceEmbedding(ReferenceModule):
    """dq(codes) → embedding: what reads it quantizes to the same grid, and that pair is removed."""

    codes: Tensor

    @torch.no_grad()
    def __init__(self, qat: Embedding) -> None:
        super().__init__()
        self._add_grids(qat)
        assert qat.output_quantizer is not None  # it accepts no weight-only qconfig
        grid = qat.output_quantizer.deployed_qparams()
        self.output = QuantizeDequantize(grid)
        self.register_buffer("codes", quantize(qat.weight, grid))
        self.padding_idx = -1 if qat.padding_idx is None else qat.padding_idx

    def forward(self, input: Tensor) -> Tensor:
        """Indices -> rows."""
        assert self.output is not None
        table = quantized_decomposed().dequantize_per_tensor.default(self.codes, *self.output.grid)
        return self.output(F.embedding(input, table, self.padding_idx))


class ReferenceEmbeddingBag(ReferenceModule):
    """dq(codes; a scale each row) → embedding_bag → q → dq."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor

    @torch.no_grad()
    def __init__(self, qat: EmbeddingBag) -> None:
        super().__init__()
        self._add_grids(qat)
        assert qat.output_quantizer is not None
        self.output = QuantizeDequantize(qat.output_quantizer.deployed_qparams())
        grid = qat.weight_quantizer.qparams_of(qat.weight)
        grid.check(f"{type(qat).__name__}.weight")
        self.register_buffer("codes", quantize(qat.weight, grid))
        self.register_buffer("scale", grid.scale.clone())
        self.register_buffer("zero_point", grid.zero_point.to(torch.int64))
        self.grid = grid.qmin, grid.qmax, grid.dtype
        self.axis = grid.axis
        self.shell = qat.to_float().requires_grad_(False)
        self.shell._parameters.clear()

    def forward(self, input: Tensor, *args: Any) -> Tensor:
        """Indices and where each bag starts -> sums of rows."""
        assert self.output is not None
        ops = quantized_decomposed()
        if self.axis is None:
            scale, zero_point = float(self.scale), int(self.zero_point)
            table = ops.dequantize_per_tensor.default(self.codes, scale, zero_point, *self.grid)
        else:
            table = ops.dequantize_per_channel.default(self.codes, self.scale, self.zero_point, self.axis, *self.grid)
        offsets, weights = (*args, None, None)[:2]
        return self.output(bag(self.shell, table, input, offsets, weights))  # type: ignore[arg-type]

"""Deployed form of biases of positions: their codes."""

from __future__ import annotations

import torch
from torch import Tensor

from qbench.graph.qdq import quantized_decomposed
from qbench.nn.qat.attention import PositionBiasModule
from qbench.nn.reference.modules import QuantizeDequantize, ReferenceModule
from qbench.numerics.qparams import quantize


class ReferencePositionBias(ReferenceModule):
    """dq(codes): what made them is not deployed."""

    codes: Tensor

    @torch.no_grad()
    def __init__(self, qat: PositionBiasModule) -> None:
        super().__init__()
        self._add_grids(qat)
        assert qat.output_quantizer is not None  # it accepts no weight-only qconfig
        grid = qat.output_quantizer.deployed_qparams()
        self.output = QuantizeDequantize(grid)
        self.register_buffer("codes", quantize(qat.float_type.forward(qat), grid))

    def forward(self) -> Tensor:
        """(heads, positions, positions)."""
        assert self.output is not None
        bias: Tensor = quantized_decomposed().dequantize_per_tensor.default(self.codes, *self.output.grid)
        return bias

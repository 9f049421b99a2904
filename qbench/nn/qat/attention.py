"""QAT forms of what an attention computes: class data, but for the biases of positions.

    bias of positions    y = FQ(B)        B computed from parameters alone; deployed as its codes

The product of a CosineProduct is computed in float between quantized boundaries; a MatMul has an integer form.
"""

from __future__ import annotations

from torch import Tensor

from qbench.nn import attention
from qbench.nn.qat.activations import Probability
from qbench.nn.qat.body import QatOp
from qbench.nn.qat.embedding import TableModule
from qbench.nn.qat.kinds import LinearKind


class ScaledLinearKind(LinearKind, attention.ScaledLinear):  # type: ignore[misc]  # as LinearLayerKind
    """ScaledLinear: a linear layer whose weight and bias are `f` times its parameters."""

    linear_type = attention.ScaledLinear

    @property
    def linear_weight(self) -> Tensor:
        """See `QatLayer.linear_weight`: `f·W`."""
        return self.scaled_weight

    @property
    def linear_bias(self) -> Tensor | None:
        """See `QatLayer.linear_bias`: `f·b`."""
        return self.scaled_bias


class ScaledLinear(ScaledLinearKind):
    """ScaledLinear with quantized weight, bias and output."""

    float_type = attention.ScaledLinear


class CosineProduct(QatOp, attention.CosineProduct):
    """CosineProduct with a quantized output."""

    float_type = attention.CosineProduct


class Normalize(QatOp, attention.Normalize):
    """Normalize with a quantized output."""

    float_type = attention.Normalize


class MaskedSoftmax(Probability, attention.MaskedSoftmax):
    """MaskedSoftmax with an output quantized on the grid of probabilities; the mask stays as it comes."""

    float_type = attention.MaskedSoftmax
    data_inputs = 1


class PositionBiasModule(TableModule):
    """Base of QAT biases of positions: they have no input."""

    def forward(self) -> Tensor:
        """`B` on its grid, (heads, positions, positions)."""
        bias: Tensor = self.float_type.forward(self)
        return bias if self.output_quantizer is None else self.output_quantizer(bias)


class RelativePositionBias(PositionBiasModule, attention.RelativePositionBias):
    """RelativePositionBias, quantized."""

    float_type = attention.RelativePositionBias


class ContinuousPositionBias(PositionBiasModule, attention.ContinuousPositionBias):
    """ContinuousPositionBias, quantized; the network that makes it stays float, and is not deployed."""

    float_type = attention.ContinuousPositionBias

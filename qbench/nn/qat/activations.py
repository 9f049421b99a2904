"""QAT forms of standalone activations: class data only.

    y = FQ(f(x̂))        x̂ on the grid of its linked quantizer, y on a grid of its own

Of an activation that the target computes inside a layer only the wrapper's output is quantized; every other one reads
codes and puts out codes, which a table of 256 entries deploys. A ReLU that stands alone is not here: its output lies on
the grid of its input.
"""

from __future__ import annotations

from torch import nn

from qbench.nn.qat.body import QatOp
from qbench.qconfig import QConfig


class ActivationOp(QatOp):
    """Base of QAT activations: never in place.

    The input is what another module's quantizer put out: others may read it, and its backward may need it. `to_float`
    gives the activation out of place, too.
    """

    def _add_quantizers(self, qconfig: QConfig) -> None:
        super()._add_quantizers(qconfig)
        if getattr(self, "inplace", False):
            self.inplace = False


class ELU(ActivationOp, nn.ELU):
    """ELU with a quantized output."""

    float_type = nn.ELU


class GELU(ActivationOp, nn.GELU):
    """GELU with a quantized output."""

    float_type = nn.GELU


class Hardsigmoid(ActivationOp, nn.Hardsigmoid):
    """Hardsigmoid with a quantized output."""

    float_type = nn.Hardsigmoid


class Hardswish(ActivationOp, nn.Hardswish):
    """Hardswish with a quantized output."""

    float_type = nn.Hardswish


class Hardtanh(ActivationOp, nn.Hardtanh):
    """Hardtanh with a quantized output."""

    float_type = nn.Hardtanh


class LeakyReLU(ActivationOp, nn.LeakyReLU):
    """LeakyReLU with a quantized output."""

    float_type = nn.LeakyReLU


class Mish(ActivationOp, nn.Mish):
    """Mish with a quantized output."""

    float_type = nn.Mish


class ReLU6(ActivationOp, nn.ReLU6):
    """ReLU6 with a quantized output."""

    float_type = nn.ReLU6


class SiLU(ActivationOp, nn.SiLU):
    """SiLU with a quantized output."""

    float_type = nn.SiLU


class Sigmoid(ActivationOp, nn.Sigmoid):
    """Sigmoid with a quantized output."""

    float_type = nn.Sigmoid


class Tanh(ActivationOp, nn.Tanh):
    """Tanh with a quantized output."""

    float_type = nn.Tanh

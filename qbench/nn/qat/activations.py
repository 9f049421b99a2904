"""QAT forms of standalone activations: class data only.

    y = FQ(f(x̂))        x̂ on the grid of its linked quantizer, y on a grid of its own

Of an activation that the target computes inside a layer only the wrapper's output is quantized; every other one reads
codes and puts out codes, which a table of 256 entries deploys. A ReLU that stands alone is not here: its output lies on
the grid of its input.
"""

from __future__ import annotations

from torch import nn

from qbench.fake_quantize import FakeQuantize
from qbench.nn.qat.body import QatOp
from qbench.observers import FixedObserver, FixedRangeObserver
from qbench.qconfig import QConfig, QuantizerConfig


class ActivationOp(QatOp):
    """Base of QAT activations: never in place.

    The input is what another module's quantizer put out: others may read it, and its backward may need it. `to_float`
    gives the activation out of place, too.
    """

    def _add_quantizers(self, qconfig: QConfig) -> None:
        super()._add_quantizers(qconfig)
        if getattr(self, "inplace", False):
            self.inplace = False


class Probability(ActivationOp):
    """Base of activations whose output lies in [0, 1]: their grid is known, `s = 2^−bits`, 0 at its lowest code.

    Integer runtimes know this grid alone: ONNX Runtime's QLinearSoftmax gives other codes on any other.
    """

    def _make_output(self, qconfig: QConfig) -> FakeQuantize:
        config = qconfig.activation
        free = isinstance(config, QuantizerConfig) and not issubclass(config.observer, FixedObserver)
        if not free or qconfig.fixed_output(self.output_op) is not None:
            return super()._make_output(qconfig)
        spec = config.spec  # type: ignore[union-attr]  # `free` says so
        return FakeQuantize(spec, FixedRangeObserver(spec, low=0.0, high=1.0 - 2.0**-spec.bits))


class CELU(ActivationOp, nn.CELU):
    """CELU with a quantized output."""

    float_type = nn.CELU


class ELU(ActivationOp, nn.ELU):
    """ELU with a quantized output."""

    float_type = nn.ELU


class GELU(ActivationOp, nn.GELU):
    """GELU with a quantized output."""

    float_type = nn.GELU
    owns_output = True


class GLU(ActivationOp, nn.GLU):
    """GLU with a quantized output."""

    float_type = nn.GLU


class Hardshrink(ActivationOp, nn.Hardshrink):
    """Hardshrink with a quantized output."""

    float_type = nn.Hardshrink


class Hardsigmoid(ActivationOp, nn.Hardsigmoid):
    """Hardsigmoid with a quantized output."""

    float_type = nn.Hardsigmoid
    owns_output = True


class Hardswish(ActivationOp, nn.Hardswish):
    """Hardswish with a quantized output."""

    float_type = nn.Hardswish
    owns_output = True


class Hardtanh(ActivationOp, nn.Hardtanh):
    """Hardtanh with a quantized output."""

    float_type = nn.Hardtanh


class LeakyReLU(ActivationOp, nn.LeakyReLU):
    """LeakyReLU with a quantized output."""

    float_type = nn.LeakyReLU


class LogSigmoid(ActivationOp, nn.LogSigmoid):
    """LogSigmoid with a quantized output."""

    float_type = nn.LogSigmoid


class LogSoftmax(ActivationOp, nn.LogSoftmax):
    """LogSoftmax with a quantized output."""

    float_type = nn.LogSoftmax


class Mish(ActivationOp, nn.Mish):
    """Mish with a quantized output."""

    float_type = nn.Mish
    owns_output = True


class PReLU(ActivationOp, nn.PReLU):
    """PReLU with a quantized output; its slopes, one or one a channel, stay float inside."""

    float_type = nn.PReLU


class RReLU(ActivationOp, nn.RReLU):
    """RReLU with a quantized output; deployed with the mean of its slopes, as in eval."""

    float_type = nn.RReLU

    def deployed_float(self) -> nn.Module:
        """See `QatOp.deployed_float`: runtimes know no RReLU, and without training it is a LeakyReLU, to the bit."""
        return nn.LeakyReLU((self.lower + self.upper) / 2).train(self.training)


class ReLU6(ActivationOp, nn.ReLU6):
    """ReLU6 with a quantized output."""

    float_type = nn.ReLU6


class SELU(ActivationOp, nn.SELU):
    """SELU with a quantized output."""

    float_type = nn.SELU


class SiLU(ActivationOp, nn.SiLU):
    """SiLU with a quantized output."""

    float_type = nn.SiLU
    owns_output = True


class Sigmoid(ActivationOp, nn.Sigmoid):
    """Sigmoid with a quantized output."""

    float_type = nn.Sigmoid


class Softmax(Probability, nn.Softmax):
    """Softmax with an output quantized on the grid of probabilities."""

    float_type = nn.Softmax


class Softmax2d(Probability, nn.Softmax2d):
    """Softmax2d with an output quantized on the grid of probabilities."""

    float_type = nn.Softmax2d


class Softmin(Probability, nn.Softmin):
    """Softmin with an output quantized on the grid of probabilities."""

    float_type = nn.Softmin


class Softplus(ActivationOp, nn.Softplus):
    """Softplus with a quantized output."""

    float_type = nn.Softplus


class Softshrink(ActivationOp, nn.Softshrink):
    """Softshrink with a quantized output."""

    float_type = nn.Softshrink


class Softsign(ActivationOp, nn.Softsign):
    """Softsign with a quantized output."""

    float_type = nn.Softsign


class Tanh(ActivationOp, nn.Tanh):
    """Tanh with a quantized output."""

    float_type = nn.Tanh


class Tanhshrink(ActivationOp, nn.Tanhshrink):
    """Tanhshrink with a quantized output."""

    float_type = nn.Tanhshrink


class Threshold(ActivationOp, nn.Threshold):
    """Threshold with a quantized output."""

    float_type = nn.Threshold

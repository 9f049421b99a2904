"""DoReFa (S. Zhou et al., "DoReFa-Net", 2016, arXiv:1606.06160): weights squeezed by tanh, activations clipped to 1.

Weights (section 2.3; rounding passes straight through):

    W̃  = tanh(W) / M             M = max|tanh(W)|           in [−1, 1]
    Ŵ  = FQ(W̃)                   symmetric codes, s = 1/qmax

    ∂L/∂W_i = (G_i/M − [i = argmax]·sgn(tanh W_i)·Σ_j G_j·tanh(W_j)/M²)·(1 − tanh²(W_i)),         G = ∂L/∂Ŵ

The paper's grid, (2·r − n)/n with n = 2^b − 1, has no code for 0: its zero point lies half-way between two codes, which
integer hardware does not have. Here it is moved by that half step. `W̃`, not `W`, is then folded with BatchNorm, with
`M` per output channel where scales are. A layer without BatchNorm puts out larger values than before it was prepared.

Activations (section 2.4, the bounded activation before quantize_k):

    one-sided    x̂ = FQ(clip(x, 0, 1))        s = 1/(qmax − qmin)
    two-sided    x̂ = FQ(clip(x, −1, 1))       s = 1/qmax             where negative values were seen (not in the paper)

    ∂x̂/∂x = 1 inside the range, else 0

Nothing is learned. The paper leaves the first and the last layer alone: give those a qconfig of their own.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from qbench.errors import ConfigError
from qbench.fake_quantize.base import FakeQuantize
from qbench.numerics.qparams import SMALLEST_SCALE, QParams, QSpec
from qbench.numerics.straight_through import clip_and_round


class DoReFaWeight(FakeQuantize):
    """Weight quantizer on tanh-normalized weights."""

    roles = ("weight",)

    @classmethod
    def check_spec(cls, spec: QSpec) -> None:
        """Refuse specs whose codes are not symmetric."""
        if not (spec.signed and spec.symmetric):
            raise ConfigError(
                f"DoReFa weights lie in [−1, 1], and {spec} is not signed and symmetric; LSQ works: weight_method='lsq'"
            )

    def shaped(self, weight: Tensor) -> Tensor:
        """`W̃`, shape of `W`."""
        squeezed = torch.tanh(weight)
        axis = self.spec.axis
        others = [dim for dim in range(weight.ndim) if axis is None or dim != axis]
        return squeezed / squeezed.abs().amax(others, keepdim=True).clamp(min=SMALLEST_SCALE)


class DoReFaActivation(FakeQuantize):
    """Activation quantizer on [0, 1], or on [−1, 1] where there are negative values.

    Its observer finds whether there are negative values.
    """

    roles = ("activation",)

    @classmethod
    def check_spec(cls, spec: QSpec) -> None:
        """Refuse grids of powers of two: 1/(qmax − qmin) is none."""
        if spec.power_of_two:
            raise ConfigError(f"DoReFa has the scale 1/(qmax − qmin), and {spec} asks for a power of two; method='tqt'")

    def grid_from(self, found: QParams) -> QParams:
        """The zero point that was found, and a scale whose highest code is 1."""
        scale = 1.0 / (found.qmax - found.zero_point).clamp(min=1).to(found.scale.dtype)
        # What is not finite must be found by QParams.check.
        return dataclasses.replace(found, scale=scale + 0.0 * found.scale)

    def fake_quantize(self, x: Tensor, qparams: QParams) -> Tensor:
        """`x` on the grid, with the gradient of the clip."""
        return clip_and_round(x, qparams)

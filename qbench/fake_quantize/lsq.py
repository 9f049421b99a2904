"""LSQ: learned step size (S. Esser et al., "Learned Step Size Quantization", ICLR 2020, arXiv:1902.08153).

    x̂ = s·clamp(rne(x/s), −Q_N, Q_P)            Q_N = z − qmin,  Q_P = qmax − z

    ∂x̂/∂x = 1  where −Q_N ≤ rne(x/s) ≤ Q_P, else 0
    ∂x̂/∂s = rne(x/s) − x/s  inside,   −Q_N below,   Q_P above                       (equation 3)
    ∂L/∂s ← g·∂L/∂s,  g = 1/sqrt(N·Q_P)                                             (section 2.2)
    s₀    = 2·mean|x|/sqrt(Q_P)                                                     (section 2.1)

`N` is the number of values that share the scale: of a weight, or of one sample of an activation. What the scale gets
through the bias, `s_b = s_in·s_w`, is part of ∂L/∂s and multiplied by `g` with it. The zero point is that of the start:
0, or the lowest code for tensors without negative values (the paper's unsigned data); another observer may give
another.

`s` stays positive by reflection at 0 (`learned.positive`): a step that crosses zero is only a step too far.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qbench.fake_quantize.learned import LearnedFakeQuantize, positive
from qbench.numerics.qparams import QParams


class LSQ(LearnedFakeQuantize):
    """Quantizer with a learned scale, for activations and weights.

    Attributes:
        sharing: float32 buffer (): `N`.
    """

    sharing: Tensor

    def _add_grid(self) -> None:
        super()._add_grid()
        self.register_buffer("sharing", torch.tensor(1.0))

    def fit_to(self, weight: Tensor) -> None:
        """Give the scale its shape; `N` is the number of weights that share one."""
        super().fit_to(weight)
        self.sharing.fill_(weight.numel() / max(1, self.start.numel()))

    def note_size(self, x: Tensor) -> None:
        """`N` is the number of values in one sample."""
        self.sharing.fill_(math.prod(x.shape[1:]))

    def start_from(self, found: QParams) -> Tensor:
        """The scale."""
        return found.scale

    def scale_of(self, value: Tensor) -> Tensor:
        """`s = |v|`, whose gradient is multiplied by `g`."""
        return positive(value, self.gradient_scale())

    def gradient_scale(self) -> Tensor:
        """`g`, shape of the scale."""
        return torch.rsqrt(self.sharing * (self.spec.qmax - self.start_zero_point).clamp(min=1))

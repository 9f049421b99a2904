"""DSQ: differentiable soft quantization (R. Gong et al., ICCV 2019, arXiv:1908.05033).

Between two neighbours of the grid, with `p = x/s` and `u = p − ⌊p⌋ − ½ ∈ [−½, ½)`, the staircase is replaced by a
curve:

    φ(u) = tanh(κ·u)/(1 − α)            κ = ln(2/α − 1),  so that φ(±½) = ±1            (equations 3 to 6)
    Q(x) = s·(⌊p⌋ + ½ + ½·sgn φ)         the codes of rounding; the gradient of sgn is 1             (equation 7)

    ∂x̂/∂x = D            D = ½·φ'(u) = ½·κ/(1 − α)·(1 − tanh²(κ·u)),       0 outside the range
    ∂x̂/∂s = rne(p) − p·D  inside,   qmin − z below,   qmax − z above
    ∂x̂/∂α = s·½·∂φ/∂α     ∂φ/∂α = tanh(κ·u)/(1 − α)² − (1 − tanh²(κ·u))·u·2/(α·(2 − α))/(1 − α)

The mean of `D` over a step is 1: the gradient is moved from values near the grid to those half-way between. `α → 0` is
the staircase itself. The paper learns both clipping bounds, `l` and `u`; integer hardware ties them to an integer zero
point, so what is learned of them is the width `R = u − l`, with `z` from the start:

    s = R/(qmax − qmin)        l = (qmin − z)·s        u = (qmax − z)·s        ∂/∂R = ∂/∂s / (qmax − qmin)

`α = ½·σ(a)`, with `a` learned, stays in (0, ½) and starts at 0.2. `R` stays positive by reflection at 0
(`learned.positive`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from qbench.fake_quantize.learned import LearnedFakeQuantize, positive
from qbench.numerics.qparams import QParams
from qbench.numerics.straight_through import fake_quantize_ste, straight_through

LARGEST_ALPHA = 0.5
FIRST_ALPHA = 0.2


class DSQ(LearnedFakeQuantize):
    """Quantizer with a soft gradient, a learned scale and a learned softness, for activations and weights.

    Attributes:
        softness: float32 parameter (): `a`.
    """

    def _add_grid(self) -> None:
        super()._add_grid()
        self.softness = nn.Parameter(torch.tensor(math.log(FIRST_ALPHA / (LARGEST_ALPHA - FIRST_ALPHA))))

    def start_from(self, found: QParams) -> Tensor:
        """`R`."""
        return found.scale * (self.spec.qmax - self.spec.qmin)

    def scale_of(self, value: Tensor) -> Tensor:
        """`s = |R|/(qmax − qmin)`."""
        return positive(value / (self.spec.qmax - self.spec.qmin))

    @property
    def alpha(self) -> Tensor:
        """`α`, ()."""
        return LARGEST_ALPHA * torch.sigmoid(self.softness.float())

    def fake_quantize(self, x: Tensor, qparams: QParams) -> Tensor:
        """`x` on the grid, with the soft gradient to `x`, `s` and `α`."""
        value = fake_quantize_ste(x.detach(), qparams)
        if not torch.is_grad_enabled():
            return value
        return straight_through(self._soft(x.float(), qparams).to(x.dtype), value)

    def _soft(self, x: Tensor, qparams: QParams) -> Tensor:
        """`Q`, whose value may differ from the codes by a rounding, and whose gradient counts."""
        scale, zero = (qparams.spread(part, x) for part in (qparams.scale, qparams.zero_point.long()))
        nearest = torch.round((x / scale).detach())
        bound = nearest.clamp(qparams.qmin - zero, qparams.qmax - zero)
        is_inside = nearest == bound
        # 0 for the others: at a scale next to 0 the gradient of a position that is not used would be ∞·0.
        position = torch.where(is_inside, x, 0.0) / scale
        below = torch.floor(position.detach())
        alpha = self.alpha
        phi = torch.tanh(torch.log(2.0 / alpha - 1.0) * (position - below - 0.5)) / (1.0 - alpha)
        inside = below + straight_through(0.5 + 0.5 * phi, nearest - below)
        return torch.where(is_inside, inside, bound) * scale

"""PACT: parameterized clipping activation (J. Choi et al., 2018, arXiv:1805.06085). For activations.

    one-sided    y = clip(x, 0, α)       s = α/(qmax − qmin)         x̂ = s·rne(y/s)         data without negative values
    two-sided    y = clip(x, −α', α)     s = α/qmax                  α' = α·Q_N/Q_P          signed data, zero point 0

    ∂x̂/∂x = 1  for −α' ≤ x ≤ α, else 0
    ∂x̂/∂α = 0  inside,   1  for x > α,   −Q_N/Q_P  for x < −α'        (equation 3; rounding passes through)

`Q_N = z − qmin` and `Q_P = qmax − z`: with codes [−128, 127] the lower bound lies one code further out than the upper.
`α` starts at max|x|, where nothing is clipped. Its gradient can only make it grow where clipping hurts; what makes it
shrink is the paper's regularizer, `λ/2·α²` for each use: its gradient `λ·α` is added here, because weight decay of an
optimizer acts on the change `δ = α − α₀` alone. It is not part of the loss that is reported, and a loss scaled for
mixed precision does not scale it.

`α` stays positive by reflection at 0 (`learned.positive`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qbench.errors import ConfigError
from qbench.fake_quantize.learned import LearnedFakeQuantize, positive
from qbench.numerics.qparams import QParams, QSpec
from qbench.numerics.straight_through import GridGradient, clip_and_round
from qbench.observers import Observer


class PACT(LearnedFakeQuantize):
    """Activation quantizer with a learned clipping bound.

    Args:
        spec: What is wanted.
        observer: Finds the first bound.
        decay: `λ`, 0 or more.

    Raises:
        ConfigError: `λ` is negative, or the spec asks for powers of two.
    """

    roles = ("activation",)

    def __init__(self, spec: QSpec, observer: Observer, decay: float = 1e-4) -> None:
        super().__init__(spec, observer)
        if not decay >= 0:
            raise ConfigError(f"PACT(decay={decay!r}): expected 0 or more, decay=1e-4 for example")
        self.decay = decay

    def start_from(self, found: QParams) -> Tensor:
        """`α`: the real value of the highest code."""
        return found.scale * self._positive_codes(found.zero_point)

    def scale_of(self, value: Tensor) -> Tensor:
        """`s = |α|/Q_P`."""
        return positive(value / self._positive_codes(self.start_zero_point))

    def fake_quantize(self, x: Tensor, qparams: QParams) -> Tensor:
        """`x` on the grid, with the gradients of the clip and of the regularizer."""
        return self.regularized(clip_and_round(x, qparams))

    @property
    def grid_gradient(self) -> GridGradient | None:
        """See `FakeQuantize.grid_gradient`."""
        return "bounds" if type(self).fake_quantize is PACT.fake_quantize else None

    def regularized(self, y: Tensor) -> Tensor:
        """See `LearnedFakeQuantize.regularized`: `λ·α`."""
        out: Tensor = _Regularized.apply(y, self.value(), self.decay)
        return out

    def _positive_codes(self, zero_point: Tensor) -> Tensor:
        return (self.spec.qmax - zero_point).clamp(min=1)


class _Regularized(torch.autograd.Function):
    """`y`; the gradient to `α` is `λ·α`."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, alpha: Tensor, decay: float) -> Tensor:
        ctx.save_for_backward(alpha)
        ctx.decay = decay
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (alpha,) = ctx.saved_tensors
        return grads[0], alpha * ctx.decay, None

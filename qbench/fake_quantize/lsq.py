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

In eager training on a CPU, `s` is one function of what is learned. That of an activation is asked for by each layer
that reads or writes the tensor, and as long as none of its numbers has moved they all get the same one, with one
gradient between them.
"""

from __future__ import annotations

import functools
import math
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qbench.fake_quantize.learned import LearnedFakeQuantize, positive
from qbench.numerics.blocks import at_hand
from qbench.numerics.qparams import SMALLEST_SCALE, QParams


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

    def scale_in_use(self) -> Tensor:
        """See `LearnedFakeQuantize.scale_in_use`."""
        change, spec, kind = self.change, self.spec, type(self)
        own = kind.scale_of, kind.gradient_scale, kind.value
        plain = own == (LSQ.scale_of, LSQ.gradient_scale, LSQ.value) and at_hand(change) and at_hand(self.start)
        if not (plain and change.requires_grad and torch.is_grad_enabled()):
            return super().scale_in_use()
        sharing = self.sharing.item()
        if change.ndim:
            per_channel = self.gradient_scale() if not (spec.symmetric and spec.signed) else _factor(sharing, spec.qmax)
            return _Scale.apply(change, self.start, per_channel, weakref.ref(self))
        zero_point = self.start_zero_point.item()
        now = self.start.item(), change.item(), zero_point, sharing
        known = _SHARED.get(self)
        if known is None or known.now != now or known.change() is not change:
            factor = _factor(sharing, spec.qmax - int(zero_point))
            scale = _Scale.apply(change, self.start, factor, weakref.ref(self))
            known = _SHARED[self] = _Shared(now, weakref.ref(change), scale)
        return known.scale

    def gradient_scale(self) -> Tensor:
        """`g`, shape of the scale."""
        return torch.rsqrt(self.sharing * (self.spec.qmax - self.start_zero_point).clamp(min=1))


@functools.lru_cache(maxsize=4096)
def _factor(sharing: float, positive_codes: int) -> Tensor:
    """`g`, (), float32 on a CPU."""
    return torch.rsqrt(torch.tensor(sharing) * max(1, positive_codes))


class _Scale(torch.autograd.Function):
    """`s = |v₀ + δ|`, at least the smallest scale; tells the quantizer that a gradient has come.

    What it keeps is not freed by a backward: more than one may come through what is shared.
    """

    @staticmethod
    def forward(
        ctx: Any, change: Tensor, start: Tensor, factor: Tensor, quantizer: weakref.ref[LSQ]
    ) -> Tensor:
        ctx.value = start + change
        ctx.factor, ctx.quantizer = factor, quantizer
        found: Tensor = ctx.value.abs().clamp_(min=SMALLEST_SCALE)
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        quantizer = ctx.quantizer()
        if quantizer is not None and not quantizer.learning:
            quantizer.learning = True
        return grads[0] * torch.copysign(ctx.factor, ctx.value), None, None, None


class _Shared(NamedTuple):
    """A scale, and the numbers that it was made of."""

    now: tuple[Any, ...]
    change: weakref.ref[Tensor]
    scale: Tensor


# By quantizer, and not on it: one that is copied or stored takes no graph along.
_SHARED: weakref.WeakKeyDictionary[LSQ, _Shared] = weakref.WeakKeyDictionary()

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

Layers that are one function get `v₀` and `δ` as they are, and hand `δ` its gradient themselves (`learned_scale`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from qbench.fake_quantize.learned import LearnedFakeQuantize, LearnedGrid, positive
from qbench.numerics.blocks import at_hand
from qbench.numerics.qparams import LearnedScale, QParams


class LSQ(LearnedFakeQuantize):
    """Quantizer with a learned scale, for activations and weights.

    Attributes:
        sharing: float32 buffer (): `N`.
    """

    sharing: Tensor
    _own_grid: ClassVar[bool] = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        names = "scale_of", "gradient_scale", "value", "scale_in_use", "snapshot", "qparams_of", "zero_point_of"
        cls._own_grid = all(getattr(cls, name) is getattr(LSQ, name) for name in names)

    def _add_grid(self) -> None:
        super()._add_grid()
        self.register_buffer("sharing", torch.tensor(1.0))

    def fit_to(self, weight: Tensor) -> None:
        """Give the scale its shape; `N` is the number of weights that share one."""
        super().fit_to(weight)
        self.sharing.fill_(weight.numel() / max(1, self.start.numel()))

    def note_size(self, shape: Sequence[int]) -> None:
        """`N` is the number of values in one sample."""
        self.sharing.fill_(math.prod(shape[1:]))

    def start_from(self, found: QParams) -> Tensor:
        """The scale."""
        return found.scale

    def scale_of(self, value: Tensor) -> Tensor:
        """`s = |v|`, whose gradient is multiplied by `g`."""
        return positive(value, self.gradient_scale())

    def learned_scale(self) -> LearnedScale:
        """See `LearnedFakeQuantize.learned_scale`."""
        return self._apart() or super().learned_scale()

    def learned_scale_of(self, weight: Tensor) -> LearnedScale:
        """See `LearnedFakeQuantize.learned_scale_of`."""
        return self._apart() or super().learned_scale_of(weight)

    def _learned_grid(self) -> LearnedGrid:
        scale = self._apart()
        return super()._learned_grid() if scale is None else LearnedGrid(scale, None, self.zero_point.clone())

    def _apart(self) -> LearnedScale | None:
        """Start and change as they are; None before the first gradient, which has to be noticed, and elsewhere."""
        change, spec = self.change, self.spec
        if not self.learning or not self._own_grid or not (at_hand(change) and at_hand(self.start)):
            return None
        if change.ndim and not (spec.symmetric and spec.signed):
            return None
        zero_point = 0 if change.ndim else int(self.start_zero_point.item())
        return LearnedScale(change, self.start, _factor(self.sharing.item(), spec.qmax - zero_point))

    def gradient_scale(self) -> Tensor:
        """`g`, shape of the scale."""
        return torch.rsqrt(self.sharing * (self.spec.qmax - self.start_zero_point).clamp(min=1))


@functools.lru_cache(maxsize=4096)
def _factor(sharing: float, positive_codes: int) -> float:
    """`g`, which is a float32."""
    return torch.rsqrt(torch.tensor(sharing) * max(1, positive_codes)).item()

"""TQT: trained thresholds (S. Jain et al., "Trained quantization thresholds", MLSys 2020, arXiv:1903.08066).

    s = 2^⌈v⌉            v = log₂(t / 2^(b−1)) for signed data, log₂(t / 2^b) for unsigned

    ∂x̂/∂x      = 1  inside, else 0
    ∂x̂/∂log₂t  = s·ln 2 · { rne(x/s) − x/s  inside,   qmin − z below,   qmax − z above }        (equations 7 and 8)

The scale is a power of two whatever the target asks for. Learned is `v`, the logarithm of the scale before it is
rounded up; `log₂ t` differs from it by a whole number, which changes neither the rounding nor the gradient (⌈·⌉ passes
straight through). A scale of this form is positive for every `v`; exponents stay in [−100, 100]. The zero point is that
of the start. The paper recommends Adam for `v`.

The threshold of a weight is learned relative to the largest weight at hand: `v = log₂(max|W_f|/qmax) + δ`, the maximum
held constant in the gradient. Powers of two do not move along with BatchNorm's factor, so the folded weight `W_f = k·W`
is quantized; with a threshold that stays where it started, all of it would be clipped once the running statistics have
moved.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from qbench.fake_quantize.learned import LearnedFakeQuantize
from qbench.numerics.qparams import QParams, QSpec
from qbench.observers import Observer

LARGEST_EXPONENT = 100.0


class TQT(LearnedFakeQuantize):
    """Quantizer with a power-of-two scale and a learned threshold, for activations and weights.

    Args:
        spec: What is wanted; its grid becomes one of powers of two.
        observer: Finds the first threshold.
    """

    def __init__(self, spec: QSpec, observer: Observer) -> None:
        super().__init__(dataclasses.replace(spec, power_of_two=True), observer)

    @classmethod
    def check_spec(cls, spec: QSpec) -> None:
        """Every spec can be met."""

    def qparams_of(self, x: Tensor) -> QParams:
        """The grid for a weight: the threshold is relative to the range of `x`."""
        if not self.observer.stateless:
            return super().qparams_of(x)
        found = self.observer(x)
        self._check_shape(found)
        self.seen_data = self.seen_data or self.training
        return self._grid(self.scale_of(self.start_from(found) + self.change.float()), found.zero_point)

    def start_from(self, found: QParams) -> Tensor:
        """`v`, not rounded."""
        return torch.log2(found.scale)

    def scale_of(self, value: Tensor) -> Tensor:
        """`s = 2^⌈v⌉`, exact, with the gradient `s·ln 2`."""
        value = value.clamp(-LARGEST_EXPONENT, LARGEST_EXPONENT)
        power = torch.ldexp(torch.ones_like(value), torch.ceil(value.detach()).nan_to_num().to(torch.int32))
        # exp(0) = 1: a factor that has the gradient and no bits; NaN stays NaN.
        return power * torch.exp((value - value.detach()) * math.log(2.0))

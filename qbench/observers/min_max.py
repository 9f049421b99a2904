"""Min–max ranges.

    latest           [min x, max x]                                of the tensor at hand
    running          [min over all x, max over all x]
    moving average   m ← m + c·(min x − m),  M alike               c = 0.01; the first tensor sets the range
"""

from __future__ import annotations

import torch
from torch import Tensor

from qbench.numerics.qparams import QSpec
from qbench.observers.base import LatestObserver, Observer


class LatestMinMaxObserver(LatestObserver):
    """Range of the tensor at hand: the one definition of a weight's range in train, eval and convert."""


class MinMaxObserver(Observer):
    """Range of everything seen."""

    def take(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Widen the range."""
        low, high = torch.minimum(self.min_val, low), torch.maximum(self.max_val, high)
        self.keep(low, high)
        return low, high


class MovingAverageMinMaxObserver(Observer):
    """Exponential moving average of the range of each tensor.

    Args:
        spec: What is wanted.
        averaging_constant: Weight `c` of the newest tensor.
    """

    def __init__(self, spec: QSpec, averaging_constant: float = 0.01) -> None:
        super().__init__(spec)
        self.averaging_constant = averaging_constant

    def take(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Move the range towards this one; the first tensor sets it (decided on the device, without a sync)."""
        first = self.min_val > self.max_val  # [+inf, −inf] stands for nothing seen; one infinite value does not
        low, high = (
            torch.where(first, new, old + self.averaging_constant * (new - old))
            for old, new in ((self.min_val, low), (self.max_val, high))
        )
        self.keep(low, high)
        return low, high

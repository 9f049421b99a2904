"""Grids that are one-sided or symmetric, and nothing between: what papers call unsigned and signed.

    one-sided    min x ≥ 0      low = 0           high = s·(qmax − qmin)      Q_P = qmax − qmin
    two-sided    otherwise      low = −s·(Q_P+1)  high = s·Q_P                Q_P = (qmax − qmin) // 2

    largest      s = max|x| / Q_P
    mean         s = 2·mean|x| / sqrt(Q_P)             the start of LSQ (Esser et al. 2020, section 2.1)

`Q_P` is the highest code minus the zero point. A tensor is two-sided for good once a negative value was seen; symmetric
specs are two-sided from the start. `min_val` holds the lowest value seen, `max_val` the mean of max|x| or of mean|x|.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qbench.numerics.qparams import QSpec
from qbench.observers.base import LatestObserver, Observer


class MagnitudeObserver(Observer):
    """Moving average of max|x|, one-sided or symmetric.

    Args:
        spec: What is wanted.
        averaging_constant: Weight of the newest tensor.
    """

    def __init__(self, spec: QSpec, averaging_constant: float = 0.01) -> None:
        super().__init__(spec)
        self.averaging_constant = averaging_constant

    def magnitude(self, rows: Tensor) -> Tensor:
        """What is averaged, (rows, values) -> (rows,)."""
        return rows.abs().amax(1)

    def scale(self, magnitude: Tensor, positive_codes: int) -> Tensor:
        """The scale that follows, shape of `magnitude`."""
        return magnitude / positive_codes

    def range_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Both ends for the tensor at hand."""
        rows = self.rows(x)
        return self._ends(self.from_rows(rows.amin(1), x), self.from_rows(self.magnitude(rows), x))

    def update(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Move the mean magnitude towards that of `x`; the first tensor sets it."""
        rows = self.rows(x)
        lowest, now = self.from_rows(rows.amin(1), x), self.from_rows(self.magnitude(rows), x)
        first = self.max_val < 0  # −inf stands for nothing seen
        mean = torch.where(first, now, self.max_val + self.averaging_constant * (now - self.max_val))
        lowest = torch.minimum(self.min_val, lowest)
        self.keep(lowest, mean)
        return self._ends(lowest, mean)

    def _ends(self, lowest: Tensor, magnitude: Tensor) -> tuple[Tensor, Tensor]:
        spec = self.spec
        levels = spec.qmax - spec.qmin
        if spec.symmetric:
            half = spec.qmax if spec.signed else levels // 2
            high = self.scale(magnitude, half) * half
            return -high, high
        both = self.scale(magnitude, levels // 2)
        high = torch.where(lowest < 0, both * (levels // 2), self.scale(magnitude, levels) * levels)
        return torch.where(lowest < 0, -both * (levels - levels // 2), 0.0), high


class MeanMagnitudeObserver(MagnitudeObserver):
    """The start of LSQ: a moving average of mean|x|, one-sided or symmetric."""

    clips = True

    def magnitude(self, rows: Tensor) -> Tensor:
        """Mean of |x|."""
        return rows.abs().mean(1)

    def scale(self, magnitude: Tensor, positive_codes: int) -> Tensor:
        """`2·mean|x| / sqrt(Q_P)`."""
        return 2.0 * magnitude / positive_codes**0.5


class LatestMagnitudeObserver(LatestObserver, MagnitudeObserver):
    """`MagnitudeObserver` of the tensor at hand."""


class LatestMeanMagnitudeObserver(LatestObserver, MeanMagnitudeObserver):
    """`MeanMagnitudeObserver` of the tensor at hand: the start of a learned weight scale."""

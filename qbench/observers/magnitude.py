"""Grids that are one-sided or symmetric, and nothing between: what papers call unsigned and signed.

    one-sided    min x ≥ 0      low = 0           high = s·(qmax − qmin)      Q_P = qmax − qmin
    two-sided    otherwise      low = −s·(Q_P+1)  high = s·Q_P                Q_P = (qmax − qmin) // 2

    largest      s = max|x| / Q_P
    mean         s = 2·mean|x| / sqrt(Q_P)             the start of LSQ (Esser et al. 2020, section 2.1)

`Q_P` is the highest code minus the zero point. Maximum and mean are those of everything seen. A tensor is two-sided for
good once a negative value was seen; symmetric specs are two-sided from the start. `min_val` holds the lowest value
seen, `max_val` max|x| or mean|x|.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qbench.numerics.qparams import QSpec
from qbench.observers.base import LatestObserver, Observer


class MagnitudeObserver(Observer):
    """Range of max|x| of everything seen, one-sided or symmetric."""

    def magnitude(self, rows: Tensor) -> Tensor:
        """What is kept, (rows, values) -> (rows,)."""
        return rows.abs().amax(1)

    def combine(self, before: Tensor, now: Tensor, count: int) -> Tensor:
        """Magnitude of everything seen; `now` is that of a tensor with `count` values for each scale."""
        return torch.maximum(before, now)

    def scale(self, magnitude: Tensor, positive_codes: int) -> Tensor:
        """The scale that follows, shape of `magnitude`."""
        return magnitude / positive_codes

    def range_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Both ends for the tensor at hand."""
        rows = self.rows(x)
        return self._ends(self.from_rows(rows.amin(1), x), self.from_rows(self.magnitude(rows), x))

    def update(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Take `x` into account and return both ends for everything seen."""
        rows = self.rows(x)
        lowest = torch.minimum(self.min_val, self.from_rows(rows.amin(1), x))
        magnitude = self.combine(self.max_val, self.from_rows(self.magnitude(rows), x), rows.shape[1])
        self.keep(lowest, magnitude)
        return self._ends(lowest, magnitude)

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
    """The start of LSQ: mean|x| of everything seen, one-sided or symmetric.

    Args:
        spec: What is wanted.
    """

    clips = True

    seen: Tensor

    def __init__(self, spec: QSpec) -> None:
        super().__init__(spec)
        if not self.stateless:
            self.register_buffer("seen", torch.tensor(0.0))

    def magnitude(self, rows: Tensor) -> Tensor:
        """Mean of |x|."""
        return rows.abs().mean(1)

    def combine(self, before: Tensor, now: Tensor, count: int) -> Tensor:
        """Mean of both, weighted by how many values they are of."""
        self.seen.add_(count)
        before = torch.where(before < 0, now, before)  # −inf stands for nothing seen
        return before + (now - before) * (count / self.seen)

    def scale(self, magnitude: Tensor, positive_codes: int) -> Tensor:
        """`2·mean|x| / sqrt(Q_P)`."""
        return 2.0 * magnitude / positive_codes**0.5


class LatestMagnitudeObserver(LatestObserver, MagnitudeObserver):
    """`MagnitudeObserver` of the tensor at hand."""


class LatestMeanMagnitudeObserver(LatestObserver, MeanMagnitudeObserver):
    """`MeanMagnitudeObserver` of the tensor at hand: the start of a learned weight scale."""

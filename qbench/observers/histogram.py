"""A histogram of everything seen, and the percentiles of it.

    bin i, −B/2 ≤ i < B/2, counts the values of [i·w, (i+1)·w)        w = 2^e / (B/2)
    e = the least exponent with |x| < 2^e for every x so far

When `e` grows by `j`, bin `i` becomes part of bin `i >> j`: edges stay edges, so counts stay exact however the range
grew, and nothing is read on the host. The percentile range leaves out a share of 1 − p/100 of the values at each end:

    low  = left edge of the first bin with  counts up to and including it > (1 − p/100)·n
    high = right edge of the first bin with counts up to and including it ≥ p/100·n

both no further out than the lowest and highest value seen.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qbench.errors import ConfigError
from qbench.numerics.qparams import QSpec
from qbench.observers.base import Observer, share_between

BINS = 4096
SMALLEST_EXPONENT = -120


class HistogramObserver(Observer):
    """Base of the observers that look at the distribution of everything seen. Per tensor.

    Subclasses implement `range_from`.

    Args:
        spec: What is wanted, per tensor.

    Raises:
        ConfigError: the spec is per channel.
    """

    clips = True

    counts: Tensor
    exponent: Tensor

    def __init__(self, spec: QSpec) -> None:
        super().__init__(spec)
        if spec.axis is not None:
            raise ConfigError(
                f"{type(self).__name__}({spec}): a histogram is per tensor; MSEObserver and QuantileObserver work per "
                "channel"
            )
        self.register_buffer("counts", torch.zeros(BINS, dtype=torch.int64))
        self.register_buffer("exponent", torch.tensor(SMALLEST_EXPONENT, dtype=torch.int32))

    def range_from(self, counts: Tensor, width: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """The range that the distribution needs.

        Args:
            counts: int64, (bins,); the middle two bins meet at 0.
            width: float32, (): of a bin.
            low: Lowest value seen.
            high: Highest value seen.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement range_from(counts, width, low, high)")

    def update(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Add `x` to the histogram and return the range of all of it."""
        low, high = self.range_of(x)
        low, high = torch.minimum(self.min_val, low), torch.maximum(self.max_val, high)
        self.keep(low, high)
        self._count(x.detach().float().flatten(), torch.maximum(-low, high))
        width = torch.ldexp(torch.ones_like(low), self.exponent) / (BINS // 2)
        found = self.range_from(self.counts, width, low.clamp(max=0.0), high.clamp(min=0.0))
        # NaN and infinity have no bin: they must be found by QParams.check, not hidden.
        return found[0] + (low - low), found[1] + (high - high)

    def _count(self, values: Tensor, largest: Tensor) -> None:
        largest = torch.nan_to_num(largest, nan=0.0, posinf=torch.finfo(torch.float32).max)
        exponent = torch.maximum(torch.frexp(largest).exponent, self.exponent)
        middle = BINS // 2
        index = torch.arange(BINS, device=values.device) - middle
        moved = (index >> (exponent - self.exponent).clamp(max=62)) + middle
        counts = torch.zeros_like(self.counts).scatter_add_(0, moved, self.counts)
        # In float64, where x·(B/2)/2^e is exact: a value on an edge belongs to the bin that begins there.
        place = torch.floor(torch.ldexp(torch.nan_to_num(values).double(), -exponent) * middle)
        place = place.clamp(-middle, middle - 1).to(torch.int64) + middle
        self.counts.copy_(counts.scatter_add_(0, place, torch.isfinite(values).to(torch.int64)))
        self.exponent.copy_(exponent)


class PercentileObserver(HistogramObserver):
    """Range of a percentage of everything seen.

    Args:
        spec: What is wanted, per tensor.
        percentile: `p`, above 50 and up to 100; 100 is min–max.

    Raises:
        ConfigError: `p` lies outside, or the spec is per channel.
    """

    def __init__(self, spec: QSpec, percentile: float = 99.99) -> None:
        super().__init__(spec)
        self.percentile = share_between("percentile", percentile, 50.0, 100.0)

    def range_from(self, counts: Tensor, width: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Edges of the bins in which the percentiles lie."""
        below = counts.cumsum(0)
        total = below[-1].double()
        share = self.percentile / 100.0
        first = (below <= total * (1.0 - share)).sum()
        last = (below < total * share).sum()
        middle = len(counts) // 2
        return torch.maximum((first - middle) * width, low), torch.minimum((last + 1 - middle) * width, high)

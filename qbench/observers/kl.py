"""The threshold whose quantized distribution tells least apart from the real one (Kullback and Leibler).

    P_T   histogram of |x| below T; what lies above is added to its last bin
    Q_T   the same bins without that addition, made into L levels: the bins of a level share its counts evenly, empty
          bins stay empty
    T     = argmin KL(P_T ‖ Q_T) = Σ P log(P / Q)         P and Q normalised, Q at least 2^(−24)

`L` is the number of codes above zero: 2^bits for a tensor without negative values, else 2^(bits−1). Thresholds are
tried at every eighth of 2048 bins. The range is [−T, T], no further out than the values seen. The rule is that of
S. Migacz, "8-bit inference with TensorRT", GTC 2017.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qbench.observers.histogram import HistogramObserver

STEP = 8
SMALLEST_SHARE = 2.0**-24


class KLObserver(HistogramObserver):
    """Range of the threshold with the least divergence. Per tensor.

    A search over 256 thresholds: meant for calibration, `disable_observer` ends it.
    """

    def range_from(self, counts: Tensor, width: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """[−T, T] inside [low, high]."""
        middle = len(counts) // 2
        sizes = (counts[middle:] + counts[:middle].flip(0)).double()  # of |x|, (bins/2,)
        codes = self.spec.qmax - self.spec.qmin + 1
        two_sided = torch.ones_like(low, dtype=torch.bool) if self.spec.symmetric else low < 0
        threshold = width * best_threshold(sizes, torch.where(two_sided, codes // 2, codes))
        return torch.maximum(-threshold, low), torch.minimum(threshold, high)


def best_threshold(sizes: Tensor, levels: Tensor) -> Tensor:
    """How many bins lie below the threshold with the least divergence, int64, ().

    Args:
        sizes: float64 counts of |x|, (bins,).
        levels: `L`, int64, ().
    """
    ends = torch.arange(STEP, len(sizes) + 1, STEP, device=sizes.device)
    used = ((sizes > 0) * torch.arange(1, len(sizes) + 1, device=sizes.device)).amax()  # nothing lies beyond
    found = torch.where((ends >= levels) & (ends < used + STEP), divergences(sizes, ends, levels), torch.inf)
    least, place = found.min(0)
    return torch.where(torch.isfinite(least), STEP * (place + 1), used)


def divergences(sizes: Tensor, ends: Tensor, levels: Tensor) -> Tensor:
    """KL(P ‖ Q) for every threshold, float64, (thresholds,).

    Args:
        sizes: float64 counts, (bins,).
        ends: int64: how many bins lie below each threshold, (thresholds,).
        levels: `L`, int64, ().
    """
    index, end = torch.arange(len(sizes), device=sizes.device), ends[:, None]
    inside = (index < end).double()  # (thresholds, bins)
    counts = sizes * inside
    level = (index * levels // end).clamp(max=len(sizes) - 1)  # those outside count nothing, wherever they are
    live = (counts > 0).double()
    sums, sharing = (torch.zeros_like(counts).scatter_add_(1, level, values) for values in (counts, live))
    q = (sums / sharing.clamp(min=1.0)).gather(1, level) * live
    q = (q / q.sum(1, keepdim=True).clamp(min=1.0)).clamp(min=SMALLEST_SHARE)
    beyond = sizes.sum() - counts.sum(1, keepdim=True)
    p = counts + torch.where(index == end - 1, beyond, 0.0)
    p = p / p.sum(1, keepdim=True).clamp(min=1.0)
    return torch.where(p > 0, p * torch.log(torch.where(p > 0, p, 1.0) / q), 0.0).sum(1)

"""Quantiles of each tensor: a share of the values at each end may be clipped.

    low = quantile(x, 1 − q)        high = quantile(x, q)        linear between neighbours, q = 0.999

Per channel, each channel has quantiles of its own. Of a row of more than 2²⁰ values, every nth is looked at.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qbench.numerics.qparams import QSpec
from qbench.observers.base import LatestObserver, share_between
from qbench.observers.min_max import MovingAverageMinMaxObserver

# torch.quantile sorts; it refuses more than 2²⁴ values.
LARGEST_SAMPLE = 2**20


class QuantileObserver(MovingAverageMinMaxObserver):
    """Moving average of the quantiles of each tensor.

    Args:
        spec: What is wanted.
        averaging_constant: Weight of the newest tensor.
        quantile: `q`, above 0.5 and up to 1; 1 is min–max.

    Raises:
        ConfigError: `q` lies outside.
    """

    clips = True

    def __init__(self, spec: QSpec, averaging_constant: float = 0.1, quantile: float = 0.999) -> None:
        super().__init__(spec, averaging_constant)
        self.quantile = share_between("quantile", quantile, 0.5, 1.0)

    def range_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Both quantiles of `x`."""
        rows = sampled(self.rows(x), LARGEST_SAMPLE)
        ends = torch.tensor([1.0 - self.quantile, self.quantile], device=rows.device)
        # torch.quantile does not exceed 2²⁴ values in all: one row after the other where there are many.
        low, high = torch.cat([torch.quantile(part, ends, dim=1) for part in _parts(rows)], dim=1)
        return self.from_rows(low, x), self.from_rows(high, x)


class LatestQuantileObserver(LatestObserver, QuantileObserver):
    """Quantiles of the tensor at hand, for weights."""


def sampled(rows: Tensor, size: int) -> Tensor:
    """At most about `size` values of each row, evenly spaced: (rows, values) -> (rows, fewer values)."""
    step = -(-rows.shape[1] // size)
    # An even step would walk down the same columns of an image.
    return rows if step <= 1 else rows[:, :: step | 1]


def _parts(rows: Tensor) -> tuple[Tensor, ...]:
    return rows.split(max(1, 2**23 // max(1, rows.shape[1])))

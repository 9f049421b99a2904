"""Activations quantized while a program runs: one int8 grid for each row (token), asymmetric.

    lo = min(x, 0)      hi = max(x, 0)      over the last axis
    s  = max((hi − lo) / 255, 2⁻²³)
    z  = −128 − lo/s   if  (−128 + lo/s) + (127 + hi/s) > 0   else   127 − hi/s          then clamped and rounded
    q  = clamp(rne(f64(x) · (1/f64(s)) + z), −128, 127)

s, z and the choice between the two in float32, the code in float64 with the zero point inside the rounding: the steps
of `quantized_decomposed.choose_qparams_per_token_asymmetric` and `quantize_per_token` in PyTorch (the first says that
it follows XNNPACK's rule). Values of a row that is not finite are no codes; its scale is not finite either.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

QMIN, QMAX = -128, 127
# The epsilon of float32: rows of zeros still get a scale.
SMALLEST_ROW_SCALE = 2.0**-23


class RowGrids(NamedTuple):
    """One grid per row: `scale` float32 and `zero_point` float32 (an integer), both (…, 1)."""

    scale: Tensor
    zero_point: Tensor


def choose_row_grids(x: Tensor) -> RowGrids:
    """Grids of the rows of a float32 tensor (…, columns), columns ≥ 1."""
    low, high = torch.aminmax(x, dim=-1, keepdim=True)
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    scale = ((high - low) / float(QMAX - QMIN)).clamp(min=SMALLEST_ROW_SCALE)
    from_low, from_high = low / scale, high / scale
    take_low = (QMIN + from_low) + (QMAX + from_high) > 0
    zero_point = torch.where(take_low, QMIN - from_low, QMAX - from_high).clamp(QMIN, QMAX).round()
    return RowGrids(scale, zero_point)


def quantize_rows(x: Tensor, grids: RowGrids) -> Tensor:
    """int8 codes, shape of `x`."""
    steps = x.double() * (1.0 / grids.scale.double()) + grids.zero_point.double()
    return torch.nan_to_num(steps.round_(), nan=0.0).clamp_(QMIN, QMAX).to(torch.int8)

"""Fixed-point arithmetic for hardware without a float unit, as TOSA's RESCALE states it.

    m · 2^e = s_b / s_out in float64        multiplier = round(m · 2^31)        shift = 31 − e
    requantize     clamp(((acc · multiplier + 2^(shift − 1)) >> shift) + z_out)
"""

from __future__ import annotations

import torch
from torch import Tensor

from qbench.numerics.arithmetic.base import Arithmetic, Grid, saturate
from qbench.numerics.arithmetic.xnnpack import quantize


def multiplier_and_shift(ratio: Tensor) -> tuple[Tensor, Tensor]:
    """A positive float64 ratio as int64 `multiplier` (31 bits) and `shift`: ratio ≈ multiplier · 2^−shift."""
    mantissa, exponent = torch.frexp(ratio.to(torch.float64))
    multiplier = torch.round(mantissa * 2.0**31).to(torch.int64)
    shift = 31 - exponent.to(torch.int64)
    doubled = multiplier == 2**31
    return torch.where(doubled, multiplier // 2, multiplier), torch.where(doubled, shift - 1, shift)


def requantize(acc: Tensor, scale: Tensor, out: Grid) -> Tensor:
    """RESCALE with `apply_scale_32`, one multiplier a channel."""
    multiplier, shift = multiplier_and_shift(scale.to(torch.float64) / out.scale)
    half = torch.ones_like(shift) << (shift - 1)
    return saturate(((acc.to(torch.int64) * multiplier + half) >> shift) + out.zero_point, out)


ARITHMETIC = Arithmetic(name="tosa", quantize=quantize, requantize=requantize)

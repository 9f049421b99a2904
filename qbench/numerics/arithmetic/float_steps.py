"""Float32 steps that PyTorch does not offer by themselves, with the very bits of the hardware instruction.

    fma(a, b, c) = f32(a·b + c), rounded once

`a·b` of two float32 values is exact in float64. The sum of that and `c` may not be: rounding it to float64 and then to
float32 would round twice. The float64 sum is therefore rounded *to odd*: the exact error of the sum says on which side
of it the true value lies, and of its two float64 neighbours the one whose last bit is 1 stands for it. Rounding that to
float32 (at least two bits shorter, also among subnormals) gives the true value's own float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def fma(a: Tensor, b: Tensor | float, c: Tensor | float) -> Tensor:
    """`f32(a·b + c)` with one rounding, as an FMA instruction computes it; float32, shapes broadcast.

    Numbers are taken as they are, so they must be float32 values. NaN and infinities behave as in `a * b + c`.
    """
    product = a.to(torch.float64) * _wide(b, a)
    return _sum_to_odd(product, _wide(c, a)).to(torch.float32)


def horner(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    """A polynomial by FMA steps, `p = fma(p, x, c)` from the highest coefficient to the lowest; float32."""
    value = torch.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        value = fma(value, x, float32(coefficient))
    return value


def float32(value: float) -> float:
    """A constant as a compiler stores it in a float: the nearest float32."""
    return torch.tensor(value, dtype=torch.float32).item()


def _wide(value: Tensor | float, like: Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value.to(torch.float64)
    return torch.tensor(value, dtype=torch.float64, device=like.device)


def _sum_to_odd(a: Tensor, b: Tensor) -> Tensor:
    """`a + b` of float64 tensors, rounded to odd where it is inexact."""
    total = a + b
    # The exact error of the sum: Knuth's two-sum, for any order of magnitudes.
    part = total - a
    error = (a - (total - part)) + (b - part)
    bits = total.view(torch.int64)
    # One step away from zero makes an even number of last bit odd, one step towards zero does as well.
    step = torch.where((error > 0) == (total > 0), 1, -1)
    to_odd = (error != 0) & torch.isfinite(error) & (bits & 1 == 0)
    return torch.where(to_odd, bits + step, bits).view(torch.float64)

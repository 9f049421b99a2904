"""Shifts of hardware without a multiplier: where every scale is a power of two, so is every ratio of scales.

    accumulator at s_in · s_w, bias at s_b, output at s_out
    requantize = log2(s_out / (s_in · s_w))        the accumulator is shifted right by so much
    bias       = log2(s_b / (s_in · s_w))          the bias is shifted left by so much (right where it is negative)
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class ShiftLimits:
    """Shifts that the hardware can do.

    Attributes:
        requantize: Smallest and largest shift from the accumulator to the output.
        bias: Largest shift to the left of a bias.
        bias_right: A bias may be shifted right by at most `max(0, bias_right − requantize)`.
    """

    requantize: tuple[int, int]
    bias: int
    bias_right: int

    def broken(self, requantize: Tensor, bias: Tensor | None) -> list[str]:
        """What of a layer lies outside, as sentences; empty where everything fits.

        Args:
            requantize: int64, () or (out,).
            bias: int64, same shape or broadcasting with it; None where there is no bias to shift.
        """
        low, high = self.requantize
        found = []
        if bool(((requantize < low) | (requantize > high)).any()):
            found.append(f"requantization shift {_span(requantize)}, the hardware has {low} … {high}")
        if bias is not None:
            lowest = (requantize - self.bias_right).clamp(max=0)
            if bool(((bias < lowest) | (bias > self.bias)).any()):
                found.append(f"bias shift {_span(bias)}, the hardware has {int(lowest.min())} … {self.bias}")
        return found


def power_of_two_exponent(scale: Tensor) -> Tensor:
    """`log2(scale)` of powers of two, int64, exact: the float's own exponent."""
    return torch.frexp(scale)[1].long() - 1  # a mantissa of 0.5 stands for the power itself


def requantization_shift(input_scale: Tensor, weight_scale: Tensor, output_scale: Tensor) -> Tensor:
    """`log2(s_out / (s_in · s_w))`; (), (out,) or (), () -> int64, the shape of s_w."""
    output, *others = map(power_of_two_exponent, (output_scale, input_scale, weight_scale))
    return output - others[0] - others[1]


def bias_shift(input_scale: Tensor, weight_scale: Tensor, bias_scale: Tensor) -> Tensor:
    """`log2(s_b / (s_in · s_w))`, as `requantization_shift`."""
    return requantization_shift(input_scale, weight_scale, bias_scale)


def _span(shifts: Tensor) -> str:
    low, high = int(shifts.min()), int(shifts.max())
    return str(low) if low == high else f"{low} … {high}"

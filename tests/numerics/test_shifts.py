"""Shifts between power-of-two scales: exponents against numpy, limits as a table."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qbench.numerics.shifts import ShiftLimits, bias_shift, power_of_two_exponent, requantization_shift

LIMITS = ShiftLimits(requantize=(0, 16), bias=16, bias_right=16)


def test_exponents_are_those_of_numpy() -> None:
    exponents = np.arange(-126, 120)
    scales = torch.tensor(2.0**exponents, dtype=torch.float32)
    np.testing.assert_array_equal(power_of_two_exponent(scales).numpy(), exponents)


def test_shifts_per_channel_and_per_tensor() -> None:
    s_in, s_out, s_b = torch.tensor(2.0**-4), torch.tensor(2.0**-3), torch.tensor(2.0**-6)
    s_w = torch.tensor([2.0**-7, 2.0**-9])
    assert requantization_shift(s_in, s_w, s_out).tolist() == [8, 10]
    assert bias_shift(s_in, s_w, s_b).tolist() == [5, 7]
    assert requantization_shift(s_in, s_w[0], s_out).item() == 8


@pytest.mark.parametrize(
    ("requantize", "bias", "messages"),
    [
        ([0], None, []),
        ([16], [16], []),
        ([5], [-11], []),
        ([16], [0], []),
        ([16], [-1], [r"bias shift -1, the hardware has 0 … 16"]),
        ([5], [-12], [r"bias shift -12, the hardware has -11 … 16"]),
        ([5], [17], [r"bias shift 17, the hardware has -11 … 16"]),
        ([-1], [3], [r"requantization shift -1, the hardware has 0 … 16"]),
        ([17, 3], [17, 3], ["requantization shift 3 … 17, the hardware has 0 … 16", "bias shift 3 … 17"]),
    ],
)
def test_what_is_outside_is_said(requantize: list[int], bias: list[int] | None, messages: list[str]) -> None:
    shift = None if bias is None else torch.tensor(bias)
    found = LIMITS.broken(torch.tensor(requantize), shift)
    assert len(found) == len(messages)
    assert all(message in sentence for message, sentence in zip(messages, found, strict=True))

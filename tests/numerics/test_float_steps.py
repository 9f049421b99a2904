"""One fused multiply-add against exact rational arithmetic, and against the hardware where numpy offers none."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qbench.numerics.arithmetic.float_steps import float32, fma, horner

from .support import generator, same_bits


def nearest_float32(value: Fraction) -> float:
    """Round half to even of a rational number, in integers alone."""
    if value == 0:
        return 0.0
    sign, value = (-1 if value < 0 else 1), abs(value)
    exponent = value.numerator.bit_length() - value.denominator.bit_length()
    exponent -= value < Fraction(2) ** exponent
    unit = Fraction(2) ** max(exponent - 23, -149)
    rounded = round(value / unit) * unit
    return sign * (math.inf if rounded >= Fraction(2) ** 128 else float(rounded))


def expected(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    numbers = zip(a.tolist(), b.tolist(), c.tolist(), strict=True)
    return torch.tensor([nearest_float32(Fraction(x) * Fraction(y) + Fraction(z)) for x, y, z in numbers])


def floats(random: np.random.Generator, count: int, low: int = -40, high: int = 40) -> Tensor:
    mantissas = random.integers(-(2**24), 2**24, count) * np.exp2(random.integers(low, high, count) - 24.0)
    return torch.from_numpy(mantissas.astype(np.float32))


@pytest.mark.parametrize(("low", "high"), [(-40, 40), (-8, 8), (-2, 3), (-70, -50)], ids=str)
def test_fma_rounds_once(low: int, high: int) -> None:
    random = generator(abs(high))
    a, b, c = (floats(random, 4000, low, high) for _ in range(3))
    assert torch.equal(fma(a, b, c), expected(a, b, c))


@pytest.mark.parametrize("sign", [1, -1], ids=["added", "subtracted"])
def test_fma_where_float64_would_round_twice(sign: int) -> None:
    # a·b = 0.5 − 2^-41: beside a c of 24 bits, float64 makes it 0.5, a tie, and the tie then goes to even.
    c = torch.from_numpy(generator(1).integers(2**23, 2**24, 4000)).to(torch.float32)
    a, b = torch.full_like(c, sign * 0.5 * (1 + 2.0**-20)), torch.full_like(c, 1 - 2.0**-20)
    right = expected(a, b, c)
    assert torch.equal(fma(a, b, c), right) and torch.equal(fma(-a, b, -c), -right)
    assert not torch.equal((a.double() * b.double() + c.double()).float(), right)


@given(*(st.floats(width=32, allow_nan=False, allow_infinity=False) for _ in range(3)))
def test_fma_of_any_finite_floats(a: float, b: float, c: float) -> None:
    tensors = [torch.tensor([value]) for value in (a, b, c)]
    assert fma(*tensors).item() == expected(*tensors).item()


def test_nan_and_infinities() -> None:
    a, inf, nan = torch.tensor([1.0, -2.0]), float("inf"), float("nan")
    assert fma(a, inf, 1.0).tolist() == [inf, -inf]
    assert fma(a, 1.0, -inf).tolist() == [-inf, -inf]
    assert fma(a, nan, 1.0).isnan().all() and fma(torch.zeros(1), inf, 1.0).isnan().all()


def test_horner_is_a_chain_of_fmas() -> None:
    x = floats(generator(5), 500, -3, 3)
    coefficients = (0.1, -0.7, 3.3)
    first = fma(torch.full_like(x, float32(0.1)), x, float32(-0.7))
    assert same_bits(horner(x, coefficients), fma(first, x, float32(3.3)))


def test_a_constant_is_its_float32() -> None:
    assert float32(0.1) == float(np.float32(0.1)) != 0.1

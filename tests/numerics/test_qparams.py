"""QSpec, storage dtypes, and the grid that is chosen for an observed range."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from qbench.errors import ConfigError, NumericsError
from qbench.numerics.qparams import (
    SMALLEST_SCALE,
    QParams,
    QSpec,
    along_axis,
    choose_qparams,
    dequantize,
    fake_quantize,
    next_power_of_two,
    quantize,
    storage_dtype,
)

from .support import INT32_MAX, INT32_MIN, exact, same_bits

range_ends = st.floats(-(2.0**100), 2.0**100, width=32)
ranges = st.tuples(range_ends, range_ends).map(sorted)


@st.composite
def specs(draw: st.DrawFn) -> QSpec:
    signed = draw(st.booleans())
    return QSpec(
        bits=draw(st.integers(2, 16)),
        signed=signed,
        symmetric=draw(st.booleans()),
        narrow=signed and draw(st.booleans()),
        power_of_two=draw(st.booleans()),
    )


symmetric_specs = specs().map(lambda spec: dataclasses.replace(spec, symmetric=True))
asymmetric_specs = specs().map(lambda spec: dataclasses.replace(spec, symmetric=False))


def choose(low: float, high: float, spec: QSpec) -> QParams:
    return choose_qparams(torch.tensor(low), torch.tensor(high), spec)


def tolerance_in_steps(spec: QSpec) -> float:
    """How far a value of the range may lie from its grid point, in scales.

    Half a step of rounding. The rest is float32: the scale (a difference and a quotient), its reciprocal, the product
    with it and the product that dequantizes each carry a relative 2⁻²⁴, on at most qmax − qmin steps.
    """
    return 0.5 + (spec.qmax - spec.qmin) * 6 * 2.0**-24


# QSpec ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "qmin", "qmax", "dtype", "name"),
    [
        (QSpec(), -128, 127, torch.int8, "int8 asymmetric per tensor"),
        (QSpec(narrow=True, symmetric=True, axis=0), -127, 127, torch.int8, "int8 symmetric per channel (axis 0)"),
        (QSpec(signed=False), 0, 255, torch.uint8, "uint8 asymmetric per tensor"),
        (QSpec(bits=2), -2, 1, torch.int8, "int2 asymmetric per tensor"),
        (QSpec(bits=2, narrow=True), -1, 1, torch.int8, "int2 asymmetric per tensor"),
        (QSpec(bits=4, signed=False), 0, 15, torch.int8, "uint4 asymmetric per tensor"),
        (QSpec(bits=16, power_of_two=True), -(2**15), 2**15 - 1, torch.int16, "int16 asymmetric per tensor, power-of"),
        (QSpec(bits=16, signed=False), 0, 2**16 - 1, torch.int32, "uint16 asymmetric per tensor"),
        (QSpec(bits=32), INT32_MIN, INT32_MAX, torch.int32, "int32 asymmetric per tensor"),
        (QSpec(bits=31, signed=False), 0, INT32_MAX, torch.int32, "uint31 asymmetric per tensor"),
    ],
)
def test_codes_of_a_spec(spec: QSpec, qmin: int, qmax: int, dtype: torch.dtype, name: str) -> None:
    assert (spec.qmin, spec.qmax, spec.dtype) == (qmin, qmax, dtype)
    assert str(spec).startswith(name)


@pytest.mark.parametrize("bits", [-8, 0, 1, 33, 8.0, "8", None])
def test_a_width_that_no_code_has(bits: object) -> None:
    with pytest.raises(ConfigError, match="2 to 32 bits") as caught:
        QSpec(bits=bits)  # type: ignore[arg-type]
    assert repr(bits) in str(caught.value)


def test_unsigned_codes_have_no_lowest_code_to_leave_out() -> None:
    with pytest.raises(ConfigError, match="narrow"):
        QSpec(signed=False, narrow=True)


def test_unsigned_codes_of_32_bits_are_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="int32"):
        QSpec(bits=32, signed=False)


def test_a_spec_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        QSpec().bits = 4  # type: ignore[misc]


@given(st.integers(INT32_MIN, INT32_MAX), st.integers(INT32_MIN, INT32_MAX))
def test_storage_is_the_smallest_that_holds_both_ends(one: int, other: int) -> None:
    qmin, qmax = min(one, other), max(one, other)
    dtype = storage_dtype(qmin, qmax)
    assert torch.iinfo(dtype).min <= qmin <= qmax <= torch.iinfo(dtype).max
    assert torch.tensor([qmin, qmax], dtype=dtype).tolist() == [qmin, qmax]
    smaller = [d for d in (torch.int8, torch.uint8, torch.int16) if torch.iinfo(d).bits < torch.iinfo(dtype).bits]
    assert not any(torch.iinfo(d).min <= qmin and qmax <= torch.iinfo(d).max for d in smaller)


@pytest.mark.parametrize(("qmin", "qmax"), [(0, 2**32 - 1), (INT32_MIN - 1, 0)])
def test_codes_that_nothing_stores(qmin: int, qmax: int) -> None:
    with pytest.raises(NumericsError, match=str(qmax)):
        storage_dtype(qmin, qmax)


@pytest.mark.parametrize(
    ("axis", "ndim", "shape"),
    [(0, 1, (3,)), (0, 4, (3, 1, 1, 1)), (1, 3, (1, 3, 1)), (-1, 3, (1, 1, 3)), (1, 2, (1, 3))],
)
def test_along_axis(axis: int, ndim: int, shape: tuple[int, ...]) -> None:
    values = torch.arange(3)
    assert same_bits(along_axis(values, axis, ndim), values.view(shape))


def test_along_axis_leaves_a_scalar() -> None:
    assert along_axis(torch.tensor(2.0), None, 4).shape == ()
    assert along_axis(torch.tensor(2.0), 1, 4).shape == ()


# choose_qparams -------------------------------------------------------------------------------------------------------


@given(ranges, specs())
def test_the_grid_is_usable(ends: list[float], spec: QSpec) -> None:
    q = choose(*ends, spec)
    q.check("grid")
    assert (q.qmin, q.qmax, q.axis) == (spec.qmin, spec.qmax, spec.axis)
    assert (q.scale.dtype, q.zero_point.dtype, q.scale.shape) == (torch.float32, torch.int32, ())
    assert q.scale.item() >= SMALLEST_SCALE


@given(ranges, specs())
def test_zero_is_on_the_grid(ends: list[float], spec: QSpec) -> None:
    q = choose(*ends, spec)
    zero = torch.zeros(1)
    assert same_bits(fake_quantize(zero, q), zero)
    assert quantize(zero, q).item() == q.zero_point.item()


@given(ranges, specs(), st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_the_range_is_covered(ends: list[float], spec: QSpec, where: list[float]) -> None:
    low, high = min(ends[0], 0.0), max(ends[1], 0.0)
    q = choose(*ends, spec)
    inside = np.array([low, high, *[low + (high - low) * part for part in where]], dtype=np.float32)
    x = torch.from_numpy(np.clip(inside, low, high).astype(np.float32))
    error = (dequantize(quantize(x, q), q).double() - x.double()).abs() / q.scale.double()
    assert error.max() <= tolerance_in_steps(spec)


@given(ranges, asymmetric_specs)
def test_asymmetric_is_the_equation(ends: list[float], spec: QSpec) -> None:
    """In numpy's float32, which rounds after each operation as the equation says."""
    low, high = np.float32(min(ends[0], 0.0)), np.float32(max(ends[1], 0.0))
    spec = dataclasses.replace(spec, power_of_two=False)
    q = choose(*ends, spec)
    scale = max((high - low) / np.float32(spec.qmax - spec.qmin), np.float32(SMALLEST_SCALE))
    zero_point = np.clip(spec.qmin - np.rint(low / scale), spec.qmin, spec.qmax)
    assert q.scale.item() == scale
    assert q.zero_point.item() == zero_point


@given(ranges, symmetric_specs)
def test_symmetric_is_the_equation(ends: list[float], spec: QSpec) -> None:
    spec = dataclasses.replace(spec, power_of_two=False)
    q = choose(*ends, spec)
    largest = np.float32(max(-ends[0], ends[1], 0.0))
    steps = spec.qmax if spec.signed else (spec.qmax - 1) // 2
    assert q.scale.item() == max(largest / np.float32(steps), np.float32(SMALLEST_SCALE))
    assert q.zero_point.item() == (0 if spec.signed else 2 ** (spec.bits - 1))


@given(ranges, symmetric_specs, st.lists(st.floats(-1, 1), min_size=1, max_size=8))
def test_symmetric_codes_change_sign_with_the_value(ends: list[float], spec: QSpec, where: list[float]) -> None:
    q = choose(*ends, spec)
    largest = max(-ends[0], ends[1], 0.0)
    x = torch.tensor([*where, 1.0, -1.0]) * largest  # the ends of the range included: both are a code
    plus, minus = (quantize(v, q).long() - q.zero_point for v in (x, -x))
    assert torch.equal(plus, -minus)


@given(st.floats(2.0**-80, 2.0**90, width=32), st.integers(2, 16))  # the scale stays above SMALLEST_SCALE
def test_the_ends_of_a_symmetric_range_are_the_end_codes(largest: float, bits: int) -> None:
    q = choose(-largest, largest / 2, QSpec(bits=bits, symmetric=True, narrow=True))
    assert quantize(torch.tensor([-largest, largest]), q).tolist() == [q.qmin, q.qmax]


@given(ranges, specs())
def test_a_power_of_two_grid_is_the_smallest_that_covers_the_plain_one(ends: list[float], spec: QSpec) -> None:
    plain = choose(*ends, dataclasses.replace(spec, power_of_two=False)).scale.item()
    scale = choose(*ends, dataclasses.replace(spec, power_of_two=True)).scale.item()
    assert math.frexp(scale)[0] == 0.5
    assert scale / 2 < plain <= scale


@pytest.mark.parametrize("exponent", range(-149, 128))
def test_next_power_of_two_is_exact_for_every_exponent(exponent: int) -> None:
    power = 2.0**exponent
    tensor = torch.tensor(power)
    assert next_power_of_two(tensor).item() == power
    if exponent > -148:  # below 2**-148 lies 2**-149, itself a power
        assert next_power_of_two(torch.nextafter(tensor, torch.tensor(0.0))).item() == power
    if exponent < 127:
        assert next_power_of_two(torch.nextafter(tensor, torch.tensor(math.inf))).item() == 2 * power


@given(st.lists(st.floats(2.0**-140, 2.0**126, width=32), min_size=1, max_size=10))
def test_next_power_of_two_is_the_smallest_not_below(values: list[float]) -> None:
    for value, power in zip(values, next_power_of_two(torch.tensor(values)).tolist(), strict=True):
        assert math.frexp(power)[0] == 0.5
        assert exact(power) / 2 < exact(value) <= exact(power)


@given(st.lists(ranges, min_size=1, max_size=6), specs())
def test_channels_do_not_know_of_each_other(ends: list[list[float]], spec: QSpec) -> None:
    low, high = torch.tensor(ends).T
    q = choose_qparams(low, high, dataclasses.replace(spec, axis=0))
    alone = [choose(*pair, spec) for pair in ends]
    assert q.axis == 0
    assert same_bits(q.scale, torch.stack([a.scale for a in alone]))
    assert same_bits(q.zero_point, torch.stack([a.zero_point for a in alone]))


@pytest.mark.parametrize(
    "spec", [QSpec(), QSpec(symmetric=True), QSpec(signed=False), QSpec(power_of_two=True)], ids=str
)
@pytest.mark.parametrize(("low", "high"), [(0.0, 0.0), (3.0, 7.0), (-7.0, -3.0), (5.0, 5.0), (-1e-40, 1e-40)])
def test_one_sided_and_empty_ranges_reach_to_zero(low: float, high: float, spec: QSpec) -> None:
    q = choose(low, high, spec)
    same = choose(min(low, 0.0), max(high, 0.0), spec)
    assert same_bits(q.scale, same.scale) and same_bits(q.zero_point, same.zero_point)
    q.check("grid")
    assert fake_quantize(torch.tensor(0.0), q).item() == 0.0


@pytest.mark.parametrize(
    ("low", "high", "zero_point"),
    [(-3.0, 0.0, INT32_MAX), (0.0, 3.0, INT32_MIN), (-1.0, 1.0, 0)],
)
def test_zero_point_of_a_32_bit_range_does_not_wrap(low: float, high: float, zero_point: int) -> None:
    q = choose(low, high, QSpec(bits=32))
    q.check("grid")
    assert q.zero_point.item() == zero_point


@pytest.mark.parametrize(
    ("low", "high"), [(math.nan, 1.0), (-1.0, math.nan), (-math.inf, 1.0), (0.0, math.inf), (-3e38, 3e38)]
)
@pytest.mark.parametrize("power_of_two", [False, True])
def test_a_range_without_a_grid_is_found_by_check(low: float, high: float, power_of_two: bool) -> None:
    q = choose(low, high, QSpec(power_of_two=power_of_two))
    with pytest.raises(NumericsError, match=r"conv1: a scale is (nan|inf)"):
        q.check("conv1")


def test_the_grid_is_not_a_view_of_the_observer() -> None:
    for bits, symmetric, power in itertools.product([4, 8], [True, False], [True, False]):
        low, high = torch.tensor(-1.0), torch.tensor(127.0)
        q = choose_qparams(low, high, QSpec(bits=bits, symmetric=symmetric, power_of_two=power))
        before = q.scale.item(), q.zero_point.item()
        low.fill_(-50.0), high.fill_(3.0)
        assert (q.scale.item(), q.zero_point.item()) == before


@given(ranges)
def test_observed_ends_are_not_changed(ends: list[float]) -> None:
    assume(ends[0] > 0 or ends[1] < 0)
    low, high = torch.tensor(ends).unbind()
    choose_qparams(low, high, QSpec())
    assert torch.stack([low, high]).tolist() == ends

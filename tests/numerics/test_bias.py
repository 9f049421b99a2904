"""The bias on the accumulator's grid: scale, codes, recovery by a runtime's own rounding, floor and accumulator bound.

References: rational arithmetic (fractions) for what one code is, numpy for many, brute force over inputs for the bound.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qbench.graph.qdq import quantized_decomposed
from qbench.numerics.bias import (
    RECOVERABLE_CODE,
    accumulator_bound,
    bias_codes,
    bias_scale,
    code_limit,
    dequantize_bias,
    fits_accumulator,
    own_bias_scale,
    round_bias,
    weight_scale_floor,
)

from .support import INT32_MAX, INT32_MIN, exact, finite_floats, generator, same_bits, vectors

widths = st.integers(8, 32)
# Products of two of these, and a bias over such a product, stay among float32's normal numbers.
ordinary_scales = st.floats(2.0**-30, 2.0**20, width=32)
biases = st.floats(-(2.0**40), 2.0**40, width=32)


def f32(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float32)


def ends(bits: int, symmetric: bool) -> tuple[int, int]:
    high = 2 ** (bits - 1) - 1
    return (-high if symmetric else -high - 1), high


# scale ----------------------------------------------------------------------------------------------------------------


@given(ordinary_scales, st.lists(ordinary_scales, min_size=1, max_size=5))
def test_scale_is_the_rounded_product(input_scale: float, weight_scale: list[float]) -> None:
    scale = bias_scale(f32(input_scale), torch.tensor(weight_scale))
    assert scale.dtype == torch.float32
    assert scale.tolist() == [np.float32(input_scale) * np.float32(s) for s in weight_scale]
    # a product of two 24-bit mantissas is exact in float64, so one rounding is left
    assert scale.tolist() == [np.float32(input_scale * s) for s in weight_scale]


def test_scale_of_other_float_types_is_float32() -> None:
    s_in, s_w = torch.tensor(0.1, dtype=torch.float64), torch.tensor([0.3, 0.7], dtype=torch.bfloat16)
    assert same_bits(bias_scale(s_in, s_w), s_in.float() * s_w.float())


# codes ----------------------------------------------------------------------------------------------------------------


@given(st.integers(-RECOVERABLE_CODE, RECOVERABLE_CODE), st.floats(-0.5, 0.5, width=32), ordinary_scales, st.booleans())
def test_code_is_the_exact_quotient_rounded_to_even(steps: int, part: float, scale: float, tie: bool) -> None:
    """Up to 2²² codes float64 decides as rational numbers do: bias and scale are 24 bits wide, so a quotient that is
    not a tie is further from it than float64's rounding."""
    bias = f32((steps + (0.5 if tie else part)) * scale)
    codes, saturated = bias_codes(bias.reshape(1), f32(scale))
    assert codes.dtype == torch.int64
    assert codes.item() == round(exact(bias.item()) / exact(scale))  # round() of a Fraction is half to even
    assert not saturated.item()


@given(vectors(finite_floats), st.floats(2.0**-126, 2.0**100, width=32), widths, st.booleans())
def test_codes_are_float64_division_then_saturation(bias: Tensor, scale: float, bits: int, symmetric: bool) -> None:
    codes, saturated = bias_codes(bias, f32(scale), bits, symmetric=symmetric)
    low, high = ends(bits, symmetric)
    rounded = [round(Fraction(b / scale)) for b in bias.tolist()]  # Python's division is float64's
    assert codes.tolist() == [min(max(code, low), high) for code in rounded]
    assert saturated.tolist() == [not low <= code <= high for code in rounded]


def test_codes_of_many_channels() -> None:
    random = generator(3)
    bias = random.normal(0, 1, 100_000).astype(np.float32)
    scale = np.exp2(random.uniform(-28, -3, 100_000)).astype(np.float32)
    codes, saturated = bias_codes(torch.from_numpy(bias), torch.from_numpy(scale))
    expected = np.rint(bias.astype(np.float64) / scale.astype(np.float64))
    assert np.array_equal(codes.numpy(), expected.astype(np.int64))
    assert not saturated.any()
    assert np.array_equal(round_bias(torch.from_numpy(bias), torch.from_numpy(scale)).numpy(), expected)


@pytest.mark.parametrize("odd", range(1, 200, 2))
def test_exact_ties_go_to_the_even_code(odd: int) -> None:
    """(k + ½)·s is a float where s has few bits. Multiplying by 1/s, even in float64, misses some of these ties."""
    steps = torch.arange(-5000, 5000, dtype=torch.float64) + 0.5
    scale = odd * 2.0**-20
    bias = (steps * scale).float()
    assert torch.equal(bias.double() / scale, steps)
    codes, _ = bias_codes(bias, f32(scale))
    assert torch.equal(codes, 2 * torch.round(steps / 2).long())
    assert (codes % 2 == 0).all()


def test_float32_division_would_give_other_codes() -> None:
    """Why the codes are computed in float64."""
    bias, scale = torch.randn(100_000) * 300, f32(3e-5)
    assert (bias_codes(bias, scale)[0] != torch.round(bias / scale).long()).any()


@pytest.mark.parametrize("bits", range(8, 33))
@pytest.mark.parametrize("symmetric", [False, True])
def test_saturation_at_the_ends(bits: int, symmetric: bool) -> None:
    low, high = ends(bits, symmetric)
    table = [
        (high, high, False),
        (high + 0.4, high, False),
        (high + 0.5, high, True),  # the tie goes up to the even 2^(bits−1)
        (high + 1, high, True),
        (1e300, high, True),
        (low, low, False),
        (low - 0.4, low, False),
        (low - 0.5, low, symmetric),  # the tie goes to the even −2^(bits−1), which only a symmetric range leaves out
        (low - 1, low, True),
        (-1e300, low, True),
        (0.0, 0, False),
    ]
    bias, codes, saturated = zip(*table, strict=True)
    found = bias_codes(torch.tensor(bias, dtype=torch.float64), f32(1.0), bits, symmetric=symmetric)
    assert found[0].tolist() == list(codes)
    assert found[1].tolist() == list(saturated)


def test_a_bias_beyond_int32_keeps_its_sign() -> None:
    codes, saturated = bias_codes(torch.tensor([1.0, -1.0]), f32(1e-12))
    assert codes.tolist() == [INT32_MAX, INT32_MIN]
    assert saturated.all()


def test_nan_and_infinity_are_reported() -> None:
    bias = torch.tensor([math.nan, math.inf, -math.inf, 1.0])
    codes, saturated = bias_codes(bias, f32(0.5), 16)
    assert codes.tolist() == [0, 2**15 - 1, -(2**15), 2]
    assert saturated.tolist() == [True, True, True, False]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types(dtype: torch.dtype) -> None:
    bias = torch.randn(1000, dtype=torch.float64).to(dtype)
    codes, _ = bias_codes(bias, f32(1e-3))
    expected = np.rint(bias.double().numpy() / np.float64(np.float32(1e-3)))
    assert np.array_equal(codes.numpy(), expected.astype(np.int64))


# there and back -------------------------------------------------------------------------------------------------------


def test_dequantize_is_the_operator() -> None:
    random = generator(1)
    codes = torch.from_numpy(random.integers(INT32_MIN, INT32_MAX, 50_000, endpoint=True))
    scale = torch.from_numpy(np.exp2(random.uniform(-40, 10, 50_000)).astype(np.float32))
    real = dequantize_bias(codes, scale)
    assert np.array_equal(real.numpy(), codes.numpy().astype(np.float32) * scale.numpy())
    zero_points = torch.zeros(50_000, dtype=torch.int64)
    operator = quantized_decomposed().dequantize_per_channel
    assert same_bits(real, operator(codes.int(), scale, zero_points, 0, INT32_MIN, INT32_MAX, torch.int32))


Rule = Callable[[np.ndarray, np.ndarray], np.ndarray]
RECOVERY_RULES: dict[str, Rule] = {
    "rne(b * f32(1/s))": lambda bias, scale: np.rint(bias * (np.float32(1) / scale)),
    "rne(f32(b / s))": lambda bias, scale: np.rint(bias / scale),
    "half away from zero, b * f32(1/s)": lambda bias, scale: np.copysign(
        np.floor(np.abs(bias * (np.float32(1) / scale)) + np.float32(0.5)), bias
    ),
    "bias_codes": lambda bias, scale: bias_codes(torch.from_numpy(bias), torch.from_numpy(scale))[0].numpy(),
}
by_rule = pytest.mark.parametrize("rule", RECOVERY_RULES.values(), ids=RECOVERY_RULES)


def lost_codes(codes: np.ndarray, scale: np.ndarray, rule: Rule) -> int:
    """How many codes do not come back from the float bias that was made of them."""
    bias = dequantize_bias(torch.from_numpy(codes), torch.from_numpy(scale)).numpy()
    assert bias.dtype == np.float32
    return int((rule(bias, scale) != codes).sum())


def random_scales(count: int) -> np.ndarray:
    return np.exp2(generator(count).uniform(-60, 20, count)).astype(np.float32)


@by_rule
def test_no_code_up_to_the_limit_is_lost_at_random_scales(rule: Rule) -> None:
    count = 1_500_000
    codes = generator(0).integers(-RECOVERABLE_CODE, RECOVERABLE_CODE, count, endpoint=True)
    assert lost_codes(codes, random_scales(count), rule) == 0


# 2/3: the reciprocal is as far from a float as it gets; the largest and smallest mantissas; an ordinary scale
@by_rule
@pytest.mark.parametrize("scale", [2 / 3, 1.9999999, 1.0000001, 3.1e-5])
def test_no_code_of_the_last_octave_is_lost(scale: float, rule: Rule) -> None:
    """Every code of (2²¹, 2²²], where the rounding of the bias is largest."""
    codes = np.arange(RECOVERABLE_CODE // 2, RECOVERABLE_CODE + 1)
    assert lost_codes(codes, np.full(codes.shape, scale, dtype=np.float32), rule) == 0


@pytest.mark.parametrize("rule", [*RECOVERY_RULES.values()][:3], ids=[*RECOVERY_RULES][:3])
def test_codes_beyond_twice_the_limit_are_lost(rule: Rule) -> None:
    """What the limit is for."""
    count = 200_000
    codes = generator(0).integers(2 * RECOVERABLE_CODE, 4 * RECOVERABLE_CODE, count)
    assert lost_codes(codes, random_scales(count), rule) > count / 100


@pytest.mark.parametrize(
    ("bits", "limit"),
    [(8, 127), (12, 2047), (16, 32767), (23, 2**22 - 1), (24, 2**22), (32, 2**22)],
)
def test_code_limit(bits: int, limit: int) -> None:
    assert code_limit(bits) == limit


# a grid of its own ----------------------------------------------------------------------------------------------------


@given(vectors(finite_floats), widths, st.booleans())
def test_own_scale_holds_the_largest_bias(bias: Tensor, bits: int, power_of_two: bool) -> None:
    scale = own_bias_scale(bias, bits, power_of_two=power_of_two)
    assert (scale.shape, scale.dtype) == ((), torch.float32)
    assert scale.item() > 0
    codes, saturated = bias_codes(bias, scale, bits, symmetric=True)
    assert not saturated.any()
    assert codes.abs().max() <= code_limit(bits)


@given(vectors(st.floats(-(2.0**100), 2.0**100, width=32)), widths)
def test_own_scale_wastes_no_code(bias: Tensor, bits: int) -> None:
    largest = exact(bias.abs().max().item())
    scale = exact(own_bias_scale(bias, bits).item())
    power = exact(own_bias_scale(bias, bits, power_of_two=True).item())
    if largest == 0:
        assert (scale, power) == (1, 1)
    elif largest >= 2.0**-60:
        assert scale <= largest / code_limit(bits) * (1 + Fraction(1, 2**22))
        assert bias_codes(bias, f32(float(scale)), bits)[0].abs().max() == code_limit(bits)
        assert math.frexp(power)[0] == 0.5
        assert power / 2 < scale <= power


@pytest.mark.parametrize("bits", [8, 16, 32])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_own_scale_of_a_bias_that_is_almost_zero(bits: int, power_of_two: bool) -> None:
    """The quotient underflows: a scale of zero would make every code infinite."""
    for value in (1e-45, 1e-40, 1e-38):
        scale = own_bias_scale(torch.tensor([value, 0.0]), bits, power_of_two=power_of_two)
        assert math.isfinite(1.0 / scale.item())
        assert bias_codes(torch.tensor([value, 0.0]), scale, bits)[0].tolist() == [0, 0]


def test_own_scale_does_not_track_gradients() -> None:
    assert not own_bias_scale(torch.ones(3, requires_grad=True), 8).requires_grad


# the floor of the weight scale ----------------------------------------------------------------------------------------


@given(st.lists(biases, min_size=1, max_size=6), ordinary_scales, widths)
def test_at_the_floor_the_code_fits(values: list[float], input_scale: float, bits: int) -> None:
    bias, s_in = torch.tensor(values), f32(input_scale)
    floor = weight_scale_floor(bias, s_in, bits)
    assert (floor.shape, floor.dtype) == (bias.shape, torch.float32)
    assert torch.equal(floor > 0, bias != 0)
    used = bias_scale(s_in, floor)
    large = used >= 2.0**-126  # below, the product itself is not a normal float
    codes, saturated = bias_codes(bias[large], used[large], bits)
    assert not saturated.any()
    assert (codes.abs() <= code_limit(bits)).all()


@given(st.floats(2.0**-40, 2.0**40, width=32), ordinary_scales, widths)
def test_the_floor_is_no_higher_than_it_must_be(bias: float, input_scale: float, bits: int) -> None:
    floor = exact(weight_scale_floor(f32(-bias).reshape(1), f32(input_scale), bits).item())
    needed = exact(bias) / (code_limit(bits) * exact(input_scale))
    assert needed <= floor <= needed * (1 + Fraction(1, 2**22))


def test_the_floor_of_many_channels() -> None:
    random = generator(5)
    bias = torch.from_numpy(random.normal(0, 1, 200_000).astype(np.float32))
    s_in = torch.from_numpy(np.exp2(random.uniform(-12, 2, 200_000)).astype(np.float32))
    for bits in (8, 16, 24, 32):
        scale = bias_scale(s_in, weight_scale_floor(bias, s_in, bits))
        codes, saturated = bias_codes(bias[bias != 0], scale[bias != 0], bits)
        assert codes.abs().max() == code_limit(bits)
        assert not saturated.any()


@pytest.mark.parametrize(("bits", "floor"), [(8, 1 / 127 / 0.02), (12, 1 / 2047 / 0.02), (32, 1 / 2**22 / 0.02)])
def test_what_a_narrow_bias_costs(bits: int, floor: float) -> None:
    """Bias 1 at an input scale of 0.02: 0.39 with 8 bits and 0.024 with 12, where a weight scale is about 8e-4."""
    found = weight_scale_floor(torch.tensor([1.0, -1.0, 0.0]), f32(0.02), bits)
    assert found.tolist() == pytest.approx([floor, floor, 0.0], rel=1e-6)


# the accumulator ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 8), (2, 2, 4), (3, 1, 3, 3), (2, 2, 1, 2, 2)])
@pytest.mark.parametrize(("qmin", "qmax", "zero_point"), [(-128, 127, 0), (-128, 127, -128), (0, 255, 7), (-8, 7, 3)])
def test_bound_holds_for_every_corner_of_the_inputs(
    shape: tuple[int, ...], qmin: int, qmax: int, zero_point: int
) -> None:
    """The accumulator is linear in each input code, so its extremes lie at corners: all 2ⁿ of them are tried."""
    random = generator(len(shape))
    weight = random.integers(-127, 127, shape, endpoint=True)
    bias = random.integers(-(2**20), 2**20, shape[0])
    taps = int(np.prod(shape[1:]))
    corners = np.array(list(itertools.product([qmin - zero_point, qmax - zero_point], repeat=taps)))
    accumulators = corners @ weight.reshape(shape[0], taps).T + bias
    largest_input = max(zero_point - qmin, qmax - zero_point)
    bound = accumulator_bound(torch.from_numpy(weight).to(torch.int8), torch.from_numpy(bias), largest_input)
    assert bound.dtype == torch.int64
    assert (np.abs(accumulators).max(0) <= bound.numpy()).all()
    # and it is reached, once inputs of both signs are allowed
    both = np.array(list(itertools.product([-largest_input, largest_input], repeat=taps)))
    reached = np.abs(both @ weight.reshape(shape[0], taps).T + bias).max(0)
    assert np.array_equal(reached, bound.numpy())


CONVOLUTIONS: list[tuple[str, tuple[int, ...], int, Callable[[Tensor, Tensor], Tensor]]] = [
    ("linear", (4, 6), 0, F.linear),
    ("conv1d", (4, 3, 3), 0, F.conv1d),
    ("conv2d", (4, 3, 3, 3), 0, F.conv2d),
    ("conv2d, groups", (4, 2, 3, 3), 0, lambda x, w: F.conv2d(x, w, groups=2)),
    ("conv2d, depthwise", (4, 1, 3, 3), 0, lambda x, w: F.conv2d(x, w, groups=4)),
    ("conv3d", (2, 2, 2, 2, 2), 0, F.conv3d),
    ("conv_transpose2d", (3, 4, 3, 3), 1, F.conv_transpose2d),
]


@pytest.mark.parametrize(("name", "shape", "axis", "op"), CONVOLUTIONS, ids=[row[0] for row in CONVOLUTIONS])
def test_bound_is_the_extreme_of_the_layer(
    name: str, shape: tuple[int, ...], axis: int, op: Callable[[Tensor, Tensor], Tensor]
) -> None:
    """With float64 as exact integers: the steepest input of a channel reaches the bound, random ones do not pass it."""
    weight = torch.randint(-127, 128, shape)
    bias = torch.randint(-(2**20), 2**20, (shape[axis],))
    groups = {"conv2d, groups": 2, "conv2d, depthwise": 4}.get(name, 1)
    channels = shape[0] if axis == 1 else shape[1] * groups
    bound = accumulator_bound(weight, bias, 255, axis)
    assert bound.shape == bias.shape
    size = (channels, *shape[2:])

    def extremes(x: Tensor) -> Tensor:
        y = op(x.double(), weight.double()).long()
        return (y.transpose(0, 1).flatten(1) + bias[:, None]).abs().amax(1)

    assert (extremes(torch.randint(-255, 256, (50, *size))) <= bound).all()
    for out in range(shape[axis]):
        taps = weight.select(axis, out)
        if axis == 0 and groups > 1:
            first = out // (shape[0] // groups) * shape[1]
            steepest = torch.zeros(size, dtype=torch.long)
            steepest[first : first + shape[1]] = taps.sign()
        else:
            # in a transposed convolution the output at the far corner of one kernel meets the kernel reversed
            steepest = taps.sign() if axis == 0 else taps.sign().flip(*range(1, taps.ndim))
        sign = 1 if bias[out] >= 0 else -1
        assert extremes(sign * 255 * steepest[None])[out] == bound[out]


def test_bound_does_not_wrap_in_the_dtype_of_the_codes() -> None:
    weight = torch.full((1, 1000), -128, dtype=torch.int8)  # |−128| is not an int8
    assert accumulator_bound(weight, torch.tensor([-(2**31)]), 255).item() == 2**31 + 128 * 255 * 1000


def test_bound_takes_one_input_range_per_channel() -> None:
    weight = torch.ones(2, 3, dtype=torch.int8)
    assert accumulator_bound(weight, torch.tensor([0, 1]), torch.tensor([10, 20])).tolist() == [30, 61]


@pytest.mark.parametrize("bits", [16, 24, 32])
def test_fits_accumulator_at_the_edge(bits: int) -> None:
    edge = 2 ** (bits - 1)
    assert fits_accumulator(torch.tensor([0, edge - 1, edge, 2**40]), bits).tolist() == [True, True, False, False]


# wider than int32 -----------------------------------------------------------------------------------------------------

wide_widths = st.integers(33, 64)


@given(biases, ordinary_scales, wide_widths)
def test_a_wide_code_and_its_value_determine_each_other(bias: float, scale: float, bits: int) -> None:
    codes, saturated = bias_codes(f32(bias)[None], f32(scale)[None], bits)
    value = dequantize_bias(codes, f32(scale)[None], bits)
    assert value.dtype == torch.float32
    exact_code = round(Fraction(np.float32(bias).item()) / Fraction(np.float32(scale).item()))
    high = min(2 ** (bits - 1) - 1, 2**53)
    if abs(exact_code) < high * (1 - 2.0**-22):
        assert not saturated
    elif abs(exact_code) > high * (1 + 2.0**-22):
        assert saturated and abs(int(codes)) in (high, high + 1) and (int(codes) > 0) is (bias > 0)
    if not saturated:
        again, _ = bias_codes(value, f32(scale)[None], bits)
        assert torch.equal(again, codes)
        assert same_bits(dequantize_bias(again, f32(scale)[None], bits), value)
        # The value is a float32, so the code is off by what float32 cannot hold, and by nothing below 2^23.
        assert abs(int(codes) - exact_code) <= (0 if abs(exact_code) < 2**23 else abs(exact_code) * 2.0**-23)


@pytest.mark.parametrize("bits", [33, 40, 53, 54, 55, 63, 64])
@pytest.mark.parametrize("bias", [1e30, -1e30, math.inf, -math.inf])
def test_wide_codes_saturate_and_keep_their_sign(bits: int, bias: float) -> None:
    codes, saturated = bias_codes(torch.tensor([bias, 0.0]), torch.tensor([1e-6, 1e-6]), bits)
    assert saturated.tolist() == [True, False] and codes[1] == 0
    high = min(2 ** (bits - 1) - 1, 2**53)
    assert int(codes[0]) in ((high,) if bias > 0 else (-high, -high - 1))


@given(biases, ordinary_scales, wide_widths)
def test_the_floor_of_a_wide_bias_keeps_its_codes_inside(bias: float, input_scale: float, bits: int) -> None:
    floor = weight_scale_floor(f32(bias)[None], f32(input_scale), bits)
    scale = bias_scale(f32(input_scale), floor)
    if bias and float(scale) > 2.0**-120:
        codes, saturated = bias_codes(f32(bias)[None], scale, bits)
        assert not saturated and abs(int(codes)) <= code_limit(bits) * (1 + 2.0**-22)


def test_up_to_32_bits_nothing_changes() -> None:
    made = torch.Generator().manual_seed(5)
    bias, scale = torch.randn(20_000, generator=made) * 1e3, torch.rand(20_000, generator=made) * 1e-4 + 1e-6
    narrow, _ = bias_codes(bias, scale, 32)
    small = narrow.abs() < 2**22
    assert 1000 < int(small.sum()) < 20_000
    wide, _ = bias_codes(bias, scale, 64)
    assert torch.equal(wide[small], narrow[small])
    assert same_bits(dequantize_bias(wide, scale, 64)[small], dequantize_bias(narrow, scale)[small])


@pytest.mark.parametrize(("bits", "limit"), [(32, 2**22), (40, 2**39 - 1), (53, 2**52 - 1), (64, 2**52)])
def test_limit_of_wide_codes(bits: int, limit: int) -> None:
    assert code_limit(bits) == limit

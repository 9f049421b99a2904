"""quantize, dequantize, fake_quantize and inside_range against PyTorch's own operators, bit for bit."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qbench.errors import NumericsError
from qbench.graph.qdq import quantized_decomposed
from qbench.numerics.qparams import QParams, dequantize, fake_quantize, inside_range, quantize

from .support import (
    GRIDS,
    INT32,
    INT32_MAX,
    INT32_MIN,
    NARROW_GRIDS,
    SCALES,
    Grid,
    finite_floats,
    generator,
    same_bits,
    scales,
    values_on_and_between,
    vectors,
    without_negative_zero,
)

by_grid = pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.name)
by_narrow_grid = pytest.mark.parametrize("grid", NARROW_GRIDS, ids=lambda grid: grid.name)
by_scale = pytest.mark.parametrize("scale", SCALES)

# Where the operators' float32 clamp stays inside int32: the largest float32 below 2**31.
LARGEST_FLOAT_CODE = 2.0**31 - 128


def decomposed_quantize(x: Tensor, q: QParams) -> Tensor:
    ops = quantized_decomposed()
    if q.axis is None:
        return ops.quantize_per_tensor(x, q.scale.item(), q.zero_point.item(), q.qmin, q.qmax, q.dtype)
    return ops.quantize_per_channel(x, q.scale, q.zero_point.long(), q.axis, q.qmin, q.qmax, q.dtype)


def decomposed_dequantize(codes: Tensor, q: QParams) -> Tensor:
    ops = quantized_decomposed()
    if q.axis is None:
        return ops.dequantize_per_tensor(codes, q.scale.item(), q.zero_point.item(), q.qmin, q.qmax, codes.dtype)
    return ops.dequantize_per_channel(codes, q.scale, q.zero_point.long(), q.axis, q.qmin, q.qmax, codes.dtype)


def without_overflow(x: Tensor, q: QParams) -> Tensor:
    """The values whose code does not overflow when the operators clamp it in float32 to an int32 range."""
    if q.qmax < 2**24:
        return x
    return x[torch.round(x * (1.0 / q.scale)) + q.zero_point <= LARGEST_FLOAT_CODE]


def channel_qparams(grid: Grid, channels: int, axis: int) -> QParams:
    random = generator(channels)
    scale = torch.from_numpy(np.exp2(random.uniform(-30, 10, channels)).astype(np.float32))
    zero_point = random.integers(max(grid.qmin, -(2**20)), min(grid.qmax, 2**20), channels, endpoint=True)
    zero_point = np.zeros(channels) if grid is INT32 else zero_point
    return QParams(scale, torch.from_numpy(zero_point.astype(np.int32)), grid.qmin, grid.qmax, axis)


def channel_values(q: QParams, shape: tuple[int, ...]) -> Tensor:
    """Half of them ties, most inside the range, some beyond it."""
    random = generator(len(shape))
    reach = min(q.qmax - q.qmin, 2**23)
    steps = torch.from_numpy(random.integers(-reach, reach, shape) / 2).float()
    sizes = [1] * len(shape)
    sizes[q.axis or 0] = -1
    return steps * q.scale.reshape(sizes)


@by_grid
@by_scale
@pytest.mark.parametrize("use_zero_point", [False, True])
def test_quantize_per_tensor_is_the_operator(grid: Grid, scale: float, use_zero_point: bool) -> None:
    q = grid.qparams(scale, grid.zero_point if use_zero_point else max(grid.qmin, 0))
    x = without_overflow(values_on_and_between(scale, grid), q)
    assert x.numel() > 4000
    codes = quantize(x, q)
    assert codes.dtype == grid.dtype
    assert same_bits(codes, decomposed_quantize(x, q))
    assert codes.unique().numel() > min(grid.qmax - grid.qmin, 1000) * 0.9  # the values reach the whole range


@by_grid
@by_scale
def test_dequantize_per_tensor_is_the_operator(grid: Grid, scale: float) -> None:
    q = grid.qparams(scale, grid.zero_point)
    random = generator(7)
    codes = torch.from_numpy(random.integers(grid.qmin, grid.qmax, 4000, endpoint=True)).to(grid.dtype)
    real = dequantize(codes, q)
    assert real.dtype == torch.float32
    assert same_bits(real, decomposed_dequantize(codes, q))


@by_grid
@pytest.mark.parametrize(("shape", "axis"), [((5,), 0), ((5, 40, 7), 0), ((6, 5, 31), 1), ((2, 31, 4, 5), 3)])
def test_per_channel_is_the_operator(grid: Grid, shape: tuple[int, ...], axis: int) -> None:
    q = channel_qparams(grid, 5, axis)
    x = channel_values(q, shape)
    codes = quantize(x, q)
    assert same_bits(codes, decomposed_quantize(x, q))
    assert same_bits(dequantize(codes, q), decomposed_dequantize(codes, q))
    back = QParams(q.scale, q.zero_point, q.qmin, q.qmax, axis - len(shape))
    assert same_bits(quantize(x, back), codes)  # an axis may be counted from the end
    assert same_bits(dequantize(codes, back), dequantize(codes, q))


@given(data=st.data(), scale=scales, grid=st.sampled_from(GRIDS))
def test_quantize_and_dequantize_are_the_operators(data: st.DataObject, scale: float, grid: Grid) -> None:
    zero_point = data.draw(st.integers(grid.qmin, grid.qmax))
    q = grid.qparams(scale, zero_point)
    near = st.integers(-(2**17), 2**17).map(lambda half_steps: float(np.float32(half_steps * scale / 2)))
    x = data.draw(vectors(st.one_of(near, finite_floats)))
    x = without_overflow(x, q)
    codes = quantize(x, q)
    assert same_bits(codes, decomposed_quantize(x, q))
    assert same_bits(dequantize(codes, q), decomposed_dequantize(codes, q))


@by_grid
@by_scale
def test_quantize_is_the_equation(grid: Grid, scale: float) -> None:
    """The same in numpy, so that the agreement above is not two copies of one mistake."""
    q = grid.qparams(scale, grid.zero_point)
    x = values_on_and_between(scale, grid)
    inverse = np.float32(1) / np.float32(scale)
    with np.errstate(over="ignore", under="ignore"):
        shifted = np.rint(x.numpy() * inverse) + np.float32(grid.zero_point)
    expected = np.clip(shifted.astype(np.float64), grid.qmin, grid.qmax).astype(np.int64)
    assert np.array_equal(quantize(x, q).numpy().astype(np.int64), expected)


def test_multiplies_by_the_reciprocal() -> None:
    """Dividing by the scale is another function: it disagrees at ties, and the operators do not do it."""
    q = GRIDS[2].qparams(0.1, 0)
    x = (torch.arange(-1270, 1270, dtype=torch.float64) * 0.05).float()
    divided = torch.round(x / q.scale).clamp(-128, 127).to(torch.int8)
    assert (quantize(x, q) != divided).any()
    assert same_bits(quantize(x, q), decomposed_quantize(x, q))


@pytest.mark.parametrize(
    ("half_steps", "code"), [(1, 0), (3, 2), (5, 2), (7, 4), (-1, 0), (-3, -2), (-5, -2), (255, 127), (-255, -128)]
)
def test_ties_round_to_even_before_the_zero_point(half_steps: int, code: int) -> None:
    x = torch.tensor(half_steps * 0.25 / 2)
    assert quantize(x, GRIDS[2].qparams(0.25, 0)).item() == code
    # with an odd zero point the tie still goes to the even number of steps, not to the even code
    assert quantize(x, GRIDS[2].qparams(0.25, 1)).item() == min(code + 1, 127)


# values beyond int32 --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "code"),
    [
        (2.0**31, INT32_MAX),
        (3e9, INT32_MAX),
        (math.inf, INT32_MAX),
        (2.0**31 - 128, 2**31 - 128),
        (-(2.0**31), INT32_MIN),
        (-3e9, INT32_MIN),
        (-math.inf, INT32_MIN),
    ],
)
def test_int32_saturates(x: float, code: int) -> None:
    assert quantize(torch.tensor([x]), INT32.qparams(1.0, 0)).tolist() == [code]


@pytest.mark.parametrize("bits", range(25, 33))
@pytest.mark.parametrize("lowest", [0, 1])
def test_a_range_that_float32_cannot_hold_saturates_at_its_own_ends(bits: int, lowest: int) -> None:
    qmin, qmax = -(2 ** (bits - 1)) + lowest, 2 ** (bits - 1) - 1
    q = QParams(torch.tensor(1.0), torch.tensor(0, dtype=torch.int32), qmin, qmax)
    codes = quantize(torch.tensor([-1e30, -(2.0 ** (bits - 1)), 2.0 ** (bits - 1), 1e30]), q)
    assert codes.tolist() == [qmin, qmin, qmax, qmax]


@by_grid
def test_nan_becomes_the_lowest_code_and_infinities_the_ends(grid: Grid) -> None:
    q = grid.qparams(0.5, grid.zero_point)
    codes = quantize(torch.tensor([math.nan, -math.nan, math.inf, -math.inf]), q)
    assert codes.tolist() == [grid.qmin, grid.qmin, grid.qmax, grid.qmin]


@by_grid
def test_both_zeros_have_the_zero_point_as_code(grid: Grid) -> None:
    q = grid.qparams(0.1, grid.zero_point)
    codes = quantize(torch.tensor([0.0, -0.0]), q)
    assert codes.tolist() == [grid.zero_point, grid.zero_point]
    assert same_bits(dequantize(codes, q), torch.zeros(2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_input_is_quantized_in_float32(dtype: torch.dtype) -> None:
    q = GRIDS[2].qparams(0.0371, 5)
    x = torch.randn(2000).to(dtype)
    assert same_bits(quantize(x, q), quantize(x.float(), q))
    assert same_bits(quantize(x, q), decomposed_quantize(x, q))


# there and back -------------------------------------------------------------------------------------------------------


@by_narrow_grid
@given(scale=scales, data=st.data())
def test_every_code_comes_back(grid: Grid, scale: float, data: st.DataObject) -> None:
    q = grid.qparams(scale, data.draw(st.integers(grid.qmin, grid.qmax)))
    codes = torch.arange(grid.qmin, grid.qmax + 1).to(grid.dtype)
    assert same_bits(quantize(dequantize(codes, q), q), codes)


@given(scale=scales, data=st.data(), grid=st.sampled_from(NARROW_GRIDS))
def test_fake_quantize_changes_nothing_the_second_time(scale: float, data: st.DataObject, grid: Grid) -> None:
    q = grid.qparams(scale, data.draw(st.integers(grid.qmin, grid.qmax)))
    once = fake_quantize(values_on_and_between(scale, grid, count=50), q)
    assert torch.equal(fake_quantize(once, q), once)


# fake_quantize --------------------------------------------------------------------------------------------------------


def torch_fake_quantize(x: Tensor, q: QParams) -> tuple[Tensor, Tensor]:
    """PyTorch's values and its mask of what is not clipped."""
    if q.axis is None:
        return torch.ops.aten.fake_quantize_per_tensor_affine_cachemask(
            x, q.scale.item(), q.zero_point.item(), q.qmin, q.qmax
        )
    return torch.ops.aten.fake_quantize_per_channel_affine_cachemask(x, q.scale, q.zero_point, q.axis, q.qmin, q.qmax)


def inside_int64(x: Tensor, q: QParams) -> Tensor:
    """PyTorch's kernel rounds into int64: beyond, its result is the processor's, not the equation's."""
    return x[(x * (1.0 / q.scale)).abs() < 2.0**62]


@by_narrow_grid
@by_scale
@pytest.mark.parametrize("use_zero_point", [False, True])
def test_fake_quantize_is_dequantize_of_quantize_and_torchs(grid: Grid, scale: float, use_zero_point: bool) -> None:
    q = grid.qparams(scale, grid.zero_point if use_zero_point else max(grid.qmin, 0))
    x = values_on_and_between(scale, grid)
    ours = fake_quantize(x, q)
    assert same_bits(without_negative_zero(ours), dequantize(quantize(x, q), q))
    x = inside_int64(x, q)
    values, mask = torch_fake_quantize(x, q)
    assert x.numel() > 4000
    assert same_bits(without_negative_zero(fake_quantize(x, q)), values)
    assert same_bits(inside_range(x, q), mask)
    assert 0 < mask.sum() < mask.numel()


@by_narrow_grid
@pytest.mark.parametrize(("shape", "axis"), [((5, 40, 7), 0), ((6, 5, 31), 1)])
def test_fake_quantize_per_channel(grid: Grid, shape: tuple[int, ...], axis: int) -> None:
    q = channel_qparams(grid, 5, axis)
    x = channel_values(q, shape)
    values, mask = torch_fake_quantize(x, q)
    ours = without_negative_zero(fake_quantize(x, q))
    assert same_bits(ours, values)
    assert same_bits(ours, dequantize(quantize(x, q), q))
    assert same_bits(inside_range(x, q), mask)


@given(data=st.data(), scale=scales, grid=st.sampled_from(NARROW_GRIDS))
def test_fake_quantize_is_dequantize_of_quantize(data: st.DataObject, scale: float, grid: Grid) -> None:
    q = grid.qparams(scale, data.draw(st.integers(grid.qmin, grid.qmax)))
    x = data.draw(vectors(finite_floats))
    assert same_bits(without_negative_zero(fake_quantize(x, q)), dequantize(quantize(x, q), q))
    codes = quantize(x, q).long()
    clipped = (codes == grid.qmin) | (codes == grid.qmax)
    assert (inside_range(x, q) | clipped).all()  # whatever is outside has an end code


@pytest.mark.parametrize("zero_point", [-(2**20), -5, 0, 5, 2**20])
def test_fake_quantize_of_a_32_bit_range(zero_point: int) -> None:
    """qmin − z does not fit into int32: the bounds must not wrap."""
    q = INT32.qparams(0.5, zero_point)
    x = torch.tensor([0.0, 1.0, -1.0, 1000.5, -1000.5, 1e12, -1e12])
    assert same_bits(without_negative_zero(fake_quantize(x, q)), dequantize(quantize(x, q), q))
    assert inside_range(x, q).tolist() == [True] * 5 + [False] * 2


def test_fake_quantize_keeps_nan_and_the_sign_of_zero() -> None:
    q = GRIDS[2].qparams(0.1, 0)
    out = fake_quantize(torch.tensor([math.nan, -0.01, -0.0, 0.01, math.inf, -math.inf]), q)
    assert out[0].isnan()
    assert same_bits(out[1:4], torch.tensor([-0.0, -0.0, 0.0]))
    assert torch.equal(out[4:], torch.tensor([127, -128]) * q.scale)
    assert not inside_range(torch.tensor([math.nan, math.inf]), q).any()


# QParams --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scale", "zero_point", "codes", "axis", "says"),
    [
        (torch.ones(3), torch.zeros(2), (-128, 127), 0, ["(3,)", "(2,)"]),
        (torch.ones(3), torch.zeros(3), (-128, 127), None, ["axis=None", "(3,)"]),
        (torch.ones(()), torch.zeros(()), (-128, 127), 1, ["axis=1", "()"]),
        (torch.ones(()), torch.zeros(()), (7, 7), None, ["7"]),
    ],
)
def test_qparams_that_contradict_themselves(
    scale: Tensor, zero_point: Tensor, codes: tuple[int, int], axis: int | None, says: list[str]
) -> None:
    with pytest.raises(NumericsError) as caught:
        QParams(scale, zero_point.int(), *codes, axis)
    assert all(part in str(caught.value) for part in says)


@pytest.mark.parametrize(
    ("scale", "zero_point", "says"),
    [
        ([1.0, math.nan], [0, 0], "nan"),
        ([1.0, math.inf], [0, 0], "inf"),
        ([0.0, 1.0], [0, 0], "0.0"),
        ([1.0, -0.25], [0, 0], "-0.25"),
        ([1.0, 1.0], [0, 128], "128"),
        ([1.0, 1.0], [-129, 0], "-129"),
    ],
)
def test_check_names_the_place_and_the_value(scale: list[float], zero_point: list[int], says: str) -> None:
    q = QParams(torch.tensor(scale), torch.tensor(zero_point, dtype=torch.int32), -128, 127, 0)
    with pytest.raises(NumericsError, match=r"^features\.0\.weight: ") as caught:
        q.check("features.0.weight")
    assert says in str(caught.value)


def test_check_accepts_a_good_grid() -> None:
    GRIDS[4].qparams(0.1, 255).check("input")
    QParams(torch.tensor([1e-30, 1e30]), torch.tensor([-128, 127]), -128, 127, 0).check("input")

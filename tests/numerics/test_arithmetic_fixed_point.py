"""TOSA's arithmetic against the specification's pseudo code in Python's integers, which never round or overflow.

Ratios are formed as ExecuTorch's Arm backend forms them: Python floats, `math.frexp`, `round`.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.exactness import cases
from qbench.errors import NumericsError
from qbench.numerics.arithmetic import Grid, Window
from qbench.numerics.arithmetic.fixed_point import ARITHMETIC, multiplier_and_shift


def constants(ratio: float) -> tuple[int, int]:
    """Multiplier and shift of a ratio."""
    mantissa, exponent = math.frexp(ratio)
    multiplier = round(mantissa * (1 << 31))
    if multiplier == 1 << 31:
        multiplier, exponent = multiplier // 2, exponent + 1
    shift = 31 - exponent
    if shift > 62:
        multiplier, shift = multiplier >> min(31, shift - 62), 62
    assert shift >= 2
    return multiplier, shift


def scaled(value: int, ratio: float) -> int:
    """apply_scale_32 with single rounding."""
    multiplier, shift = constants(ratio)
    return (value * multiplier + (1 << (shift - 1))) >> shift


def code(value: int, out: Grid) -> int:
    return min(max(value + out.zero_point, out.qmin), out.qmax)


def different(found: Tensor, expected: list[int]) -> int:
    return int((found.flatten().long() != torch.tensor(expected)).sum())


def sample(rng: np.random.Generator, count: int) -> tuple[Tensor, Tensor]:
    return cases.codes(rng, (count,)), cases.codes(rng, (count,))


@pytest.mark.parametrize("seed", range(20))
def test_requantize(seed: int) -> None:
    rng = cases.generator(seed, "requantize")
    out = cases.grid(rng)
    ratio = cases.scale_ratio(rng, -30, 6)
    s_in, s_w = cases.float32(2.0 ** rng.uniform(-10, 0)), cases.float32(out.scale * ratio)
    half = Fraction(out.scale) / (Fraction(s_in) * Fraction(s_w)) / 2
    near = [int(half * (2 * k + 1)) + d for k in range(-200, 200, 7) for d in (-1, 0, 1)]
    values = [v for v in [*near, *rng.integers(-(2**31), 2**31, 500).tolist()] if abs(v) < 2**31]
    scale = torch.tensor(s_in, dtype=torch.float64) * s_w
    found = ARITHMETIC.requantize(torch.tensor(values), scale, out)
    assert different(found, [code(scaled(v, s_in * s_w / out.scale), out) for v in values]) == 0


@pytest.mark.parametrize("op", ["add", "sub", "mul"])
@pytest.mark.parametrize("seed", range(8))
def test_two_inputs(op: str, seed: int) -> None:
    rng = cases.generator(seed, op)
    ga, gb, out = cases.binary_grids(rng, low=-28.0)
    if op == "mul":
        gb = gb._replace(scale=cases.float32(gb.scale / out.scale))
    a, b = sample(rng, 3000)
    common = 2 * max(ga.scale, gb.scale) / (1 << 20)
    expected = []
    for x, y in zip((a.long() - ga.zero_point).tolist(), (b.long() - gb.zero_point).tolist(), strict=True):
        if op == "mul":
            value = scaled(scaled(x, 1.0) * scaled(y, 1.0), ga.scale * gb.scale / out.scale)
        else:
            left, right = scaled(x, ga.scale / common), scaled(y, gb.scale / common)
            value = scaled(left + right if op == "add" else left - right, common / out.scale)
        expected.append(code(value, out))
    found = getattr(ARITHMETIC, op)(a, ga, b, gb, out)
    assert found.dtype == torch.int8 and different(found, expected) == 0


def test_two_inputs_broadcast() -> None:
    grid = Grid(0.5, 3, -128, 127)
    a, b = torch.arange(-4, 4, dtype=torch.int8).reshape(2, 1, 4), torch.arange(3, dtype=torch.int8).reshape(3, 1)
    for op in (ARITHMETIC.add, ARITHMETIC.sub, ARITHMETIC.mul):
        whole = op(a.expand(2, 3, 4), grid, b.expand(2, 3, 4), grid, grid)
        assert torch.equal(op(a, grid, b, grid, grid), whole) and whole.unique().numel() > 2


@pytest.mark.parametrize("seed", range(30))
def test_rescale_and_its_uint8_form(seed: int) -> None:
    rng = cases.generator(seed, "rescale")
    source, out = cases.unary_grids(rng)
    codes = cases.all_codes()
    expected = [code(scaled(c - source.zero_point, source.scale / out.scale), out) for c in codes.tolist()]
    found = ARITHMETIC.rescale(codes, source, out)
    assert different(found, expected) == 0
    stored = ARITHMETIC.rescale(
        (codes.int() + 128).to(torch.uint8), source.stored_as(torch.uint8), out.stored_as(torch.uint8)
    )
    assert torch.equal(stored.int() - 128, found.int())


def mean(values: list[int], grid: Grid, out: Grid) -> int:
    """AVG_POOL2D of codes on the grid of the input, then RESCALE."""
    zero = min(max(round(Fraction(grid.zero_point) / Fraction(grid.scale)) + grid.zero_point, -128), 127)
    bits = (len(values) - 1).bit_length()
    multiplier = (((1 << 30) + 1) << bits) // len(values)
    total = sum(value - zero for value in values) * multiplier
    pooled = min(max(((total + (1 << (29 + bits))) >> (30 + bits)) + zero, -128), 127)
    if (grid.scale, grid.zero_point) == (out.scale, out.zero_point):
        return pooled
    return code(scaled(pooled - grid.zero_point, grid.scale / out.scale), out)


WINDOWS = [
    Window((2, 2), (2, 2), (0, 0), False, True),
    Window((3, 3), (2, 2), (1, 1), False, True),
    Window((3, 3), (2, 2), (1, 1), False, False),
    Window((3, 2), (2, 3), (1, 0), True, True),
    Window((4, 4), (3, 3), (2, 2), True, False),
    Window((7, 9), (1, 1), (0, 0), False, True),
]


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("shared", [True, False])
def test_average_pool(window: Window, shared: bool) -> None:
    rng = cases.generator(7, "pool", str(window), str(shared))
    source, out = cases.unary_grids(rng, low=-2.0, high=2.0)
    out = source if shared else out
    codes = cases.codes(rng, (2, 3, 7, 9))
    found = ARITHMETIC.average_pool(codes, source, out, window)
    geometry = (window.kernel, window.stride, window.padding, window.ceil_mode, window.count_include_pad)
    assert found.shape == F.avg_pool2d(codes.float(), *geometry).shape
    expected = []
    for image in codes.flatten(0, 1).tolist():
        for row in range(found.shape[2]):
            for column in range(found.shape[3]):
                expected.append(mean(inside(image, row, column, window, source.zero_point), source, out))
    assert different(found, expected) == 0


def inside(image: list[list[int]], row: int, column: int, window: Window, zero: int) -> list[int]:
    """Codes of one window; padding that counts is the code of 0, up to the end of the padding."""
    (kh, kw), (sh, sw), (ph, pw) = window.kernel, window.stride, window.padding
    height, width = len(image), len(image[0])
    found = []
    for y in range(row * sh - ph, row * sh - ph + kh):
        for x in range(column * sw - pw, column * sw - pw + kw):
            if 0 <= y < height and 0 <= x < width:
                found.append(image[y][x])
            elif window.count_include_pad and y < height + ph and x < width + pw:
                found.append(zero)
    return found


@pytest.mark.parametrize("count", [1, 2, 4, 6, 9, 16, 49, 64, 100])
def test_global_average(count: int) -> None:
    rng = cases.generator(count, "global")
    for shared in (True, False):
        source, out = cases.unary_grids(rng, low=-2.0, high=2.0)
        out = source if shared else out
        codes = cases.codes(rng, (500, count))
        sums = (codes.long() - source.zero_point).sum(1)
        found = ARITHMETIC.global_average(sums, count, source, out)
        assert different(found, [mean(values, source, out) for values in codes.tolist()]) == 0


@pytest.mark.parametrize("seed", range(10))
def test_relu6_is_a_rescale_and_a_clamp(seed: int) -> None:
    rng = cases.generator(seed, "relu6")
    source, out = cases.grid(rng, of_scale=0.06), cases.grid(rng, of_scale=0.05)
    top = min(max(round(6.0 / 0.05) + out.zero_point, -128), 127)
    rescaled = ARITHMETIC.rescale(cases.all_codes(), source, out)
    expected = [min(max(value, out.zero_point), top) for value in rescaled.tolist()]
    assert different(ARITHMETIC.table("relu6", (), source, out), expected) == 0


def test_a_table_is_filled_in_float32_and_stays_inside_the_input_limits() -> None:
    source, out = Grid(0.05, 3, -100, 90), Grid(1 / 256, -128, -128, 127)
    found = ARITHMETIC.table("sigmoid", (), source, out)
    real = torch.sigmoid((torch.arange(-128, 128).clamp(-100, 90) - 3).float() * 0.05)
    expected = (torch.round(real * 256.0) - 128).clamp(-128, 127)
    assert different(found, expected.long().tolist()) == 0
    assert found[0] == found[28] and found[28] != found[40]


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [
        (1.0, (2**30, 30)),
        (0.5, (2**30, 31)),
        (1.0 - 2.0**-40, (2**30, 30)),
        (2.0**28, (2**30, 2)),
        (2.0**-32, (2**30, 62)),
        (2.0**-35, (2**27, 62)),
        (2.0**-80, (0, 62)),
    ],
)
def test_constants_at_the_edges(ratio: float, expected: tuple[int, int]) -> None:
    multiplier, shift = multiplier_and_shift(torch.tensor(ratio, dtype=torch.float64))
    assert (int(multiplier), int(shift)) == constants(ratio) == expected


def test_what_cannot_be_expressed_is_refused() -> None:
    with pytest.raises(NumericsError, match=r"RESCALE takes ratios below 2\*\*29"):
        multiplier_and_shift(torch.tensor([0.5, 2.0**29], dtype=torch.float64))
    grid = Grid(0.05, 3, -128, 127)
    with pytest.raises(NumericsError, match=r"divisor_override=3.*AvgPool2d without it"):
        ARITHMETIC.average_pool(torch.zeros(1, 1, 4, 4, dtype=torch.int8), grid, grid, WINDOWS[0]._replace(divisor=3))


def test_a_product_that_is_rounded_to_float32_gives_other_codes() -> None:
    """Why `requantize` takes the product of the scales in float64."""
    out = Grid(cases.float32(0.037), -5, -128, 127)
    product = torch.tensor(cases.float32(1.1e-5), dtype=torch.float64) * cases.float32(8e-4)
    half_way = (torch.arange(-120, 120) + 0.5) * (out.scale / float(product))
    acc = (half_way[:, None] + torch.arange(-50, 51)).long()
    exact = ARITHMETIC.requantize(acc, product, out)
    rounded = ARITHMETIC.requantize(acc, product.float(), out)
    assert exact.unique().numel() > 200 and 0 < int((exact != rounded).sum()) < acc.numel() // 4

"""XNNPACK's arithmetic: against XNNPACK itself, and against sums written out by hand."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

pytest.importorskip("executorch")

from benchmarks.exactness import cases, xnnpack_ops
from qbench.numerics.arithmetic import Grid, xnnpack
from qbench.numerics.arithmetic.functions import FUNCTIONS
from qbench.numerics.arithmetic.xnnpack_functions import STEPS

INT8 = Grid(0.05, 3, -128, 127)
OUT = Grid(0.0625, -17, -128, 127)


def test_no_code_of_any_operation_differs_from_the_runtime() -> None:
    """One case of each operation in one file: lowering is what costs time."""
    drawn = [next(xnnpack_ops.draw(op, seed=3)) for op in xnnpack_ops.EXACT]
    found = xnnpack_ops.runtime_codes(drawn)
    assert [case.expected.shape for case in drawn] == [codes.shape for codes in found]
    different = [int((case.expected != codes).sum()) for case, codes in zip(drawn, found, strict=True)]
    assert dict(zip(xnnpack_ops.EXACT, different, strict=True)) == dict.fromkeys(xnnpack_ops.EXACT, 0)
    assert sum(codes.numel() for codes in found) > 150_000


@pytest.mark.slow
@pytest.mark.parametrize("op", xnnpack_ops.EXACT)
def test_no_code_of_many_differs_from_the_runtime(op: str) -> None:
    # A lowering takes a second and gives 6,144 codes of these two.
    codes = 100_000 if op in ("relu6", "rescale") else 1_000_000
    found = xnnpack_ops.sweep(op, codes, seed=2)
    assert found.compared >= codes and found.different == 0, found


def test_every_function_has_steps_of_the_runtime_or_a_reason() -> None:
    assert set(STEPS) | set(xnnpack.ARITHMETIC.inexact) >= set(FUNCTIONS)
    assert not set(STEPS) & set(xnnpack.ARITHMETIC.inexact)


@pytest.mark.parametrize("op", ["add", "sub"])
def test_sums_are_those_of_exact_rationals_rounded_up_at_ties(op: str) -> None:
    a, b = cases.all_pairs()
    a, b = a[::5, ::7], b[::5, ::7]
    out = Grid(0.125, 9, -128, 127)
    a_grid, b_grid = Grid(0.0625, -3, -128, 127), Grid(0.25, 40, -128, 127)
    found = getattr(xnnpack, op)(a, a_grid, b, b_grid, out)
    sign = 1 if op == "add" else -1
    expected = [
        max(-128, min(127, (Fraction(x + 3, 2) + sign * (y - 40) * 2 + Fraction(1, 2)).__floor__() + 9))
        for x, y in zip(a.flatten().tolist(), b.flatten().tolist(), strict=True)
    ]
    assert found.flatten().tolist() == expected and len(set(expected)) > 100


@pytest.mark.parametrize("op", ["add", "sub", "mul"])
def test_uint8_codes_and_broadcasting_give_the_same_codes(op: str) -> None:
    function = getattr(xnnpack, op)
    a, b = torch.arange(-128, 128).to(torch.int8)[:, None], torch.arange(-128, 128, 3).to(torch.int8)
    expected = function(a, INT8, b, OUT, INT8)
    wide = torch.uint8
    unsigned = [((codes.to(torch.int32) + 128).to(wide), grid.stored_as(wide)) for codes, grid in ((a, INT8), (b, OUT))]
    found = function(*unsigned[0], *unsigned[1], INT8.stored_as(wide))
    assert expected.shape == (256, 86) and found.dtype == wide
    assert int((found.to(torch.int32) - 128 != expected).sum()) == 0


def test_the_mean_of_uint8_codes_is_that_of_int8_codes() -> None:
    sums = torch.arange(-49 * 131, 49 * 124 + 1)
    expected = xnnpack.global_average(sums, 49, INT8, OUT)
    found = xnnpack.global_average(sums, 49, INT8.stored_as(torch.uint8), OUT.stored_as(torch.uint8))
    assert found.dtype == torch.uint8 and int((found.to(torch.int32) - 128 != expected).sum()) == 0
    assert len(expected.unique()) > 150


def test_quantize_multiplies_by_the_inverse_and_gives_nan_the_highest_code() -> None:
    x = torch.tensor([float("nan"), float("inf"), float("-inf"), 0.0, 0.075, 1e30, -1e30])
    assert xnnpack.quantize(x, Grid(0.05, 3, -100, 90)).tolist() == [90, 90, -100, 3, 5, 90, -100]
    # At ties, the product with the inverse falls to either side where the quotient is the tie itself.
    scale = cases.float32(0.013)
    ties = torch.arange(-200, 200) * 0.5 * scale
    divided = (torch.round(ties / torch.tensor(scale))).clamp(-128, 127).to(torch.int8)
    assert int((xnnpack.quantize(ties, Grid(scale, 0, -128, 127)) != divided).sum()) > 0


@pytest.mark.parametrize("ratio", [2.0**-40, 2.0**-20, 2.0**-12, 2.0**12])
def test_sums_with_steps_far_apart_neither_overflow_nor_fail(ratio: float) -> None:
    a, b = cases.all_pairs()
    out = Grid(1.0, 7, -128, 127)
    grid = Grid(ratio, 5, -128, 127)
    found = xnnpack.add(a, grid, b, grid, out).to(torch.float64)
    exact = (a.double() + b.double() - 10) * ratio + 7
    assert float((found - exact.clamp(-128, 127)).abs().max()) <= 0.5

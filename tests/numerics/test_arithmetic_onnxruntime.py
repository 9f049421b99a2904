"""ONNX Runtime's arithmetic: against ONNX Runtime itself, and against sums written out by hand."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.exactness import cases, onnxruntime_ops
from benchmarks.exactness.onnx_graphs import OnnxFile
from qbench.errors import NumericsError
from qbench.numerics.arithmetic import Grid, Window
from qbench.numerics.arithmetic import mlas_functions as mlas
from qbench.numerics.arithmetic.functions import FUNCTIONS
from qbench.numerics.arithmetic.onnxruntime import (
    ARITHMETIC,
    add,
    average_pool,
    global_average,
    mul,
    quantize,
    requantize,
    rescale,
    sub,
    table,
)

INT8 = Grid(0.05, 3, -128, 127)
OUT = Grid(0.0625, -17, -128, 127)

# ConvTranspose sums in float, and from opset 20 GELU is an op with other float steps than the chain at 19.


@pytest.mark.parametrize("op", onnxruntime_ops.EXACT)
def test_no_code_differs_from_the_runtime(op: str) -> None:
    found = onnxruntime_ops.sweep(op, 4000, seed=1)
    assert found.compared >= 4000
    assert found.different == 0, found
    assert "only" not in found.note, found.note


@pytest.mark.slow
@pytest.mark.parametrize("op", onnxruntime_ops.EXACT)
def test_no_code_of_a_million_differs_from_the_runtime(op: str) -> None:
    found = onnxruntime_ops.sweep(op, 1_000_000, seed=2)
    assert found.compared >= 1_000_000 and found.different == 0, found


def test_every_function_has_steps_of_the_runtime_and_a_sweep() -> None:
    assert set(mlas.STEPS) | {"relu6"} == set(FUNCTIONS)
    assert set(FUNCTIONS) <= set(onnxruntime_ops.OPS)


FLOAT_OPS: dict[str, Callable[[Tensor], Tensor]] = {
    "Sigmoid": mlas.logistic,
    "Tanh": mlas.tanh,
    "Erf": mlas.erf,
    "HardSwish": lambda x: x * mlas.hardsigmoid(x),
}


def runtime_floats(op: str, x: Tensor) -> Tensor:
    file = OnnxFile()
    file.output(file.node(op, file.input(x)), torch.float32)
    return file.run()[0][0]


def assert_same_floats(op: str, x: Tensor) -> None:
    # −0.0 and 0.0 are one value; NaN has no code.
    ours, theirs = FLOAT_OPS[op](x), runtime_floats(op, x)
    different = (ours != theirs).sum()
    assert different == 0, f"{int(different)} of {x.numel()}"


@pytest.mark.parametrize("op", FLOAT_OPS)
@pytest.mark.parametrize("count", [1, 3, 7, 8, 9, 31, 33, 20011])
def test_float_functions_have_the_runtime_s_values_wherever_they_stand(op: str, count: int) -> None:
    random = np.random.default_rng(count)
    x = torch.from_numpy((random.standard_normal(count) * random.choice([0.1, 1, 4, 20], count)).astype(np.float32))
    assert_same_floats(op, x)


@pytest.mark.slow
@pytest.mark.parametrize("op", FLOAT_OPS)
def test_float_functions_have_the_runtime_s_values_at_millions_of_floats(op: str) -> None:
    assert_same_floats(op, torch.cat([torch.linspace(-25, 25, 2_000_001), torch.logspace(-30, 3, 1_000_001)]))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8], ids=str)
def test_programs_may_store_either_dtype(dtype: torch.dtype) -> None:
    """The same numbers in int8 and in uint8 give the same result: both are uint8 in the file."""
    random = cases.generator(0, "dtype")
    a_grid, b_grid, out = cases.binary_grids(random)
    a, b = cases.all_pairs()
    as_int8 = add(a, a_grid, b, b_grid, out), mul(a, a_grid, b, b_grid, out), sub(a, a_grid, b, b_grid, out)
    shift = 128 if dtype == torch.uint8 else 0
    x, y = ((codes.to(torch.int16) + shift).to(dtype) for codes in (a, b))
    grids = [grid.stored_as(dtype) for grid in (a_grid, b_grid, out)]
    for function, expected in zip((add, mul, sub), as_int8, strict=True):
        found = function(x, grids[0], y, grids[1], grids[2])
        assert found.dtype == dtype
        assert torch.equal(found.to(torch.int16) - shift, expected.to(torch.int16))


def test_quantize_divides_and_rounds_to_even_and_nan_is_the_lowest_code() -> None:
    step = Grid(0.1, 5, -100, 100)
    x = torch.tensor([0.25, 0.35, -0.05, float("nan"), float("inf"), -float("inf"), 3e38, 1e-45])
    divided = np.float32([0.25, 0.35, -0.05]) / np.float32(0.1)
    assert quantize(x, step).tolist() == [*(np.rint(divided).astype(int) + 5), -100, 100, -100, 100, 5]
    assert quantize(x, step).dtype == torch.int8


def test_requantize_rounds_the_accumulator_to_float32_first() -> None:
    # 2^24 + 1 is 2^24 as a float32; with a ratio of 2^-24 · 127.5 the exact product would round up.
    out = Grid(1.0, 0, -128, 127)
    scale = torch.tensor(2.0**-24 * 126.5)
    assert requantize(torch.tensor([2**24 + 1]), scale, out).item() == 126
    assert requantize(torch.tensor([2**24 + 2]), scale, out).item() == 127
    acc = torch.tensor([[3, -3], [5, -5]], dtype=torch.float64)
    scales = torch.tensor([[0.5], [2.5]])
    before = acc.clone()
    assert requantize(acc, scales, out).tolist() == [[2, -2], [12, -12]]
    assert torch.equal(acc, before), "the caller's accumulator was overwritten"


def test_requantize_saturates_to_a_clamped_range() -> None:
    narrow = Grid(0.5, -3, -3, 40)
    assert requantize(torch.tensor([-50.0, 0.0, 7.0, 1e6]), torch.tensor(0.5), narrow).tolist() == [-3, -3, 4, 40]


def exact_add(a: int, b: int, grids: tuple[Grid, Grid, Grid]) -> float:
    """The real sum in output steps, unrounded."""
    first, second, out = grids
    real = (a - first.zero_point) * Fraction(first.scale) + (b - second.zero_point) * Fraction(second.scale)
    return float(real / Fraction(out.scale)) + out.zero_point


def test_add_is_within_half_a_step_of_the_real_sum() -> None:
    grids = Grid(cases.float32(0.031), 7, -128, 127), Grid(cases.float32(0.057), -90, -128, 127), OUT
    a, b = cases.all_pairs()
    found = add(a, grids[0], b, grids[1], OUT)
    chosen = [(13, -77), (-128, 127), (127, 127), (0, 0), (-128, -128), (55, -91)]
    for first, second in chosen:
        real = min(max(exact_add(first, second, grids), -128.0), 127.0)
        assert abs(int(found[first + 128, second + 128]) - real) <= 0.5001


def test_sums_broadcast_in_every_direction() -> None:
    random = cases.generator(3, "broadcast")
    a_grid, b_grid, out = cases.binary_grids(random)
    a, b = cases.codes(random, (2, 3, 4, 5)), cases.codes(random, (3, 1, 1))
    whole = b.expand(2, 3, 4, 5)
    for function in (add, mul, sub):
        assert function(a, a_grid, b, b_grid, out).shape == a.shape
        assert function(b, b_grid, a, a_grid, out).shape == a.shape
        assert torch.equal(function(a, a_grid, b, b_grid, out), function(a, a_grid, whole, b_grid, out))
    channels_last = a.contiguous(memory_format=torch.channels_last)
    assert torch.equal(add(channels_last, a_grid, b, b_grid, out), add(a, a_grid, b, b_grid, out))


def runtime_sum(a: Tensor, a_grid: Grid, b: Tensor, b_grid: Grid, out: Grid) -> Tensor:
    file = OnnxFile()
    x, y = file.dequantize(file.input(a), a_grid), file.dequantize(file.input(b), b_grid)
    file.output(file.quantize(file.node("Add", x, y), out), torch.int8)
    values, made = file.run()
    assert made == {"QLinearAdd": 1}
    return values[0]


# Grids on which the order of a sum's two fused steps shows in 329 of the 65,536 pairs of codes.
FIRST, SECOND = Grid(0.031125526875257492, 0, -128, 127), Grid(0.023344144225120544, -10, -128, 127)
SUM = Grid(0.12450210750102997, -128, -128, 127)


def test_a_repeated_first_operand_takes_the_place_of_the_second() -> None:
    a, b = cases.all_pairs()
    plain, repeated = add(a, FIRST, b, SECOND, SUM), add(a[:, :1], FIRST, b, SECOND, SUM)
    assert (plain != repeated).sum() == 329
    assert torch.equal(plain, runtime_sum(a, FIRST, b, SECOND, SUM))
    assert torch.equal(repeated, runtime_sum(a[:, :1].contiguous(), FIRST, b, SECOND, SUM))


SHAPES = [
    ((8, 16, 12, 12), (8, 16, 1, 1)),
    ((8, 16, 1, 1), (8, 16, 12, 12)),
    ((12, 16, 128, 1), (12, 16, 1, 1)),
    ((12, 16, 1, 1), (12, 16, 128, 1)),
    ((1, 64, 1, 1), (256, 64, 1, 1)),
    ((256, 1, 1, 1), (256, 64, 1, 1)),
    ((96, 1, 128), (96, 2, 128)),
    ((128, 127), (127,)),
    ((2, 64, 11, 1), (2, 1, 11, 13)),
    ((16, 1), (16, 1024)),
]


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_sums_that_broadcast_take_the_runtime_s_order_of_steps(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    random = cases.generator(11, "order")
    a, b = (torch.from_numpy(random.integers(-128, 128, shape)).to(torch.int8) for shape in shapes)
    assert torch.equal(add(a, FIRST, b, SECOND, SUM), runtime_sum(a, FIRST, b, SECOND, SUM))
    assert torch.equal(add(b, SECOND, a, FIRST, SUM), runtime_sum(b, SECOND, a, FIRST, SUM))


def test_equal_grids_change_nothing() -> None:
    codes = cases.all_codes()
    assert torch.equal(rescale(codes, INT8, INT8), codes)


def test_a_global_average_of_one_code_is_a_rescaling_and_of_equal_codes_the_code() -> None:
    sums = (torch.tensor([-128, 0, 127]) - INT8.zero_point) * 49
    assert global_average(sums, 49, INT8, INT8).tolist() == [-128, 0, 127]


@pytest.mark.parametrize("ratio", [2.0**-40, 512.0])
def test_a_ratio_that_the_runtime_refuses_is_refused_with_the_way_out(ratio: float) -> None:
    with pytest.raises(NumericsError, match=r"2\*\*-32 to below 256"):
        global_average(torch.tensor([1]), 1, INT8._replace(scale=ratio), INT8._replace(scale=1.0))


@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize("include", [False, True])
def test_average_pool_is_near_pytorch_s(ceil_mode: bool, include: bool) -> None:
    codes = cases.codes(cases.generator(5, "pool"), (2, 3, 14, 15))
    window = Window((3, 2), (2, 2), (1, 1), ceil_mode, include)
    x = (codes.double() - INT8.zero_point) * INT8.scale
    real = F.avg_pool2d(x, *window[:3], ceil_mode=ceil_mode, count_include_pad=include)
    found = average_pool(codes, INT8, INT8, window)
    assert found.shape == real.shape
    inner = (..., slice(0, -1), slice(0, -1))  # where ceil_mode counts alike
    steps = (real / INT8.scale + INT8.zero_point).clamp(-128, 127)
    assert ((found - steps)[inner].abs() <= 0.5001).all()


def test_a_divisor_replaces_the_count() -> None:
    codes = torch.full((1, 1, 4, 4), 23, dtype=torch.int8)
    window = Window((2, 2), (2, 2), (0, 0), False, True, divisor=8)
    assert (average_pool(codes, INT8, INT8, window) == 13).all()  # (23 − 3) · 4 / 8 + 3


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name != "relu6"])
def test_a_table_is_near_pytorch_s_function(name: str) -> None:
    parameters = (0.125,) if FUNCTIONS[name].parameters else ()
    grid, out = Grid(cases.float32(0.04), 11, -128, 127), Grid(cases.float32(0.021), -100, -128, 127)
    real = FUNCTIONS[name].compute((cases.all_codes().float() - 11) * grid.scale, parameters)
    steps = (real.double() / out.scale + out.zero_point).clamp(-128, 127)
    found = table(name, parameters, grid, out)
    assert found.shape == (256,) and found.dtype == torch.int8
    assert (found - steps).abs().max() <= 0.501


def test_relu6_is_a_clip_between_the_codes_of_its_bounds() -> None:
    out = Grid(cases.float32(0.05), -100, -128, 127)
    found = table("relu6", (), Grid(cases.float32(0.07), 0, -128, 127), out)
    assert found.min() == -100 and found.max() == 20 and found[128 + 50] == -100 + 70
    # A range of codes that ends below 6 still ends there.
    assert table("relu6", (), INT8, out._replace(qmax=10)).max() == 10


def test_tables_of_uint8_codes_start_at_code_0() -> None:
    grid, out = INT8.stored_as(torch.uint8), OUT.stored_as(torch.uint8)
    shifted = table("silu", (), grid, out).to(torch.int16) - 128
    assert torch.equal(shifted.to(torch.int8), table("silu", (), INT8, OUT))


def test_what_is_not_reproduced_says_why() -> None:
    assert ARITHMETIC.shared_max_pool
    assert "float" in ARITHMETIC.inexact["conv_transpose"]

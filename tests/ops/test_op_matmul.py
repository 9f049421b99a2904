"""Matrix products of two activations: sums and codes against int64 products, and where float32 stops being exact."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import reference
import torch
from reference import different, extreme_codes, integers, random_codes
from torch import Tensor, nn

from qbench.errors import NumericsError
from qbench.numerics.arithmetic import Grid
from qbench.ops import exact, matmul

OUT = (0.5, -7, -128, 127)
SCALES = (0.013, 0.021)
CODES: dict[str, Callable[..., Tensor]] = {"random": random_codes, "extreme": extreme_codes}
SHAPES = [
    ((7, 9), (9, 5)),
    ((1, 64), (64, 1)),
    ((3, 1), (1, 4)),
    ((3, 7, 9), (3, 9, 5)),
    ((2, 3, 17, 8), (2, 3, 8, 17)),
    ((4, 6, 11), (11, 3)),
    ((6, 11), (4, 11, 3)),
    ((2, 1, 6, 11), (1, 5, 11, 3)),
    ((2, 5, 6, 300), (300, 4)),
    ((5, 1, 4, 1100), (3, 1100, 2)),
    ((2, 0, 9), (2, 9, 5)),
    ((0, 7, 9), (9, 5)),
    ((2, 7, 0), (2, 0, 5)),
]


def call(a: Tensor, b: Tensor, zero_points: tuple[int, int], target: str = "onnxruntime") -> Tensor:
    found: Tensor = torch.ops.qbench.matmul_q8ta_q8ta_q8to(
        a, SCALES[0], zero_points[0], b, SCALES[1], zero_points[1], *OUT, torch.int8, target
    )
    return found


def expected(a: Tensor, b: Tensor, zero_points: tuple[int, int]) -> np.ndarray:
    sums = integers(a, zero_points[0]) @ integers(b, zero_points[1])
    return reference.requantized(sums, SCALES[0], np.float64(SCALES[1]), OUT)


def grid(zero_point: int, dtype: torch.dtype = torch.int8) -> Grid:
    return Grid(1.0, zero_point, torch.iinfo(dtype).min, torch.iinfo(dtype).max, dtype)


@pytest.mark.parametrize("make", CODES.values(), ids=CODES)
@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_products(shapes: tuple[tuple[int, ...], tuple[int, ...]], make: Callable[..., Tensor]) -> None:
    for zero_points in ((0, 0), (-128, 5), (127, -128), (-3, 127)):
        a, b = (make(*shape) for shape in shapes)
        found = call(a, b, zero_points)
        assert found.dtype == torch.int8 and found.is_contiguous()
        assert different(found, expected(a, b, zero_points)) == 0, zero_points


@pytest.mark.parametrize(("first", "second"), [(torch.uint8, torch.uint8), (torch.int8, torch.uint8)], ids=str)
def test_dtypes_of_codes_may_differ(first: torch.dtype, second: torch.dtype) -> None:
    a, b = random_codes(3, 7, 40, dtype=first), random_codes(3, 40, 5, dtype=second)
    zero_points = (torch.iinfo(first).max, torch.iinfo(second).min + 17)
    assert different(call(a, b, zero_points), expected(a, b, zero_points)) == 0


def test_views_and_one_tensor_twice() -> None:
    x = random_codes(2, 6, 3, 8)
    q, k = x.transpose(1, 2), x.permute(0, 2, 3, 1)  # (2, 3, 6, 8), (2, 3, 8, 6)
    assert different(call(q, k, (4, -9)), expected(q, k, (4, -9))) == 0
    assert different(call(q.contiguous(), k.contiguous(), (4, -9)), expected(q, k, (4, -9))) == 0
    square = random_codes(2, 6, 6)
    assert different(call(square, square, (4, -9)), expected(square, square, (4, -9))) == 0


def test_the_longest_sum_of_any_grid_is_exact() -> None:
    """2^15 products of 8 bits fit int32 whatever the zero points; all of them are as large as they get."""
    count = 2**15
    a, b = torch.full((2, count), 127, dtype=torch.int8), torch.full((count, 3), 127, dtype=torch.int8)
    a[1], b[5, 1] = -127, -128
    found = matmul.exact_sum(a, grid(-128), b, grid(-128))
    assert different(found, integers(a, -128) @ integers(b, -128)) == 0
    assert float(found.max()) == count * 255 * 255 < 2**31


@pytest.mark.parametrize(("zero_points", "longest"), [((-128, -128), 258), ((0, 0), 1024), ((127, 0), 514)])
def test_float32_is_split_where_its_integers_end(zero_points: tuple[int, int], longest: int) -> None:
    grids = [grid(zero_point) for zero_point in zero_points]
    ends = [-128 if zero_point >= 0 else 127 for zero_point in zero_points]
    for inner, runs in ((longest, 1), (longest + 1, 2), (3 * longest, 3)):
        parts = matmul._parts(inner, *grids, float32=True)
        assert [part.dtype for part in parts] == [torch.float32] * runs
        assert sum(part.count for part in parts) == (inner if runs > 1 else exact.WHOLE)
        a, b = torch.full((1, inner), ends[0], dtype=torch.int8), torch.full((inner, 1), ends[1], dtype=torch.int8)
        a[0, -1] += 1 if ends[0] < 0 else -1
        found = matmul.exact_sum(a, grids[0], b, grids[1])
        assert different(found, integers(a, zero_points[0]) @ integers(b, zero_points[1])) == 0
    # One more product of the largest size is an integer that float32 does not hold.
    largest = abs(ends[0] - zero_points[0]) * abs(ends[1] - zero_points[1])
    assert longest * largest <= 2**24 < (longest + 1) * largest


def test_a_sum_that_int32_need_not_hold_is_refused() -> None:
    a, b = torch.zeros(1, 33026, dtype=torch.int8), torch.zeros(33026, 1, dtype=torch.int8)
    with pytest.raises(NumericsError, match=r"33026 products.*at most 33025 products"):
        call(a, b, (-128, -128))
    assert call(a, b, (0, 0)).tolist() == [[-7]]


def test_threads_autocast_inference_and_reduced_precision_change_nothing() -> None:
    a, b = extreme_codes(3, 40, 700), extreme_codes(3, 700, 30)
    wanted = expected(a, b, (-128, 127))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert different(call(a, b, (-128, 127)), wanted) == 0
    with torch.inference_mode():
        assert different(call(a.clone(), b.clone(), (-128, 127)), wanted) == 0
    threads, precision = torch.get_num_threads(), torch.backends.mkldnn.matmul.fp32_precision
    try:
        torch.set_num_threads(2)
        assert different(call(a, b, (-128, 127)), wanted) == 0
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        assert different(call(a, b, (-128, 127)), wanted) == 0
    finally:
        torch.set_num_threads(threads)
        torch.backends.mkldnn.matmul.fp32_precision = precision


class Product(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return call(a, b, (3, -5))


def test_every_size_may_be_a_symbol() -> None:
    batch, rows, inner, columns = (torch.export.Dim(name, min=2, max=64) for name in ("n", "r", "k", "c"))
    shapes = {"a": {0: batch, 2: rows, 3: inner}, "b": {0: batch, 2: inner, 3: columns}}
    example = random_codes(3, 2, 5, 8), random_codes(3, 2, 8, 7)
    program = torch.export.export(Product(), example, dynamic_shapes=shapes, strict=True)
    for n, r, k, c in ((3, 5, 8, 7), (2, 9, 2, 33), (7, 2, 61, 4)):
        a, b = random_codes(n, 2, r, k), random_codes(n, 2, k, c)
        assert different(program.module()(a, b), expected(a, b, (3, -5))) == 0
    compiled = torch.compile(Product(), backend="eager", fullgraph=True, dynamic=True)
    assert different(compiled(*example), expected(*example, (3, -5))) == 0


@pytest.mark.slow
def test_a_million_codes() -> None:
    count = 0
    while count < 1_000_000:
        for inner in (1, 31, 64, 197, 259, 1025, 4096):
            for make in CODES.values():
                zero_points = tuple(torch.randint(-128, 128, (2,)).tolist())
                a, b = make(2, 3, 49, inner), make(2, 3, inner, 50)
                assert different(call(a, b, zero_points), expected(a, b, zero_points)) == 0
                count += 2 * 3 * 49 * 50

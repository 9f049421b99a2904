"""Operators beside sums: elementwise, cat, pools, tables, boundaries; scales are powers of two, so that the codes are
those of integer arithmetic whatever the target."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from reference import different, extreme_codes, integers, random_codes
from torch import Tensor
from torch.nn import functional as F

import qbench.ops  # noqa: F401  (defines the operators)
from qbench import targets

TARGETS = ("onnxruntime", "xnnpack", "tosa")
WHOLE = (-128, 127, torch.int8)
LAST = torch.channels_last


def clamped(values: np.ndarray, qmin: int = -128, qmax: int = 127) -> np.ndarray:
    return np.clip(values, qmin, qmax)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("a_shape", "b_shape"),
    [((4, 5, 6), (4, 5, 6)), ((4, 5, 6), (5, 1)), ((1, 6), (4, 5, 1)), ((2, 3, 4, 5), (2, 3, 1, 1)), ((3,), ())],
    ids=str,
)
def test_elementwise_operators_broadcast(a_shape: tuple[int, ...], b_shape: tuple[int, ...], target: str) -> None:
    operators = {"add": np.add, "sub": np.subtract, "mul": np.multiply}
    for (name, function), make in itertools.product(operators.items(), (random_codes, extreme_codes)):
        if getattr(targets.get(target).arithmetic, name) is None:
            continue
        a, b = make(*a_shape), make(*b_shape)
        call = getattr(torch.ops.qbench, f"{name}_q8ta_q8ta_q8to")
        found = call(a, 1.0, -3, b, 1.0, 5, 1.0, 7, -100, 90, torch.int8, target)
        expected = clamped(function(integers(a, -3), integers(b, 5)) + 7, -100, 90)
        assert found.dtype == torch.int8 and found.is_contiguous()
        assert different(found, expected) == 0, name


def test_elementwise_operators_keep_channels_last() -> None:
    a, b = random_codes(2, 8, 3, 4), random_codes(2, 8, 3, 4)
    for x, y, layout in (
        (a.to(memory_format=LAST), b.to(memory_format=LAST), LAST),
        (a.to(memory_format=LAST), b, torch.contiguous_format),
    ):
        for found in (
            torch.ops.qbench.add_q8ta_q8ta_q8to(x, 1.0, 0, y, 1.0, 0, 1.0, 0, *WHOLE, "onnxruntime"),
            torch.ops.qbench.sub_q8ta_q8ta_q8to(x, 1.0, 0, -y.clamp(min=-127), 1.0, 0, 1.0, 0, *WHOLE, "onnxruntime"),
        ):
            assert found.is_contiguous(memory_format=layout)
        assert (
            different(
                torch.ops.qbench.add_q8ta_q8ta_q8to(x, 1.0, 0, y, 1.0, 0, 1.0, 0, *WHOLE, "xnnpack"),
                clamped(integers(a) + integers(b)),
            )
            == 0
        )
        joined = torch.ops.qbench.cat_q8ta_q8to([x, y], [1.0, 1.0], [0, 0], 1, 1.0, 0, *WHOLE, "xnnpack")
        assert joined.is_contiguous(memory_format=layout)
        assert different(joined, np.concatenate([integers(a), integers(b)], 1)) == 0


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_cat_rescales_the_parts_that_need_it(dim: int) -> None:
    a, b, c = random_codes(2, 3, 4), random_codes(2, 3, 4), random_codes(2, 3, 4, dtype=torch.uint8)
    out = (1.0, 2, -100, 100, torch.int8, "onnxruntime")
    found = torch.ops.qbench.cat_q8ta_q8to([a, b, c], [1.0, 2.0, 1.0], [2, -3, 130], dim, *out)
    parts = [integers(a), 2 * integers(b, -3) + 2, integers(c, 130) + 2]
    assert different(found, clamped(np.concatenate(parts, dim), -100, 100)) == 0


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8], ids=str)
def test_max_pools(dtype: torch.dtype) -> None:
    """Against PyTorch's pool of float64, which holds every code."""
    compared = 0
    for kernel, stride, pad, dilation, ceil in itertools.product((1, 2, 3), (1, 2), (0, 1), (1, 2), (False, True)):
        if 2 * pad > kernel:
            continue
        sizes = [kernel], [stride], [pad], [dilation], ceil
        for dims, function in ((1, F.max_pool1d), (2, F.max_pool2d), (3, F.max_pool3d)):
            x = random_codes(2, 3, *(9, 10, 7)[:dims], dtype=dtype)
            expected = function(x.double(), kernel, stride, pad, dilation, ceil).numpy()
            call = getattr(torch.ops.qbench, f"max_pool{dims}d_q8ta")
            for given, wanted in ((x, expected), (x[0], expected[0]), (x[:0], expected[:0])):
                found = call(given, *sizes)
                assert found.dtype == dtype and different(found, wanted) == 0
                compared += found.numel()
            if dims == 2:
                assert different(call(x.to(memory_format=LAST), *sizes), expected) == 0
    assert compared > 10_000


@pytest.mark.parametrize("target", ["onnxruntime", "xnnpack"])
def test_means_over_dimensions(target: str) -> None:
    """4 · 8 values at an output scale of s / 32: the code is the sum itself."""
    x = torch.randint(-4, 5, (3, 2, 4, 8), dtype=torch.int8)
    x[0, 0] = 127
    expected = clamped(integers(x, 1).sum((2, 3)) - 9)
    out = (2.0**-7, -9, *WHOLE, target)
    for given, dim in ((x, [2, 3]), (x.to(memory_format=LAST), [-1, -2]), (x.transpose(2, 3), [3, 2])):
        found = torch.ops.qbench.global_avg_pool_q8ta_q8to(given, 0.25, 1, dim, False, *out)
        assert different(found, expected) == 0
        kept = torch.ops.qbench.global_avg_pool_q8ta_q8to(given, 0.25, 1, dim, True, *out)
        assert different(kept, expected[:, :, None, None]) == 0


def test_average_pool() -> None:
    """2 · 4 values at an output scale of s / 8, with a divisor of their number."""
    x = torch.randint(-6, 7, (2, 3, 8, 9), dtype=torch.int8)
    sums = sum(integers(x, 2)[:, :, i : i + 7 : 2, j : j + 6] for i in range(2) for j in range(4))
    call = torch.ops.qbench.avg_pool2d_q8ta_q8to
    sizes = [2, 4], [2, 1], [0, 0], False, True, None
    for given in (x, x.to(memory_format=LAST)):
        found = call(given, 1.0, 2, *sizes, 0.125, 11, *WHOLE, "onnxruntime")
        assert different(found, clamped(np.asarray(sums) + 11)) == 0
    alone = call(x[0], 1.0, 2, *sizes, 0.125, 11, *WHOLE, "onnxruntime")
    assert different(alone, clamped(np.asarray(sums)[0] + 11)) == 0


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8], ids=str)
def test_tables(dtype: torch.dtype) -> None:
    table, x = random_codes(256), random_codes(2, 3, 20, 30, dtype=dtype)
    expected = table.numpy()[integers(x, torch.iinfo(dtype).min)]
    for given in (x, x.to(memory_format=LAST), x.transpose(1, 3).contiguous().transpose(1, 3)):
        assert different(torch.ops.qbench.unary_q8ta_q8to(given, table), expected) == 0
    assert torch.ops.qbench.unary_q8ta_q8to(x[:0], table).shape == (0, 3, 20, 30)
    assert different(torch.ops.qbench.unary_q8ta_q8to(x[..., ::7], table), expected[..., ::7]) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_quantize(dtype: torch.dtype, target: str) -> None:
    x = torch.cat([torch.arange(-400, 401) / 8, torch.tensor([float("inf"), -float("inf"), 1e30])]).to(dtype)
    expected = clamped(np.rint(x.double().numpy() * 4) - 5, -120, 110)
    found = torch.ops.qbench.quantize_q8to(x, 0.25, -5, -120, 110, torch.int8, target)
    assert found.dtype == torch.int8 and different(found, expected) == 0


def test_requantize() -> None:
    x = random_codes(2, 3, 4, 5)
    call = torch.ops.qbench.requantize_q8ta_q8to
    assert different(call(x, 2.0, 3, 1.0, -4, *WHOLE, "xnnpack"), clamped(2 * integers(x, 3) - 4)) == 0
    same: Tensor = call(x, 2.0, 3, 2.0, 3, *WHOLE, "xnnpack")
    assert different(same, integers(x)) == 0 and same.data_ptr() != x.data_ptr()
    clipped = call(x, 2.0, 3, 2.0, 3, 3, 90, torch.int8, "xnnpack")
    assert different(clipped, clamped(integers(x), 3, 90)) == 0
    last = call(x.to(memory_format=LAST), 2.0, 3, 1.0, -4, *WHOLE, "xnnpack")
    assert last.is_contiguous(memory_format=LAST)

"""Operators with float activations and stored weight codes, against dequantize → F.linear and against integers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import qbench.ops  # noqa: F401  (defines the operators)
from qbench.errors import NumericsError
from qbench.graph.qdq import quantized_decomposed
from qbench.numerics.int4 import pack_int4

ops = torch.ops.qbench

# in, out, rows
SIZES = [(96, 64, (300,)), (33, 17, (5, 7)), (1, 3, (4,)), (2, 1, (1,)), (257, 40, (2, 3)), (64, 8, (0,)), (8, 4, ())]


def codes(rows: int, columns: int, low: int, high: int) -> Tensor:
    return torch.randint(low, high + 1, (rows, columns), dtype=torch.int8)


def scales(*shape: int) -> Tensor:
    return torch.rand(shape) * 0.02 + 1e-4


def dequantized(weight: Tensor, s: Tensor, group_size: int | None = None) -> Tensor:
    zeros = torch.zeros(s.shape, dtype=torch.int64)
    found = quantized_decomposed()
    if group_size is None:
        return found.dequantize_per_channel.default(weight, s, zeros, 0, -128, 127, torch.int8)
    return found.dequantize_per_channel_group.default(weight, s, zeros, -8, 7, torch.int8, group_size, torch.float32)


def different(found: Tensor, expected: Tensor) -> int:
    assert found.shape == expected.shape and found.dtype == expected.dtype == torch.float32
    return int((found != expected).sum())


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(("columns", "out", "rows"), SIZES)
def test_weight_only_is_dequantize_and_linear(columns: int, out: int, rows: tuple[int, ...], biased: bool) -> None:
    torch.manual_seed(columns)
    x, bias = torch.randn(*rows, columns), torch.randn(out) if biased else None
    wide, narrow, s = codes(out, columns, -128, 127), codes(out, columns, -8, 7), scales(out)
    assert different(ops.linear_qcs8w(x, wide, s, bias), F.linear(x, dequantized(wide, s), bias)) == 0
    expected = F.linear(x, dequantized(narrow, s), bias)
    assert different(ops.linear_qcs4w(x, pack_int4(narrow), s, bias), expected) == 0
    for size in (size for size in (2, 3, 4, 16, 32) if columns % size == 0):
        per_group = scales(out, columns // size)
        found = ops.linear_q4gsw(x, pack_int4(narrow), per_group, size, bias)
        assert different(found, F.linear(x, dequantized(narrow, per_group, size), bias)) == 0


def test_an_input_that_is_not_contiguous() -> None:
    torch.manual_seed(1)
    x, w, s = torch.randn(12, 7, 5).transpose(0, 2), codes(6, 12, -8, 7), scales(6)
    for bias in (torch.randn(6), None):
        found = ops.linear_qcs4w(x, pack_int4(w), s, bias)
        assert found.is_contiguous() and different(found, F.linear(x, dequantized(w, s), bias)) == 0


def dynamic_in_integers(x: Tensor, w: Tensor, s: Tensor, bias: Tensor | None) -> np.ndarray:
    """The equations of the module, in numpy and int64."""
    f32, values = np.float32, x.numpy()
    low = np.minimum(values.min(-1, keepdims=True), f32(0))
    high = np.maximum(values.max(-1, keepdims=True), f32(0))
    scale = np.maximum((high - low) / f32(255), f32(2.0**-23))
    a, b = low / scale, high / scale
    zero = np.rint(np.clip(np.where((f32(-128) + a) + (f32(127) + b) > 0, f32(-128) - a, f32(127) - b), -128, 127))
    q = np.clip(np.rint(values.astype(np.float64) * (1.0 / scale.astype(np.float64)) + zero), -128, 127)
    acc = (q.astype(np.int64) - zero.astype(np.int64)) @ w.numpy().astype(np.int64).T
    y = (acc.astype(f32) * scale).astype(f32) * s.numpy()
    return y if bias is None else y + bias.numpy()


INPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "around zero": lambda x: x,
    "positive": lambda x: x.abs() + 1,
    "negative": lambda x: -x.abs(),
    "large rows and small ones": lambda x: x * torch.logspace(-9, 9, len(x))[:, None],
    "ties": lambda x: torch.randint(-256, 255, x.shape) * 0.5,
    "outliers": lambda x: x + 300 * (torch.rand(x.shape) > 0.98),
    "rows of zeros": lambda x: x * (torch.arange(len(x)) % 2)[:, None],
}


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("name", INPUTS)
def test_dynamic_against_integers(name: str, biased: bool) -> None:
    torch.manual_seed(2)
    x = INPUTS[name](torch.randn(512, 101))
    w, s, bias = codes(300, 101, -8, 7), scales(300), torch.randn(300) if biased else None
    found = ops.linear_dq8ca_qcs4w(x, pack_int4(w), s, bias)
    expected = dynamic_in_integers(x, w, s, bias)
    assert found.dtype == torch.float32
    assert int((found.numpy() != expected).sum()) == 0
    assert len(found.unique()) > 1000


@pytest.mark.parametrize("columns", [8224, 8226, 20001])
def test_dynamic_sums_beyond_what_float32_holds(columns: int) -> None:
    # Σ|w|·255 passes 2²⁴ between the first two.
    x = torch.linspace(-1, 1, 3)[:, None] * torch.ones(columns) + torch.rand(3, columns) * 1e-2
    w, s = torch.full((4, columns), -8, dtype=torch.int8), scales(4)
    w[1], w[2, ::2], w[3, ::3] = 7, 7, 1
    found = ops.linear_dq8ca_qcs4w(x, pack_int4(w), s, None)
    assert int((found.numpy() != dynamic_in_integers(x, w, s, None)).sum()) == 0


def test_dynamic_is_close_to_quantize_and_dequantize_in_float() -> None:
    torch.manual_seed(3)
    x, w, s, bias = torch.randn(40, 64), codes(24, 64, -8, 7), scales(24), torch.randn(24)
    found = quantized_decomposed()
    scale, zero = found.choose_qparams_per_token_asymmetric.default(x, torch.int8)
    q = found.quantize_per_token.default(x, scale, zero, -128, 127, torch.int8)
    real = found.dequantize_per_token.default(q, scale, zero, -128, 127, torch.int8, torch.float32)
    torch.testing.assert_close(
        ops.linear_dq8ca_qcs4w(x, pack_int4(w), s, bias), F.linear(real, dequantized(w, s), bias), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_dynamic_keeps_a_broken_row_broken_and_the_others_whole(bad: float) -> None:
    torch.manual_seed(4)
    x, w, s = torch.randn(3, 16), pack_int4(codes(5, 16, -8, 7)), scales(5)
    whole = ops.linear_dq8ca_qcs4w(x, w, s, None)
    x[1, 3] = bad
    found = ops.linear_dq8ca_qcs4w(x, w, s, None)
    assert not torch.isfinite(found[1]).any() and torch.equal(found[[0, 2]], whole[[0, 2]])


def calls() -> list[tuple[str, tuple[object, ...]]]:
    torch.manual_seed(5)
    x, packed = torch.randn(3, 5, 12), pack_int4(codes(7, 12, -8, 7))
    odd, per_odd = torch.randn(4, 9), pack_int4(codes(7, 9, -8, 7))
    listed: list[tuple[str, tuple[object, ...]]] = []
    for bias in (torch.randn(7), None):
        listed += [
            ("linear_qcs8w", (x, codes(7, 12, -128, 127), scales(7), bias)),
            ("linear_qcs4w", (x, packed, scales(7), bias)),
            ("linear_qcs4w", (odd, per_odd, scales(7), bias)),
            ("linear_q4gsw", (x, packed, scales(7, 3), 4, bias)),
            ("linear_q4gsw", (odd, per_odd, scales(7, 3), 3, bias)),
            ("linear_dq8ca_qcs4w", (x, packed, scales(7), bias)),
            ("linear_dq8ca_qcs4w", (odd, per_odd, scales(7), bias)),
        ]
    return listed


@pytest.mark.parametrize(("name", "arguments"), calls(), ids=lambda value: value if isinstance(value, str) else "")
def test_opcheck(name: str, arguments: tuple[object, ...]) -> None:
    torch.library.opcheck(getattr(ops, name).default, arguments)


def test_under_autocast_the_same_bits() -> None:
    for name, arguments in calls():
        plain = getattr(ops, name)(*arguments)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(getattr(ops, name)(*arguments), plain)


X, W8, W4, S = torch.randn(2, 8), codes(3, 8, -9, 9), torch.zeros(3, 4, dtype=torch.uint8), scales(3)
WRONG: dict[str, tuple[Callable[[], Tensor], str]] = {
    "half precision": (lambda: ops.linear_qcs8w(X.half(), W8, S, None), "input is torch.float16.*float32"),
    "codes as input": (lambda: ops.linear_qcs4w(W8, W4, S, None), "input is torch.int8.*float32"),
    "packed for 8 bits": (lambda: ops.linear_qcs8w(X, W4, S, None), "weight has dtype torch.uint8.*int8"),
    "not packed": (lambda: ops.linear_qcs4w(X, W8, S, None), r"torch.int8 of shape \[3, 8\].*\(out, 4\).*pack_int4"),
    "other features": (lambda: ops.linear_qcs4w(X[:, :6], W4, S, None), r"6 input features.*\(out, 3\)"),
    "other features in 8 bits": (lambda: ops.linear_qcs8w(X[:, :6], W8, S, None), r"\[2, 6\].*\[3, 8\]"),
    "scales": (lambda: ops.linear_qcs8w(X, W8, S[:2], None), r"weight_scales.*\(2,\).*\(3,\)"),
    "double scales": (lambda: ops.linear_qcs8w(X, W8, S.double(), None), "weight_scales is torch.float64"),
    "integer bias": (lambda: ops.linear_qcs8w(X, W8, S, torch.zeros(3, dtype=torch.int32)), "bias is torch.int32"),
    "long bias": (lambda: ops.linear_dq8ca_qcs4w(X, W4, S, torch.zeros(4)), r"bias.*\(4,\).*\(3,\)"),
    "group size": (lambda: ops.linear_q4gsw(X, W4, scales(3, 2), 3, None), "group_size is 3.*divisor.*8 input"),
    "scales of groups": (lambda: ops.linear_q4gsw(X, W4, S, 4, None), r"\(3,\); expected float32 of shape \(3, 2\)"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input(case: str) -> None:
    make, message = WRONG[case]
    with pytest.raises(NumericsError, match=message):
        make()

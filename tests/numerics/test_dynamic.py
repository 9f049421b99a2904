"""Grids of rows: the same bits as the operators of `quantized_decomposed`, and as the rule written in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from qbench.graph.qdq import quantized_decomposed
from qbench.numerics.dynamic import choose_row_grids, quantize_rows


def rows() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3000, 33, generator=generator)
    scales = torch.logspace(-12, 12, 3000)[torch.randperm(3000, generator=generator), None]
    return {
        "around zero": x,
        "sizes from 1e-12 to 1e12": x * scales,
        "positive": x.abs() + 0.1,
        "negative": -x.abs() - 0.1,
        "one side longer": x + torch.linspace(-9, 9, 3000)[:, None],
        "ties": torch.randint(-256, 255, (3000, 33), generator=generator) * 0.5,
        "zeros": torch.zeros(4, 5),
        "one column": torch.randn(50, 1, generator=generator),
        "three axes": x.reshape(30, 100, 33),
        "near the smallest scale": x * 1e-5,
    }


def in_numpy(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    f32 = np.float32
    low = np.minimum(x.min(-1, keepdims=True), f32(0))
    high = np.maximum(x.max(-1, keepdims=True), f32(0))
    scale = np.maximum((high - low) / f32(255), f32(2.0**-23))
    a, b = low / scale, high / scale
    zero = np.where((f32(-128) + a) + (f32(127) + b) > 0, f32(-128) - a, f32(127) - b)
    zero = np.rint(np.clip(zero, f32(-128), f32(127)))
    codes = np.rint(x.astype(np.float64) * (1.0 / scale.astype(np.float64)) + zero)
    return scale, zero, np.clip(codes, -128, 127).astype(np.int8)


@pytest.mark.parametrize("name", rows())
def test_grids_and_codes(name: str) -> None:
    x = rows()[name]
    grids = choose_row_grids(x)
    codes = quantize_rows(x, grids)
    assert grids.scale.shape == grids.zero_point.shape == (*x.shape[:-1], 1) and codes.dtype == torch.int8
    ops = quantized_decomposed()
    scale, zero_point = ops.choose_qparams_per_token_asymmetric.default(x, torch.int8)
    assert torch.equal(grids.scale.double(), scale) and torch.equal(grids.zero_point.long(), zero_point)
    theirs = ops.quantize_per_token.default(x, scale, zero_point, -128, 127, torch.int8)
    expected = in_numpy(x.numpy())
    assert np.array_equal(grids.scale.numpy(), expected[0]) and np.array_equal(grids.zero_point.numpy(), expected[1])
    assert int((codes != theirs).sum()) == 0 and int((codes.numpy() != expected[2]).sum()) == 0
    if x.numel() > 1000 and x.shape[-1] > 1:
        assert len(codes.unique()) > 200


def test_zero_has_a_code() -> None:
    x = torch.randn(500, 40) * 3 + 7
    x[:, 3] = 0
    grids = choose_row_grids(x)
    assert torch.equal(quantize_rows(x, grids)[:, 3:4].float(), grids.zero_point)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_has_no_finite_scale_and_spoils_no_other(bad: float) -> None:
    x = torch.randn(3, 8)
    x[1, 4] = bad
    grids = choose_row_grids(x)
    assert torch.isfinite(grids.scale).flatten().tolist() == [True, False, True]
    clean = x[[0, 2]]
    assert torch.equal(quantize_rows(x, grids)[[0, 2]], quantize_rows(clean, choose_row_grids(clean)))

"""Rounding between two floats against rounding step by step, around every end."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from qbench.numerics.interval import first_beyond, interval_of, is_served
from qbench.numerics.qparams import SMALLEST_SCALE, QParams, fake_quantize, inside_range, steps_from_zero

CODES = {"uint8": (0, 255), "int8": (-128, 127), "narrow": (-127, 127), "uint4": (0, 15), "int16": (-32768, 32767)}


def grids(codes: str) -> list[QParams]:
    qmin, qmax = CODES[codes]
    generator = torch.Generator().manual_seed(0)
    scales = torch.exp(torch.randn(60, generator=generator) * 5)
    edges = torch.tensor([1.0, 0.5, 3.0, 1 / 3, 6 / 255, SMALLEST_SCALE, 1e30, 1.7e36])
    points = torch.randint(qmin, qmax + 1, (68,), generator=generator)
    points[:5] = torch.tensor([qmin, qmax, (qmin + qmax) // 2, 0, qmin])
    return [
        QParams(scale, zero.int(), qmin, qmax)
        for scale, zero in zip(torch.cat((edges, scales)), points, strict=True)
    ]


def around(value: float) -> Tensor:
    """The float32 numbers next to a number, eight on either side."""
    found = [torch.tensor(value)]
    for end in (-math.inf, math.inf):
        nearest = found[0]
        for _ in range(8):
            nearest = torch.nextafter(nearest, torch.tensor(end))
            found.append(nearest)
    return torch.stack(found)


def values(qparams: QParams) -> Tensor:
    """What lies about the middle between two codes, at both ends and within, and beyond."""
    scale, zero = qparams.scale.item(), int(qparams.zero_point)
    low, high = qparams.qmin - zero, qparams.qmax - zero
    near = [around((steps + shift) * scale) for steps in (low, high, 0, 3) for shift in (-0.5, 0.0, 0.5)]
    far = torch.tensor([0.0, math.inf, -math.inf, 3.4e38, -3.4e38, 1e-45, (high + 40) * scale, (low - 40) * scale])
    return torch.cat((*near, far, torch.linspace(low - 2, high + 2, 301) * scale))


@pytest.mark.parametrize("bounds", [(-math.inf, math.inf), (0.0, math.inf), (0.0, 6.0), (-0.1, 0.75)], ids=str)
@pytest.mark.parametrize("codes", CODES)
def test_values_and_masks_are_those_of_the_steps(codes: str, bounds: tuple[float, float]) -> None:
    for qparams in grids(codes):
        found, v = interval_of(qparams, bounds), values(qparams)
        clipped = v.clamp(*bounds)
        rounded, mask = torch.empty_like(v), torch.empty_like(v, dtype=torch.int8)
        found.quantize(v, rounded, mask)
        assert torch.equal(rounded, fake_quantize(clipped, qparams)), qparams
        cut = torch.tensor(bounds, dtype=torch.float32)
        passes = inside_range(clipped, qparams) & (v > cut[0]) & (v < cut[1])
        assert torch.equal(mask.bool(), passes), qparams


@pytest.mark.parametrize("scale", [math.nan, math.inf, 0.0, 1e-45])
def test_a_scale_that_is_none_ends_in_nan(scale: float) -> None:
    found = interval_of(QParams(torch.tensor(scale), torch.tensor(0, dtype=torch.int32), 0, 255))
    assert all(map(math.isnan, found.passing()))


def test_which_grids_are_served() -> None:
    zero = torch.zeros((), dtype=torch.int32)
    assert is_served(QParams(torch.tensor(1.0), zero, -32768, 32767))
    assert not is_served(QParams(torch.tensor(1.0), zero, -(2**31), 2**31 - 1))
    assert not is_served(QParams(torch.ones(3), zero.expand(3), 0, 255, axis=0))


@pytest.mark.parametrize("codes", CODES)
def test_ends_from_tensors_are_those_from_numbers(codes: str) -> None:
    for qparams in grids(codes):
        least, most = steps_from_zero(qparams.zero_point, qparams.qmin, qparams.qmax)
        ends = -first_beyond(-least, qparams.scale), first_beyond(most, qparams.scale)
        assert tuple(map(float, ends)) == interval_of(qparams).passing(), qparams

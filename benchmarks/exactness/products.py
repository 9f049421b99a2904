"""Matrix products of two activations for every sweep: factors, their grids and the grid of the result.

    spread      results spread over the output codes
    ties        differences of 8 or none and ratios that are odd numbers times powers of two: many results at .5
    halves      sums half way between two codes or one beside it: beyond 2^24 float32 rounds one into the other
    wide        nearly all codes at one end: sums as large as they get, up to 2^31
    far         ratios s_a · s_b / s_out from 2^−30 to 2^7, with few codes off zero where they are large
    softmax     rows of the first factor that add up to about one, on the grid of probabilities
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from benchmarks.exactness import cases
from qbench.numerics.arithmetic import Grid

Shapes = tuple[tuple[int, ...], tuple[int, ...]]

#: Attention (queries by keys, probabilities by values, odd counts), leading dims that broadcast either way, ranks that
#: differ, one row or column, one product, sums beyond 2^24, and the longest sum that always fits int32.
SHAPES = (
    ((2, 3, 49, 32), (2, 3, 32, 49)),
    ((2, 3, 49, 49), (2, 3, 49, 32)),
    ((1, 1, 197, 64), (1, 1, 64, 197)),
    ((17, 29), (29, 31)),
    ((3, 33, 65), (3, 65, 7)),
    ((5, 1, 13, 19), (1, 4, 19, 23)),
    ((4, 21, 40), (40, 18)),
    ((25, 37), (6, 37, 11)),
    ((2, 1, 9, 16), (3, 16, 50)),
    ((7, 1, 257), (7, 257, 63)),
    ((64, 48), (48, 1)),
    ((30, 1), (1, 30)),
    ((6, 2500), (2500, 9)),
    ((2, 3, 32768), (2, 32768, 5)),
)
KINDS = ("spread", "ties", "halves", "wide", "far", "softmax")


@dataclasses.dataclass(frozen=True)
class ProductData:
    """Codes of both factors, (…, rows, inner) and (…, inner, columns), with their grids, and the result's grid."""

    a: Tensor
    a_grid: Grid
    b: Tensor
    b_grid: Grid
    out: Grid

    def sums(self) -> Tensor:
        """`Σ (a − z_a)·(b − z_b)`, exact, in float64."""
        return (self.a.to(torch.float64) - self.a_grid.zero_point) @ (
            self.b.to(torch.float64) - self.b_grid.zero_point
        )


def product_data(rng: np.random.Generator, shapes: Shapes, kind: str, dtype: torch.dtype = torch.int8) -> ProductData:
    """Numbers of one product of one of `KINDS`."""
    if kind == "halves":
        return _halves(rng, shapes, dtype)
    a_grid, b_grid, out = (cases.grid(rng, dtype) for _ in range(3))
    if kind == "softmax":
        a_grid = Grid(2.0**-8, a_grid.qmin, a_grid.qmin, a_grid.qmax, dtype)
    ratio = cases.scale_ratio(rng) if kind == "far" else None
    a = _probabilities(rng, shapes[0], a_grid) if kind == "softmax" else _factor(rng, kind, shapes[0], a_grid, ratio)
    drawn = ProductData(a, a_grid, _factor(rng, kind, shapes[1], b_grid, ratio), b_grid, out)
    sums = drawn.sums()
    if kind == "wide":  # One sign of sums: the other end would saturate all of them.
        out = out._replace(zero_point=out.qmin if sums.mean() > 0 else out.qmax)
    scale = (ratio or _ratio(rng, kind, float(sums.abs().max()))) * out.scale / a_grid.scale
    return dataclasses.replace(drawn, b_grid=b_grid._replace(scale=cases.float32(scale)), out=out)


def _halves(rng: np.random.Generator, shapes: Shapes, dtype: torch.dtype) -> ProductData:
    """The first factor holds differences of 255, and 1 in its last column; the second the digits of sums to base 255.

    All differences of a factor have one sign; the step between two output codes is a power of two.
    """
    low, high, _ = _ends(dtype)
    (*lead, inner, columns), span = shapes[1], high - low
    largest = span * span * (inner - 1) + span - 1 if inner > 1 else span
    shift = max(1, int(np.ceil(np.log2(largest / 250))))
    halves = rng.integers(0, 250, (*lead, columns)) * 2**shift + 2 ** (shift - 1)
    sums = torch.from_numpy((halves + rng.integers(-1, 2, halves.shape)).clip(0, largest))
    first = torch.full(shapes[0], span)
    first[..., -1] = 1
    left, right = (Grid(2.0 ** int(rng.integers(-8, 8)), int(rng.choice([low, high])), *_ends(dtype)) for _ in range(2))
    out = left._replace(zero_point=low if left.zero_point == right.zero_point else high)
    if rng.integers(2):  # Of a third and three, say, only the rounded product of scales is the power of two.
        left = left._replace(scale=cases.float32(left.scale * rng.uniform(1, 2)))
    right = right._replace(scale=cases.float32(out.scale * 2.0**-shift / left.scale))
    return ProductData(_at(left, first), left, _at(right, _digits(sums, inner, span)), right, out)


def _digits(sums: Tensor, inner: int, span: int) -> Tensor:
    """(…, columns) -> (…, inner, columns) digits d with `span · (d_0 + d_1 + …) + d_last = sums`, all up to `span`."""
    whole = sums // span if inner > 1 else torch.zeros_like(sums)
    before = torch.arange(inner)[:, None] * span  # (inner, 1): what the digits before each one can hold
    digits = (whole[..., None, :] - before).clamp(0, span)
    digits[..., -1, :] = sums - span * whole
    return digits


def _at(grid: Grid, distance: Tensor) -> Tensor:
    """Codes so far from a zero point that is the lowest or the highest code."""
    sign = 1 if grid.zero_point == grid.qmin else -1
    return (grid.zero_point + sign * distance).to(grid.dtype)


def _ends(dtype: torch.dtype) -> tuple[int, int, torch.dtype]:
    return torch.iinfo(dtype).min, torch.iinfo(dtype).max, dtype


def _ratio(rng: np.random.Generator, kind: str, largest: float) -> float:
    """`s_a · s_b / s_out` that spreads sums up to `largest` over the output's codes, or somewhat beyond."""
    ratio = float(2.0 ** rng.uniform(-1, 2)) * 60 / max(largest, 1.0)
    if kind != "ties":
        return ratio
    odd = int(rng.choice([1, 1, 3, 5]))
    return odd * 2.0 ** float(np.floor(np.log2(ratio / odd)))


def _factor(
    rng: np.random.Generator, kind: str, shape: tuple[int, ...], of: Grid, ratio: float | None = None
) -> Tensor:
    """Codes of one factor."""
    drawn = cases.codes(rng, shape, of.dtype).to(torch.int64)
    steps = torch.from_numpy(rng.integers(-1, 2, shape))
    if kind == "wide":
        far = of.qmax if of.qmax - of.zero_point > of.zero_point - of.qmin else of.qmin
        drawn = torch.where(torch.from_numpy(rng.integers(0, 10, shape) > 0), far, drawn)
    elif kind == "ties":
        drawn = of.zero_point + 8 * steps
    elif ratio is not None and ratio > 2.0**-4:
        drawn = of.zero_point + steps * torch.from_numpy(rng.integers(0, 6, shape) == 0)
    return drawn.clamp(of.qmin, of.qmax).to(of.dtype)


def _probabilities(rng: np.random.Generator, shape: tuple[int, ...], of: Grid) -> Tensor:
    """Codes of a softmax over the last dim."""
    rows = torch.softmax(torch.from_numpy(rng.normal(size=shape) * rng.uniform(0.1, 4)), -1)
    return (torch.round(rows / of.scale) + of.zero_point).clamp(of.qmin, of.qmax).to(of.dtype)

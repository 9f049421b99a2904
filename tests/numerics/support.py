"""Grids, values and comparisons that the tests of the numeric floor share. Nothing here calls the code under test,
except for the value type QParams."""

from __future__ import annotations

import dataclasses
from fractions import Fraction

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from qbench.numerics.qparams import QParams

INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Grid:
    """A range of codes, the dtype that stores it, and a zero point that is not special."""

    name: str
    qmin: int
    qmax: int
    dtype: torch.dtype
    zero_point: int

    def qparams(self, scale: float, zero_point: int) -> QParams:
        return QParams(torch.tensor(scale), torch.tensor(zero_point, dtype=torch.int32), self.qmin, self.qmax)


NARROW_GRIDS = [
    Grid("int4", -8, 7, torch.int8, 3),
    Grid("uint4", 0, 15, torch.int8, 9),
    Grid("int8", -128, 127, torch.int8, -17),
    Grid("int8 narrow", -127, 127, torch.int8, 0),
    Grid("uint8", 0, 255, torch.uint8, 131),
    Grid("int16", -(2**15), 2**15 - 1, torch.int16, 1234),
    Grid("uint16", 0, 2**16 - 1, torch.int32, 40000),
]
INT32 = Grid("int32", INT32_MIN, INT32_MAX, torch.int32, 0)
GRIDS = [*NARROW_GRIDS, INT32]

# SMALLEST_SCALE, ordinary ones, powers of two, one whose reciprocal is inexact either way, and huge ones
SCALES = [2.0**-100, 1e-20, 3e-5, 2.0**-7, 1 / 3, 0.1, 1.0, 1.5, 77.7, 2.0**20, 1e20, 2.0**90]

finite_floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
scales = st.floats(2.0**-100, 2.0**90, width=32)


def vectors(elements: st.SearchStrategy[float], largest: int = 24) -> st.SearchStrategy[Tensor]:
    """float32 tensors of 1 to `largest` elements."""
    return st.lists(elements, min_size=1, max_size=largest).map(lambda values: torch.tensor(values))


def generator(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def values_on_and_between(scale: float, grid: Grid, count: int = 2000) -> Tensor:
    """Ties, grid points, their float neighbours, both zeros, values beyond the range, infinities; float32."""
    random = generator(grid.qmax)
    reach = min(grid.qmax - grid.qmin, 2**24)
    steps = random.integers(-2 * reach, 2 * reach, count).astype(np.float64)
    points = np.concatenate([steps, steps + 0.5, np.arange(-20, 20) + 0.5]) * scale
    points = points.astype(np.float32)
    above, below = np.nextafter(points, np.float32(np.inf)), np.nextafter(points, np.float32(-np.inf))
    spread = (random.standard_normal(count) * reach * scale / 2).astype(np.float32)
    special = np.array([0.0, -0.0, np.inf, -np.inf, 3.4e38, -3.4e38, 1e-45, -1e-45], dtype=np.float32)
    return torch.from_numpy(np.concatenate([points, above, below, spread, special]))


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Equal in dtype, shape and every bit: −0.0 is not 0.0, and NaN equals itself."""
    return (
        left.dtype == right.dtype
        and left.shape == right.shape
        and left.contiguous().numpy().tobytes() == right.contiguous().numpy().tobytes()
    )


def without_negative_zero(x: Tensor) -> Tensor:
    """−0.0 becomes 0.0; every other value keeps its bits."""
    return x + 0.0


def exact(value: float) -> Fraction:
    """The rational number that a float is."""
    return Fraction(value)

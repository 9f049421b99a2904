"""Counting differences batch by batch: sums are kept, never the arrays."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qbench.errors import VerificationError
from qbench.numerics.qparams import QParams
from qbench.report.data import Comparison, LayerComparison


class Count:
    """A comparison that grows: how many values were compared, how many differ, by how much at most."""

    def __init__(self) -> None:
        self.compared = self.different = self.largest = 0

    def add_steps(self, steps: np.ndarray) -> None:
        """Add the distances of pairs, in steps of a grid."""
        self.compared += steps.size
        differing = int(np.count_nonzero(steps))
        if differing:
            self.different += differing
            self.largest = max(self.largest, int(np.abs(steps).max()))

    def add_values(self, first: np.ndarray, second: np.ndarray) -> None:
        """Add pairs of values: equal or not; NaN at the same place on both sides is equal."""
        equal = (first == second) | (np.isnan(first) & np.isnan(second))
        self.add_steps((~equal).astype(np.int8))

    def add_on_grid(self, first: np.ndarray, second: np.ndarray, grid: QParams | None) -> None:
        """Add pairs of real values by their codes on a grid; by value where there is none."""
        if grid is None:
            self.add_values(first, second)
        else:
            self.add_steps(_codes(first, grid) - _codes(second, grid))

    def add_codes(self, first: np.ndarray, second: np.ndarray, zeros: tuple[int, int] = (0, 0)) -> None:
        """Add pairs of codes of at most 16 bits, each counted from the zero of how it is stored."""
        self.add_steps(first.astype(np.int32) - second.astype(np.int32) + (zeros[1] - zeros[0]))

    def comparison(self, name: str) -> Comparison:
        """What was counted so far."""
        return Comparison(name, self.compared, self.different, self.largest)

    def layer(self, name: str, inexact: str = "") -> LayerComparison:
        """What was counted so far, as the codes of one activation."""
        return LayerComparison(name, self.compared, self.different, self.largest, inexact)


def check_shapes(first: Sequence[np.ndarray], second: Sequence[np.ndarray]) -> None:
    """Raise VerificationError unless both hold arrays of the same shapes in the same order."""
    if [a.shape for a in first] != [b.shape for b in second]:
        raise VerificationError(
            f"verify: outputs have shapes {[a.shape for a in first]} and {[b.shape for b in second]}; they must be "
            "equal"
        )


def _codes(values: np.ndarray, grid: QParams) -> np.ndarray:
    """Steps of values on a grid, not clamped: a runtime's value off the range must not be hidden."""
    return np.rint(values.astype(np.float64) / float(grid.scale)).astype(np.int64)

"""What a layer's quantization costs, as data: bias error, weight and activation ranges, signal over noise.

    e      = b̂ − b_f                                   deployed bias against the folded float one, per channel
    SQNR   = 10·log10(Σ y² / Σ (y − ŷ)²)   in dB       y in float, ŷ quantized; infinite where nothing differs
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class BiasFigures:
    """The bias error of a layer.

    Attributes:
        largest: Largest |e| in steps of the bias grid: at most ½ where nothing saturates.
        largest_output: Largest |e| in steps of the layer's output.
        relative: ‖e‖ / ‖b_f‖; 0 where all biases are 0.
        channels: How many output channels there are.
    """

    largest: float
    largest_output: float
    relative: float
    channels: int


@dataclass(frozen=True)
class WeightFigures:
    """The folded weight of a layer.

    Attributes:
        low: Smallest value, in float.
        high: Largest value.
        smallest_scale: Smallest step of its grid.
        largest_scale: Largest step.
        sqnr: Of the quantized weight, in dB.
    """

    low: float
    high: float
    smallest_scale: float
    largest_scale: float
    sqnr: float


@dataclass(frozen=True)
class ActivationFigures:
    """The output of a layer on held-out images.

    Attributes:
        low: Smallest value before it is quantized.
        high: Largest value.
        grid_low: Real value of the lowest code.
        grid_high: Real value of the highest code.
        counts: How often each code occurs, from the lowest.
        saturated: How many values were beyond the range.
        sqnr: Against the same layer of the same model without any quantization, in dB.
    """

    low: float
    high: float
    grid_low: float
    grid_high: float
    counts: tuple[int, ...]
    saturated: int
    sqnr: float

    @property
    def codes(self) -> int:
        """How many codes were counted."""
        return sum(self.counts)

    @property
    def distinct(self) -> int:
        """How many different codes occur."""
        return sum(count > 0 for count in self.counts)


@dataclass(frozen=True)
class LayerFigures:
    """One layer (or operation) of a QAT model; what it does not have is None."""

    path: str
    bias: BiasFigures | None = None
    weight: WeightFigures | None = None
    activation: ActivationFigures | None = None


def sqnr(signal: float, noise: float) -> float:
    """`10·log10(Σ y² / Σ (y − ŷ)²)` from the two sums; infinite without noise, minus infinite without signal."""
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf

"""Cross-layer equalization: the weights of two layers share their range channel by channel; the float output stays.

Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019, arXiv:1906.04721,
section 4.1. Between two layers stands a positively homogeneous f, f(s·x) = s·f(x) for s > 0, channel by channel:

    W₂ f(W₁x + b₁) = (W₂S) f((S⁻¹W₁)x + S⁻¹b₁)          S = diag(s), one s_i for each channel between the layers

    r1_i = max|row i of W_f|                             output channel i of the first layer, its BatchNorm folded
    r2_i = max|column i of W₂|                           input channel i of the second layer
    s_i  = sqrt(r1_i · r2_i) / r2_i                      so that both ranges become sqrt(r1_i · r2_i)

Where a BatchNorm follows the first layer, γ and β take 1/s_i, and the folded weight k·W with them; W stays. Otherwise W
and b take it. Channels with r1_i = 0 or r2_i = 0 keep s_i = 1. In a chain of several layers (convolution, depthwise,
convolution) each pair undoes a little of its neighbours' balance, so pairs are visited in turn until no s_i differs
from 1 by more than `TOLERANCE`; a depthwise chain of three ends with the cube root of r1·r2·r3 in all three.

Where input channel i of the second layer is found (`in` channels, `features` values each after a flatten):

    conv          W (out, in/groups, …)     column i mod in/groups, in the rows of group i div in/groups
    transposed    W (in, out/groups, …)     row i
    linear        W (out, in·features)      columns i·features … (i+1)·features − 1
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from qbench.errors import ConfigError
from qbench.ptq.chains import Layer, Pair, SkippedLayer, find_pairs
from qbench.report.text import bullets, columns

TOLERANCE = 1e-3
MOST_SWEEPS = 100


@dataclasses.dataclass(frozen=True)
class EqualizedPair:
    """Two layers whose ranges were balanced: paths, channels between them.

    Attributes:
        first: Path of the layer that puts the channels out.
        second: Path of the layer that takes them in.
        channels: How many.
        spread_before: max r1 / min r1 over the channels that are not 0: what a scale for the whole tensor must span.
        spread_after: The same afterwards.
    """

    first: str
    second: str
    channels: int
    spread_before: float
    spread_after: float


@dataclasses.dataclass(frozen=True)
class EqualizationReport:
    """What equalization did.

    Attributes:
        pairs: The layers that were balanced.
        skipped: Every other layer, and why its output is left as it is.
        sweeps: How many times the pairs were visited.
        converged: Whether the last visit changed no channel by more than `TOLERANCE`.
    """

    pairs: tuple[EqualizedPair, ...]
    skipped: tuple[SkippedLayer, ...]
    sweeps: int
    converged: bool

    def __str__(self) -> str:
        rows = [("layers", "channels", "max/min range before", "after")]
        rows += [
            (f"{p.first} -> {p.second}", str(p.channels), f"{p.spread_before:.3g}", f"{p.spread_after:.3g}")
            for p in self.pairs
        ]
        notes = [f"{skipped.path}: {skipped.reason}" for skipped in self.skipped]
        state = "converged" if self.converged else "not converged"
        head = f"{len(self.pairs)} pairs of layers equalized in {self.sweeps} sweeps ({state})"
        return "\n".join([head, *(columns(rows, frozenset({1, 2, 3})) if self.pairs else []), *bullets(notes)])


def equalize(
    float_model: nn.Module, *, example_inputs: tuple[Any, ...]
) -> tuple[nn.Module, EqualizationReport]:
    """A copy of the model with balanced ranges of weights; its float output changes by rounding only.

    Args:
        float_model: Fused or not; before `prepare_qat`. It is not changed.
        example_inputs: One tuple of inputs: a forward on it, in eval, shows which layers follow each other.

    Returns:
        The new model, in the modes of the old one, and the report.

    Raises:
        ConfigError: `example_inputs` is no tuple, or the model is prepared already.
    """
    if not isinstance(example_inputs, tuple):
        raise ConfigError(
            f"equalize: example_inputs is a {type(example_inputs).__name__}, expected a tuple; example_inputs=(x,)"
        )
    model = copy.deepcopy(float_model)
    pairs, skipped = find_pairs(model, example_inputs)
    before = [spread(first_range(pair.first)) for pair in pairs]
    sweeps, converged = _sweep(pairs)
    done = tuple(
        EqualizedPair(pair.first.path, pair.second.path, pair.channels, old, spread(first_range(pair.first)))
        for pair, old in zip(pairs, before, strict=True)
    )
    return model, EqualizationReport(done, tuple(skipped), sweeps, converged)


@torch.no_grad()
def _sweep(pairs: list[Pair]) -> tuple[int, bool]:
    for sweep in range(1, MOST_SWEEPS + 1):
        largest = 0.0
        for pair in pairs:
            s = balance(first_range(pair.first), second_range(pair.second))
            scale_output(pair.first, 1.0 / s)
            scale_input(pair.second, s)
            largest = max(largest, float((s - 1.0).abs().max()))
        if largest <= TOLERANCE:
            return sweep, True
    return MOST_SWEEPS, not pairs


def balance(first: Tensor, second: Tensor) -> Tensor:
    """`s = sqrt(r1·r2)/r2`, 1 where a range is 0. Each (channels,)."""
    live = (first > 0) & (second > 0)
    # The square root of the quotient: a product of small ranges could be 0.
    ratio = torch.where(live, first, 1.0) / torch.where(live, second, 1.0)
    return torch.where(torch.isfinite(ratio) & (ratio > 0), ratio.sqrt(), 1.0)


def spread(ranges: Tensor) -> float:
    """max/min of the ranges that are not 0."""
    live = ranges[ranges > 0]
    return float(live.max() / live.min()) if live.numel() else 1.0


@torch.no_grad()
def first_range(layer: Layer) -> Tensor:
    """`r1`, (out,): the largest folded weight of each output channel."""
    weight, layout = layer.weight.abs(), layer.layout
    if layout.transposed:
        # (in, out/groups, …) -> (groups, in/groups, out/groups, rest) -> (groups, out/groups) -> (out,)
        ranges = weight.reshape(layout.groups, -1, weight.shape[1], weight[0, 0].numel()).amax((1, 3)).flatten()
    else:
        ranges = weight.flatten(1).amax(1)
    factor = layer.fold_factor()
    return ranges if factor is None else ranges * factor.abs()


@torch.no_grad()
def second_range(layer: Layer) -> Tensor:
    """`r2`, (in,): the largest weight that multiplies each input channel."""
    return by_input(layer).abs().amax((1, 3)).flatten()


def by_input(layer: Layer) -> Tensor:
    """A view of the weight with its input channels on axes 0 and 2: (groups, out/groups, in/groups, rest).

    conv          (out, in/groups, …)    groups as they are
    transposed    (in, out/groups, …)    (in, 1, 1, out/groups·…)
    linear        (out, in·features)     (1, out, in, features)
    """
    weight = layer.weight
    if layer.layout.transposed:
        return weight.reshape(weight.shape[0], 1, 1, -1)
    if weight.ndim == 2:
        return weight.reshape(1, weight.shape[0], -1, layer.features)
    groups = layer.layout.groups
    return weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)


@torch.no_grad()
def scale_output(layer: Layer, factor: Tensor) -> None:
    """Multiply the output channels, (out,): γ and β of the BatchNorm, or the weight and its bias."""
    if layer.bn is not None:
        layer.bn.gamma.mul_(factor)
        layer.bn.beta.mul_(factor)
        return
    layer.weight.mul_(layer.layout.spread(factor, layer.weight))
    if layer.bias is not None:
        layer.bias.mul_(factor)


@torch.no_grad()
def scale_input(layer: Layer, factor: Tensor) -> None:
    """Multiply the columns of the input channels, (in,)."""
    columns_of = by_input(layer)
    scaled = columns_of * factor.reshape(columns_of.shape[0], 1, columns_of.shape[2], 1)
    layer.weight.copy_(scaled.reshape(layer.weight.shape))

"""Which floating-point kernel sums codes exactly, from a bound that is proven for each layer.

    acc = Σ (x − z)·w + bias            lo = code min − z            hi = code max − z

A kernel may add the products in any order and may add the bias first or last. Whatever subset of them has been added
so far, the partial sum of an output channel lies in

    [ Σ min(w·lo, w·hi, 0) + min(bias, 0),  Σ max(w·lo, w·hi, 0) + max(bias, 0) ]

and is an integer. float32 holds every integer up to 2²⁴ and float64 every one up to 2⁵³, so while the interval lies
inside, every addition, fused or not, is exact: the kernel returns `acc` whatever its order and its threads. That holds
for kernels that add products of inputs and weights (direct convolution, matrix product), not for Winograd or FFT.

Where the interval is too wide for float32, the input channels are split into as few runs as have intervals that fit;
each run is summed in float32 and the runs are added in float64. float64 sums everything that cannot be split.

`acc` also fits int32 wherever a runtime accumulates in it: `convert` refuses a layer that does not fit its target's
accumulator, so no wrap-around is emulated here.
"""

from __future__ import annotations

import dataclasses
import functools
import platform
from collections.abc import Callable

import torch
from torch import Tensor

from qbench.numerics.arithmetic import Grid

FLOAT32_INTEGERS = 2**24


@dataclasses.dataclass(frozen=True)
class Part:
    """A run of input channels whose sum is exact in `dtype`.

    Attributes:
        start: First input channel.
        count: Number of input channels.
        dtype: float32 or float64.
        bias: (out,) bias codes as floats, in the first part alone.
    """

    start: int
    count: int
    dtype: torch.dtype
    bias: Tensor | None

    def floats(self, weight: Tensor) -> Tensor:
        """This part's codes of `weight`, whose input channels are axis 1 wherever a layer has several parts."""
        whole = self.start == 0 and self.count in (weight.shape[1], WHOLE)
        run = weight if whole else weight.narrow(1, self.start, self.count)
        return run.to(self.dtype, memory_format=torch.contiguous_format)


# The count of a part that holds every input channel of a layer that cannot be split.
WHOLE = -1


def plan(by_channel: Tensor, bias: Tensor | None, grid: Grid, *, float32: bool) -> list[Part]:
    """A layer in as few float32 parts as are proven exact, or in one float64 part.

    Args:
        by_channel: int8 weight codes (out, in, products of one input channel): what a sum adds up. A layer that cannot
            be split has in = 1.
        bias: (out,) int32 codes, or None.
        grid: Of the input.
        float32: Whether float32 kernels may be taken at all (see `float32_is_summed`).
    """
    runs = split(by_channel, bias, grid) if float32 else None
    if runs is None or len(runs) == 1:
        dtype = torch.float64 if runs is None else torch.float32
        return [Part(0, WHOLE, dtype, None if bias is None else bias.to(dtype))]
    biases = [None if bias is None else bias.to(torch.float32), *[None] * (len(runs) - 1)]
    return [Part(*run, torch.float32, floats) for run, floats in zip(runs, biases, strict=True)]


def split(by_channel: Tensor, bias: Tensor | None, grid: Grid) -> list[tuple[int, int]] | None:
    """Runs (start, count) of input channels whose partial sums float32 holds, as few as possible.

    Args:
        by_channel: (out, in, products of one input channel) int8 weight codes.
        bias: (out,) int32 codes that the first run adds, or None.
        grid: Of the input.

    Returns:
        The runs in order; None where one input channel, or the bias, is too much by itself.
    """
    channels = int(by_channel.shape[1])
    zero = torch.zeros(by_channel.shape[0], 1, dtype=torch.int64, device=by_channel.device)
    # (2, out, in + 1): lowest and highest partial sum of the channels before each position.
    sums = torch.stack([torch.cat([zero, side.cumsum(1)], 1) for side in _reach(by_channel, grid)])
    if bias is not None:
        bias = bias.to(torch.int64)
        offset = torch.stack([bias.clamp(max=0), bias.clamp(min=0)])[..., None]
    else:
        offset = torch.zeros_like(sums[..., :1])
    runs: list[tuple[int, int]] = []
    start = 0
    while not runs or start < channels:
        # Whether the run from `start` to each end fits, every output channel: grows with the end.
        widest = (sums[..., start:] - sums[..., start : start + 1] + offset).abs().flatten(0, 1)
        fitting = int((widest <= FLOAT32_INTEGERS).all(0).sum()) - 1
        if fitting < min(1, channels):
            return None
        runs.append((start, fitting))
        start += fitting
        offset = torch.zeros_like(offset)
    return runs


def _reach(by_channel: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """(out, in) lowest and highest partial sums that the products of one input channel can have; int64."""
    lo, hi = min(grid.qmin - grid.zero_point, 0), max(grid.qmax - grid.zero_point, 0)
    positive = by_channel.clamp(min=0).sum(2, dtype=torch.int64)
    negative = by_channel.clamp(max=0).sum(2, dtype=torch.int64)
    return positive * lo + negative * hi, positive * hi + negative * lo


def add_parts(x: Tensor, grid: Grid, axis: int, parts: list[Part], kernel: Callable[[Tensor, int], Tensor]) -> Tensor:
    """`acc`, exact: in the dtype of the only part, or in float64.

    Args:
        x: Codes.
        grid: Theirs.
        axis: Of the input channels in `x`.
        parts: What `plan` returns.
        kernel: (`x − z` of a part's channels as floats, index of the part) -> its sum, a new tensor.
    """
    if len(parts) == 1:
        return kernel(differences(x, grid, parts[0].dtype), 0)
    runs = (differences(x.narrow(axis, part.start, part.count), grid, part.dtype) for part in parts)
    sums = (kernel(run, index) for index, run in enumerate(runs))
    total = next(sums).to(torch.float64)
    for found in sums:
        total += found
    return total


def differences(codes: Tensor, grid: Grid, dtype: torch.dtype) -> Tensor:
    """`x − z` in float32 or float64, which hold it exactly; a new tensor."""
    values = codes.to(dtype)
    return values.sub_(grid.zero_point) if grid.zero_point else values


def float32_is_summed(device: torch.device, kind: str) -> bool:
    """Whether float32 kernels of `kind` ("conv", "matmul") add plain products: no Winograd, no reduced precision.

    Shown for oneDNN and MKL on x86 alone. Elsewhere, and where the process allows bfloat16 or TF32 inside float32
    kernels, float64 is taken.
    """
    if device.type != "cpu" or not _has_direct_kernels():
        return False
    return getattr(torch.backends.mkldnn, kind).fp32_precision in ("none", "ieee")


@functools.cache
def _has_direct_kernels() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64") and torch.backends.mkldnn.is_available()

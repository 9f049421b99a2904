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
import platform
from collections.abc import Callable

import torch
from torch import Tensor

from qbench.numerics.arithmetic import Grid

FLOAT32_INTEGERS = 2**24


@dataclasses.dataclass(frozen=True)
class Part:
    """A run of input channels whose sum is exact in `weight.dtype`.

    Attributes:
        start: First input channel.
        count: Number of input channels.
        weight: Their weight codes as floats.
        bias: (out,) bias codes as floats, in the first part alone.
    """

    start: int
    count: int
    weight: Tensor
    bias: Tensor | None


def plan(
    weight: Tensor, by_channel: Tensor, axis: int, bias: Tensor | None, grid: Grid, *, float32: bool
) -> list[Part]:
    """The layer in as few float32 parts as are proven exact, or in one float64 part.

    Args:
        weight: int8 codes.
        by_channel: The same codes as (out, in, products of one input channel): what a sum adds up. A layer that cannot
            be split has in = 1.
        axis: Of the input channels in `weight`, where it can be split.
        bias: (out,) int32 codes, or None.
        grid: Of the input.
        float32: Whether float32 kernels may be taken at all (see `float32_is_summed`).
    """
    runs = split(by_channel, bias, grid) if float32 else None
    if runs is None:
        return [Part(0, by_channel.shape[1], weight.to(torch.float64), _floats(bias, torch.float64))]
    if len(runs) == 1:
        return [Part(0, runs[0][1], weight.to(torch.float32), _floats(bias, torch.float32))]
    return [
        Part(
            start,
            count,
            weight.narrow(axis, start, count).to(torch.float32, memory_format=torch.contiguous_format),
            _floats(bias, torch.float32) if start == 0 else None,
        )
        for start, count in runs
    ]


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


def _floats(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if bias is None else bias.to(dtype)


def add_parts(x: Tensor, grid: Grid, axis: int, parts: list[Part], kernel: Callable[[Tensor, Part], Tensor]) -> Tensor:
    """`acc`, exact: in float32 if there is one part in float32, else in float64.

    Args:
        x: Codes.
        grid: Theirs.
        axis: Of the input channels in `x`.
        parts: What `plan` returns.
        kernel: (`x − z` of a part's channels as floats, the part) -> its sum.
    """
    if len(parts) == 1:
        return kernel(_differences(x, grid, parts[0].weight.dtype), parts[0])
    total: Tensor | None = None
    for part in parts:
        run = _differences(x.narrow(axis, part.start, part.count), grid, part.weight.dtype)
        found = kernel(run, part)
        total = found.to(torch.float64) if total is None else total.add_(found)
    if total is None:
        raise AssertionError("a plan has at least one part")
    return total


def _differences(codes: Tensor, grid: Grid, dtype: torch.dtype) -> Tensor:
    """`x − z` as floats, which hold it exactly."""
    values = codes.to(dtype)
    return values.sub_(grid.zero_point) if grid.zero_point else values


def float32_is_summed(device: torch.device, kind: str) -> bool:
    """Whether float32 kernels of `kind` ("conv", "matmul") add plain products: no Winograd, no reduced precision.

    Shown for oneDNN and MKL on x86 alone. Elsewhere, and where the process allows bfloat16 or TF32 inside float32
    kernels, float64 is taken.
    """
    if device.type != "cpu" or not _IS_X86 or not torch.backends.mkldnn.is_available():
        return False
    return getattr(torch.backends.mkldnn, kind).fp32_precision in ("none", "ieee")


_IS_X86 = platform.machine().lower() in ("x86_64", "amd64")

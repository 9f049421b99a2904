"""Integer references in NumPy, int64 and plain loops over kernel positions, that share nothing with the operators."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Tensor

Sizes = tuple[int, ...]


def conv(x: np.ndarray, w: np.ndarray, stride: Sizes, padding: Sizes, dilation: Sizes, groups: int) -> np.ndarray:
    """(batch, in, …) differences and (out, in / groups, …) codes -> (batch, out, …) sums, int64."""
    dims = w.ndim - 2
    x = np.pad(x, [(0, 0), (0, 0), *((p, p) for p in padding)])
    sizes = [(x.shape[2 + a] - dilation[a] * (w.shape[2 + a] - 1) - 1) // stride[a] + 1 for a in range(dims)]
    total = np.zeros((x.shape[0], w.shape[0], *sizes), np.int64)
    per_in, per_out = x.shape[1] // groups, w.shape[0] // groups
    for position in itertools.product(*(range(size) for size in w.shape[2:])):
        window = tuple(
            slice(position[a] * dilation[a], position[a] * dilation[a] + (sizes[a] - 1) * stride[a] + 1, stride[a])
            for a in range(dims)
        )
        for group in range(groups):
            ins, outs = slice(group * per_in, (group + 1) * per_in), slice(group * per_out, (group + 1) * per_out)
            taps = w[(outs, slice(None), *position)]
            total[:, outs] += np.einsum("bi...,oi->bo...", x[(slice(None), ins, *window)], taps)
    return total


def conv_transposed(
    x: np.ndarray, w: np.ndarray, stride: Sizes, padding: Sizes, extra: Sizes, dilation: Sizes, groups: int
) -> np.ndarray:
    """(batch, in, …) differences and (in, out / groups, …) codes -> (batch, out, …) sums, int64."""
    dims = w.ndim - 2
    spans = [dilation[a] * (w.shape[2 + a] - 1) + 1 for a in range(dims)]
    full = [(x.shape[2 + a] - 1) * stride[a] + spans[a] + extra[a] for a in range(dims)]
    total = np.zeros((x.shape[0], w.shape[1] * groups, *full), np.int64)
    per_in, per_out = x.shape[1] // groups, w.shape[1]
    for position in itertools.product(*(range(size) for size in w.shape[2:])):
        where = tuple(
            slice(
                position[a] * dilation[a], position[a] * dilation[a] + (x.shape[2 + a] - 1) * stride[a] + 1, stride[a]
            )
            for a in range(dims)
        )
        for group in range(groups):
            ins, outs = slice(group * per_in, (group + 1) * per_in), slice(group * per_out, (group + 1) * per_out)
            found = np.einsum("bi...,io->bo...", x[:, ins], w[(ins, slice(None), *position)])
            total[(slice(None), outs, *where)] += found
    inner = tuple(slice(padding[a], full[a] - padding[a]) for a in range(dims))
    return total[(slice(None), slice(None), *inner)]


def requantized(acc: np.ndarray, s_in: float, s_w: np.ndarray, out: tuple[float, int, int, int]) -> np.ndarray:
    """`clamp(rne(f32(acc) · f32(f32(s_in · s_w) / s_out)) + z)`, of both float runtimes; `s_w` broadcasts to `acc`."""
    scale, zero_point, qmin, qmax = out
    multiplier = (np.float32(s_in) * s_w.astype(np.float32)) / np.float32(scale)
    rounded = np.rint(acc.astype(np.float32) * multiplier).astype(np.float64) + zero_point
    return np.clip(rounded, qmin, qmax).astype(np.int64)


def integers(codes: Tensor, zero_point: int = 0) -> np.ndarray:
    """`x − z` in int64."""
    return codes.to(torch.int64).numpy() - zero_point


def different(found: Tensor, expected: np.ndarray) -> int:
    """How many codes differ; all of them if the shapes do."""
    if tuple(found.shape) != expected.shape:
        return max(found.numel(), expected.size, 1)
    return int((found.to(torch.float64).numpy() != expected).sum())


def random_codes(*shape: int, dtype: torch.dtype = torch.int8) -> Tensor:
    info = torch.iinfo(dtype)
    return torch.randint(info.min, info.max + 1, shape, dtype=dtype)


def extreme_codes(*shape: int, dtype: torch.dtype = torch.int8, low: int | None = None) -> Tensor:
    """Lowest and highest codes alone."""
    info = torch.iinfo(dtype)
    return torch.where(torch.rand(shape) < 0.5, info.min if low is None else low, info.max).to(dtype)

"""What follows a convolution in training, as one function with one backward: the plain path of eager PyTorch on CPUs.

    α = γ/sqrt(σ² + ε)      β' = (β + e) − μ·α      v = α·y + β'          BatchNorm with the bias error in its shift
    a = clamp(v, low, high)                                               the activation: ReLU, ReLU6 or none
    s, z                                                                  the grid that is found from a
    out = clamp(rne(a·(1/s)), qmin − z, qmax − z)·s

    backward    g is cut to low < v < high and to codes inside the grid, then goes through BatchNorm

Both clamps are one, before rounding, and both cuts of the gradient are one: see `qbench.numerics.interval`. The ends of
`a` are those of `v`, clamped. So there are fewer operators than steps, with the bits of the steps. What is saved is `y`
alone, which BatchNorm's backward needs anyway: `v` is computed again, where the gradient that passes then lies, in
memory that all layers share in one backward. Outside BatchNorm's own two kernels, that makes two passes over memory
forward and two backward, and two fresh tensors of the size of `y`: the output and the gradient.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qbench.numerics.blocks import RoomOfBackward, channels_are_last, dense
from qbench.numerics.interval import Interval, Numbers, interval_of, passed
from qbench.numerics.qparams import QParams
from qbench.numerics.saved_codes import Coded

aten = torch.ops.aten

_ROOM = RoomOfBackward()

#: Lowest and highest value of a tensor, () each.
Ends = tuple[Tensor, Tensor]


class Statistics(NamedTuple):
    """What BatchNorm updates in training, and how.

    Attributes:
        running_mean: `μ_r`, (channels,).
        running_var: `σ²_r`, (channels,).
        momentum: Weight of the batch.
        eps: `ε`.
    """

    running_mean: Tensor
    running_var: Tensor
    momentum: float
    eps: float


@dataclasses.dataclass(frozen=True)
class Chain:
    """What to do with `v`.

    Attributes:
        low: Lower bound of the activation; −inf where it has none.
        high: Upper bound of the activation; inf where it has none.
        by_ends: Whether `watch` finds the grid from the two ends of a tensor.
        watch: Observes a tensor, (its ends where `by_ends`), and answers with the grid: `interval.is_served`.
    """

    low: float
    high: float
    by_ends: bool
    watch: Callable[[Tensor, Ends | None], QParams | Numbers]


#: Gradients to y, γ, β, e, s and z, given that of the output, y, what was saved, and which are needed; None for others.
Backward = Callable[[Tensor, Tensor, "tuple[Tensor, ...]", "tuple[bool, ...]"], "tuple[Tensor | None, ...]"]


class Followed(NamedTuple):
    """What follows a linear part, without autograd: it may be a part of a larger function.

    Attributes:
        out: The output.
        saved: What its backward needs beside `y`.
        backward: See `Backward`.
        coded: The output as codes, where they are at hand.
    """

    out: Tensor
    saved: tuple[Tensor | None, ...]
    backward: Backward
    coded: Coded | None = None


def normalize_clip_quantize(
    y: Tensor, gamma: Tensor | None, shift: Tensor | None, statistics: Statistics, chain: Chain
) -> Followed:
    """The function above: float32 on a CPU, not compiled.

    Args:
        y: (batch, channels, …), float32.
        gamma: `γ`, (channels,), or None for ones.
        shift: `β + e`, (channels,), or None for zeros.
        statistics: What BatchNorm updates.
        chain: What follows it.
    """
    out, mean, inverse, factor, constant = _batch_norm(y, gamma, shift, statistics)
    interval = _observed(out, chain)
    interval.quantize(out, out)
    saved = gamma, mean, inverse, factor, constant
    return Followed(out, saved, functools.partial(_backward, interval=interval, eps=statistics.eps))


def _backward(
    grad: Tensor,
    y: Tensor,
    saved: tuple[Tensor, ...],
    wanted: tuple[bool, ...],
    *,
    interval: Interval,
    eps: float,
) -> tuple[Tensor | None, ...]:
    gamma, mean, inverse, factor, constant = saved
    above, below = interval.passing()
    v = _normalize(y, factor, constant, _ROOM.like(y))
    inside = passed(grad, v, above, below, out=v)
    asked = [True, wanted[1], wanted[2] or wanted[3]]
    found = aten.native_batch_norm_backward(inside, y, gamma, None, None, mean, inverse, True, eps, asked)
    grad_y, grad_gamma, grad_shift = found
    return grad_y, grad_gamma if wanted[1] else None, *(grad_shift if one else None for one in wanted[2:4]), None, None


def clip_quantize(v: Tensor, chain: Chain) -> Tensor:
    """The same without BatchNorm, in place: `v` is what an operator put out that does not need it any more.

    One byte a value is saved: whether the gradient passes.

    Args:
        v: float32, any shape, not a view.
        chain: What to do.
    """
    out: Tensor = _ClipQuantize.apply(v, chain)
    return out


class _ClipQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v: Tensor, chain: Chain) -> Tensor:
        ctx.mark_dirty(v)
        mask = torch.empty_like(v, dtype=torch.int8)
        _observed(v, chain).quantize(v, v, mask)
        ctx.save_for_backward(mask)
        return v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0] * ctx.saved_tensors[0], None


def _batch_norm(
    y: Tensor, gamma: Tensor | None, shift: Tensor | None, statistics: Statistics
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`v`, the batch's mean, `1/sqrt(σ² + ε)`, `α` and `β'`; moves the running statistics."""
    running = statistics.running_mean, statistics.running_var
    out, mean, inverse = aten.native_batch_norm(y, gamma, shift, *running, True, statistics.momentum, statistics.eps)
    factor = inverse if gamma is None else inverse * gamma
    start = torch.zeros_like(mean) if shift is None else shift
    constant = torch.addcmul(start, mean, factor, value=-1)
    if not _repeats_batch_norm(channels_are_last(y)):
        _normalize(y, factor, constant, out)
    return out, mean, inverse, factor, constant


def _normalize(y: Tensor, factor: Tensor, constant: Tensor, out: Tensor) -> Tensor:
    """`α·y + β'`, written to `out`, from two tensors (channels,).

    With mean 0, variance 1 and ε = 0, PyTorch's BatchNorm is that, too, and faster where channels come first in memory.
    """
    if channels_are_last(y):
        wide = (1, -1, *[1] * (y.ndim - 2))
        return torch.addcmul(constant.view(wide), y, factor.view(wide), out=out)
    mean, variance, none = torch.zeros_like(factor), torch.ones_like(factor), factor.new_empty(0)
    found = {"out": out, "save_mean": none, "save_invstd": none}
    aten.native_batch_norm.out(y, factor, constant, mean, variance, False, 0.0, 0.0, **found)
    return out


@functools.cache
def _repeats_batch_norm(last: bool | None) -> bool:
    """Whether `_normalize` has the bits of PyTorch's BatchNorm: both round once where a CPU has fused products.

    Args:
        last: See `channels_are_last`.
    """
    if last is None:
        return False
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(4, 13, 9, 11, generator=generator) * 3 + 1
    y = y.contiguous(memory_format=torch.channels_last) if last else y
    gamma, shift = torch.randn(13, generator=generator), torch.randn(13, generator=generator)
    out, mean, inverse = aten.native_batch_norm(y, gamma, shift, None, None, True, 0.1, 1e-5)
    factor = inverse * gamma
    return torch.equal(out, _normalize(y, factor, torch.addcmul(shift, mean, factor, value=-1), torch.empty_like(y)))


def _observed(v: Tensor, chain: Chain) -> Interval:
    """The grid that is found from `a`; where its ends do not say enough, `v` is made `a`."""
    ends = None
    if chain.by_ends:
        low, high = torch.aminmax(dense(v))
        ends = low.clamp(chain.low, chain.high), high.clamp(chain.low, chain.high)
    else:
        v.clamp_(chain.low, chain.high)
    return interval_of(chain.watch(v, ends), (chain.low, chain.high))

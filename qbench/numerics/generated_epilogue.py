"""What follows a convolution in training, as generated code: `qbench.numerics.fused`, in as few passes as there can be.

    forward     1  read y    per channel: Σ(y − c), Σ(y − c)², min y, max y            c: the channel's mean in one row
                             μ = c + Σ(y − c)/n      σ² = Σ(y − c)²/n − (μ − c)²
                             α = γ/sqrt(σ² + ε)      β' = (β + e) − μ·α
                             ends of a = clamp(α·y + β'):  of α·min y + β' and α·max y + β', as each step is monotone
                             the range moves, and with it s and z
                2  read y, write   clamp(rne(α·y + β' over s), …)·s
    backward    3  read g, y       g' = g inside the clamps, else 0;  Σg', Σg'·(y − μ)
                4  read g, y, write   (g' − Σg'/n − (y − μ)·Σg'·(y − μ)/(n·(σ² + ε)))·α

Values are those of the steps one by one where the statistics are: sums are taken in another order than by PyTorch's
kernel, so that statistics differ in the last bits. The shift by `c` keeps σ² from being the difference of two large
numbers; rows are summed in float32, sums of rows in float64.

Tensors come as (outer, channels, inner) or, with channels last, as (outer, inner, channels).

Where the grid is learned it is there before the tensor is, and nothing looks for ends; pass 3 sums its gradient.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qbench.numerics.blocks import from_memory_order, in_memory_order
from qbench.numerics.fused import Followed, Statistics
from qbench.numerics.generated import BothWays, Tensors, fma, generated, once
from qbench.numerics.generated_rounding import Rounding
from qbench.numerics.saved_codes import Coded, fits_a_byte, lowering


@dataclasses.dataclass(frozen=True)
class Plan:
    """What stays the same from step to step where there is a BatchNorm.

    Attributes:
        last: Whether channels are the last axis.
        momentum: Weight of the batch in the running statistics.
        eps: `ε`.
        rounding: What follows.
    """

    last: bool
    momentum: float
    eps: float
    rounding: Rounding

    def in_rows(self, y: Tensor) -> Tensor:
        """(batch, channels, …) as (outer, channels, inner), or with channels last as (outer, inner, channels)."""
        ordered = in_memory_order(y, self.last)
        return ordered.view(-1, *ordered.shape[-2:]) if self.last else ordered.view(*ordered.shape[:2], -1)

    def wide(self, values: Tensor) -> Tensor:
        """(channels,), shaped so that it broadcasts against (outer, …)."""
        return values if self.last else values[:, None]

    def rows(self, y: Tensor) -> int:
        """The axis that is summed first."""
        return 1 if self.last else 2

    def count(self, y: Tensor) -> Any:
        """Values per channel."""
        return y.shape[0] * y.shape[self.rows(y)]


class Moved(NamedTuple):
    """What a step writes to, apart from its output.

    Attributes:
        statistics: The running statistics.
        silenced: Bool, (channels,): channels whose running statistics stay; or None.
        scale: `s`, float32, ().
        zero_point: `z`, int32, ().
        state: The observer's.
    """

    statistics: Statistics
    silenced: Tensor | None
    scale: Tensor
    zero_point: Tensor
    state: tuple[Tensor, ...]


@dataclasses.dataclass(frozen=True)
class Code(BothWays):
    """Both directions of a step, and the plan that they were made for."""

    plan: Plan


@functools.lru_cache(maxsize=256)
def generated_code(last: bool, momentum: float, eps: float, *rounding: Any) -> Code:
    """Both directions of a plan; `rounding` is what `Rounding` is made of."""
    plan = Plan(last, momentum, eps, Rounding(*rounding))
    return Code(generated(forward, forward_sample, plan), generated(backward, backward_sample, plan), plan)


def normalize_clip_quantize(
    y: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    error: Tensor | None,
    moved: Moved,
    code: Code,
    low_memory: bool = False,
) -> Followed:
    """`fused.normalize_clip_quantize` by generated code.

    Args:
        y: (batch, channels, …), float32, in the memory order of the plan.
        gamma: `γ`, (channels,), or None for ones.
        beta: `β`, (channels,), or None for zeros.
        error: `e`, (channels,), or None for zeros.
        moved: What is written to.
        code: For the plan with `channels_are_last(y)`.
        low_memory: Whether to write down the codes, too, where they fit into a byte.
    """
    to = moved.statistics
    kept = moved.silenced, to.running_mean, to.running_var, moved.scale, moved.zero_point, *moved.state
    # Made here, and not by the code: a view of what that made could not be written to by what comes next.
    plan, spec = code.plan, code.plan.rounding.spec
    out, codes = torch.empty_like(y), None
    if low_memory and fits_a_byte(spec):
        codes = torch.empty_like(y, dtype=torch.int8)
    rows = None if codes is None else plan.in_rows(codes)
    found: Sequence[Tensor | None] = code.forward(plan.in_rows(out), rows, plan.in_rows(y), gamma, beta, error, *kept)
    coded = None
    if codes is not None:
        *found, size, zero = found
        assert size is not None and zero is not None
        coded = Coded(codes, size, zero)
    return Followed(out, tuple(found), functools.partial(_backward, code=code), coded)


def _backward(
    grad: Tensor, y: Tensor, saved: tuple[Tensor, ...], wanted: tuple[bool, ...], *, code: Code
) -> tuple[Tensor | None, ...]:
    plan = code.plan
    found = code.backward(plan.in_rows(grad), plan.in_rows(y), *saved)
    grad_y, grad_gamma, grad_beta, *grad_grid = found
    assert grad_y is not None
    # The gradient to e, which is added to β, is that to β.
    others = grad_gamma, grad_beta, grad_beta, *(grad_grid or (None, None))
    needed = (value if asked else None for value, asked in zip(others, wanted[1:], strict=True))
    return from_memory_order(grad_y, y, plan.last), *needed


def forward(
    out: Tensor,
    codes: Tensor | None,
    y: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    error: Tensor | None,
    silenced: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    *rest: Any,
) -> Tensors:
    """The batch's μ and 1/sqrt(σ² + ε), `α` and `β'`, (channels,), and between which `v` gradients pass, () and ().

    Where the grid learns, `s` and `z` in place of the last two. With codes, also `s` and the zero point of what is kept
    of them, float32, ().

    Args:
        out: Like `y`: becomes the output.
        codes: Like `y`, int8: becomes its codes, of an unsigned grid 128 lower; or None.
        y: float32, (outer, channels, inner) or (outer, inner, channels).
        gamma: `γ`, (channels,), or None for ones.
        beta: `β`, (channels,), or None for zeros.
        error: `e`, (channels,), or None for zeros.
        silenced: Bool, (channels,): channels whose running statistics stay; or None.
        running_mean: (channels,), written to.
        running_var: (channels,), written to.
        scale: (), written to.
        zero_point: int32, (), written to.
        rest: The observer's state, written to; then the plan.
    """
    *state, plan = rest
    axis, count = plan.rows(y), plan.count(y)
    centre = once(y[0].mean(axis - 1))
    shifted = y - plan.wide(centre)
    first, second = shifted.sum(axis), (shifted * shifted).sum(axis)
    lowest, highest = y.amin(axis).amin(0), y.amax(axis).amax(0)
    offset = first.double().sum(0) / count
    variance = (second.double().sum(0) / count - offset * offset).clamp(min=0.0)
    mean = (centre.double() + offset).float()
    inverse = (1.0 / torch.sqrt(variance + plan.eps)).float()
    _move(running_mean, mean, silenced, plan.momentum)
    # A batch of one value per channel is refused before.
    _move(running_var, (variance * (count / (count - 1))).float(), silenced, plan.momentum)

    factor = once(inverse if gamma is None else inverse * gamma)
    shift = _sum(beta, error)
    constant = once(fma(-mean, factor, torch.zeros_like(mean) if shift is None else shift))
    ends = fma(lowest, factor, constant), fma(highest, factor, constant)
    rounding: Rounding = plan.rounding
    low, high = rounding.clip(torch.minimum(*ends)).amin(), rounding.clip(torch.maximum(*ends)).amax()
    grid = rounding.move(low, high, scale, zero_point, state)
    steps = rounding.steps(fma(y, plan.wide(factor), plan.wide(constant)), *grid)
    out.copy_(steps * grid[0])
    ends = rounding.passing(*grid) if rounding.gradient == "none" else grid
    found = mean, inverse, factor, constant, *ends
    if codes is None:
        return found
    zero = once(grid[1].float() - lowering(rounding.spec))
    codes.copy_((steps + zero).to(torch.int8))
    return *found, grid[0], zero


def backward(grad: Tensor, y: Tensor, *rest: Any) -> Tensors:
    """Gradients to `y`, like `y`, and to γ and β, (channels,); and to `s` and `z`, (), where they learn.

    Args:
        grad: Like `y`.
        y: As in `forward`.
        rest: What `forward` answers with, then the plan.
    """
    mean, inverse, factor, constant, first, second, plan = rest
    learns = plan.rounding.gradient != "none"
    axis, count = plan.rows(y), plan.count(y)
    value = fma(y, plan.wide(factor), plan.wide(constant))
    if learns:
        kept, to_scale, to_zero = plan.rounding.shared(grad, value, first, second)
    else:
        kept = plan.rounding.passed(grad, value, first, second)
    centred = y - plan.wide(mean)
    total = kept.sum(axis).double().sum(0)
    along = (kept * centred).sum(axis).double().sum(0) * inverse
    shift, slope = once((total / count).float()), once((along / count * inverse).float())
    grad_y = (kept - plan.wide(shift) - centred * plan.wide(slope)) * plan.wide(factor)
    if not learns:
        return grad_y, along.float(), total.float()
    grad_scale, outside = to_scale.sum(axis).double().sum(), to_zero.sum(axis).double().sum()
    return grad_y, along.float(), total.float(), grad_scale.float(), -first * outside.float()


def forward_sample(plan: Plan) -> list[Tensor | None]:
    """Arguments of `forward` whose sums are exact in any order: whole numbers, each with its opposite beside it."""
    generator = torch.Generator().manual_seed(0)
    half = torch.randint(-9, 10, (4, 24, 512), generator=generator).float()
    y = torch.stack((half, -half), 3).flatten(2)
    y = y.transpose(1, 2).contiguous() if plan.last else y
    gamma, beta, error = torch.randn(3, 24, generator=generator)
    found = [y, gamma, beta, error * 1e-3, torch.zeros(24), torch.ones(24)]
    found = [value.to(plan.rounding.device) for value in found]
    codes = torch.zeros_like(found[0], dtype=torch.int8)
    return [torch.empty_like(found[0]), codes, *found[:4], None, *found[4:], *plan.rounding.sample()]


def backward_sample(plan: Plan) -> list[Tensor | None]:
    """The same for `backward`."""
    given = forward_sample(plan)
    y = given[2]
    found = forward(*given, plan)[:6]  # type: ignore[arg-type]
    assert y is not None
    grad = torch.randint(-5, 6, y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    if plan.rounding.gradient != "none":  # what goes to the grid is not whole: one value of each row, then
        row = plan.rows(y)
        grad = grad * (torch.arange(y.shape[row], device=y.device).view(-1, *[1] * (2 - row)) == 7)
    return [grad, y, *found]


def _move(running: Tensor, batch: Tensor, silenced: Tensor | None, momentum: float) -> None:
    moved = momentum * batch + (1.0 - momentum) * running
    running.copy_(moved if silenced is None else torch.where(silenced, running, moved))


def _sum(beta: Tensor | None, error: Tensor | None) -> Tensor | None:
    if beta is None or error is None:
        return error if beta is None else beta
    return beta + error


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
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qbench.numerics.fused import Statistics
from qbench.numerics.generated import Generated, Tensors, fma, generated
from qbench.numerics.qparams import QSpec, choose_qparams, steps_from_zero


@dataclasses.dataclass(frozen=True)
class Plan:
    """What stays the same from step to step.

    Attributes:
        last: Whether channels are the last axis.
        momentum: Weight of the batch in the running statistics.
        eps: `ε`.
        low: Lower bound of the activation; −inf where it has none.
        high: Upper bound of the activation; inf where it has none.
        spec: Of the output's grid.
        observer: Whose `follow` says how the range moves; None where it stays.
        device: Type of the device.
    """

    last: bool
    momentum: float
    eps: float
    low: float
    high: float
    spec: QSpec
    observer: Any
    device: str

    def wide(self, values: Tensor) -> Tensor:
        """(channels,), shaped so that it broadcasts against (outer, …)."""
        return values if self.last else values[:, None]

    def rows(self, y: Tensor) -> int:
        """The axis that is summed first."""
        return 1 if self.last else 2

    def count(self, y: Tensor) -> Any:
        """Values per channel."""
        return y.shape[0] * y.shape[self.rows(y)]

    def clip(self, v: Tensor) -> Tensor:
        """The activation."""
        if self.low == -math.inf and self.high == math.inf:
            return v
        return v.clamp(None if self.low == -math.inf else self.low, None if self.high == math.inf else self.high)


@dataclasses.dataclass(frozen=True)
class Moved:
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
class Code:
    """A step as generated code: both directions, and the plan that they were made for."""

    plan: Plan
    forward: Generated
    backward: Generated


def generated_code(plan: Plan) -> Code | None:
    """Both directions for a plan, compiled and checked; None where they cannot be: the log says why."""
    code = Code(plan, generated(forward, _forward_sample, plan), generated(backward, _backward_sample, plan))
    return code if code.forward.ready() and code.backward.ready() else None


def in_rows(y: Tensor) -> tuple[Tensor, bool] | None:
    """(batch, channels, …) as (outer, channels, inner), or with channels last as (outer, inner, channels), and which.

    None where its memory is in no such order.
    """
    if y.is_contiguous():
        return y.view(y.shape[0], y.shape[1], -1), False
    moved = y.movedim(1, -1)
    return (moved.view(-1, *moved.shape[-2:]), True) if moved.is_contiguous() else None


def normalize_clip_quantize(
    y: Tensor, gamma: Tensor | None, beta: Tensor | None, error: Tensor | None, moved: Moved, code: Code
) -> Tensor:
    """`fused.normalize_clip_quantize` by generated code.

    Args:
        y: (batch, channels, …), float32, in memory as `in_rows` wants it.
        gamma: `γ`, (channels,), or None for ones.
        beta: `β`, (channels,), or None for zeros.
        error: `e`, (channels,), or None for zeros; without a gradient.
        moved: What is written to.
        code: For the plan with `in_rows(y)[1]`.
    """
    out: Tensor = _Generated.apply(y, gamma, beta, error, moved, code)
    return out


class _Generated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        error: Tensor | None,
        moved: Moved,
        code: Code,
    ) -> Tensor:
        rows = in_rows(y)
        assert rows is not None
        to = moved.statistics
        kept = moved.silenced, to.running_mean, to.running_var, moved.scale, moved.zero_point, *moved.state
        out, *found = code.forward(rows[0], gamma, beta, error, *kept)
        assert out is not None
        ctx.code = code
        ctx.save_for_backward(y, gamma, beta, error, *found)
        return _like(out, y, code.plan)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        y, *saved = ctx.saved_tensors
        code: Code = ctx.code
        given = [_as_rows(tensor, code.plan) for tensor in (grads[0], y)]
        grad_y, grad_gamma, grad_beta = code.backward(*given, *saved)
        assert grad_y is not None
        wanted = ctx.needs_input_grad
        return (
            _like(grad_y, y, code.plan) if wanted[0] else None,
            grad_gamma if wanted[1] else None,
            grad_beta if wanted[2] else None,
            None,
            None,
            None,
        )


def _as_rows(tensor: Tensor, plan: Plan) -> Tensor:
    if plan.last:
        moved = tensor.movedim(1, -1).contiguous()
        return moved.view(-1, *moved.shape[-2:])
    return tensor.contiguous().view(*tensor.shape[:2], -1)


def _like(rows: Tensor, y: Tensor, plan: Plan) -> Tensor:
    """The inverse of `in_rows`, for the shape of `y`."""
    return rows.view(y.movedim(1, -1).shape).movedim(-1, 1) if plan.last else rows.view(y.shape)


def forward(
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
    """The output, (outer, …) like `y`, then μ and 1/sqrt(σ² + ε), (channels,), and s and z, ().

    Args:
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
    centre = y[0].mean(axis - 1)
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

    factor, constant = _affine(gamma, _sum(beta, error), mean, inverse)
    ends = fma(lowest, factor, constant), fma(highest, factor, constant)
    low, high = plan.clip(torch.minimum(*ends)).amin(), plan.clip(torch.maximum(*ends)).amax()
    if plan.observer is not None:
        low, high, *new = plan.observer.follow(low, high, *state)
        for old, value in zip(state, new, strict=True):
            old.copy_(value)
        found = choose_qparams(low, high, plan.spec)
        scale.copy_(found.scale)
        zero_point.copy_(found.zero_point)
    size, zero = scale.clone(), zero_point.clone()

    steps_per_unit = 1.0 / size
    value = plan.clip(fma(y, plan.wide(factor), plan.wide(constant)))
    least, most = steps_from_zero(zero, plan.spec.qmin, plan.spec.qmax)
    out = (value * steps_per_unit).round().maximum(least).minimum(most) * size
    return out, mean, inverse, size, zero


def backward(
    grad: Tensor,
    y: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    error: Tensor | None,
    mean: Tensor,
    inverse: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    plan: Plan,
) -> Tensors:
    """Gradients to `y`, like `y`, and to γ and β, (channels,).

    Args:
        grad: Like `y`.
        y: As in `forward`.
        gamma: As in `forward`.
        beta: As in `forward`.
        error: As in `forward`.
        mean: From `forward`.
        inverse: From `forward`.
        scale: From `forward`.
        zero_point: From `forward`.
        plan: That of `forward`.
    """
    axis, count = plan.rows(y), plan.count(y)
    factor, constant = _affine(gamma, _sum(beta, error), mean, inverse)
    value = fma(y, plan.wide(factor), plan.wide(constant))
    least, most = steps_from_zero(zero_point, plan.spec.qmin, plan.spec.qmax)
    steps = (value * (1.0 / scale)).round()
    inside = (steps >= least) & (steps <= most)
    if plan.low > -math.inf:
        inside = inside & (value > plan.low)
    if plan.high < math.inf:
        inside = inside & (value < plan.high)
    kept = torch.where(inside, grad, 0.0)
    centred = y - plan.wide(mean)
    total = kept.sum(axis).double().sum(0)
    along = (kept * centred).sum(axis).double().sum(0) * inverse
    shift, slope = (total / count).float(), (along / count * inverse).float()
    grad_y = (kept - plan.wide(shift) - centred * plan.wide(slope)) * plan.wide(factor)
    return grad_y, along.float(), total.float()


def _forward_sample(plan: Plan) -> list[Tensor | None]:
    """Arguments of `forward` whose sums are exact in any order: whole numbers, each with its opposite beside it."""
    generator = torch.Generator().manual_seed(0)
    half = torch.randint(-9, 10, (4, 24, 37), generator=generator).float()
    y = torch.stack((half, -half), 3).flatten(2)
    y = y.transpose(1, 2).contiguous() if plan.last else y
    gamma, beta, error = torch.randn(3, 24, generator=generator)
    grid = torch.tensor(0.05), torch.tensor(3, dtype=torch.int32)
    state = () if plan.observer is None else (value.clone() for value in plan.observer.state())
    found = [y, gamma, beta, error * 1e-3, torch.zeros(24), torch.ones(24), *grid, *state]
    found = [value.to(plan.device) for value in found]
    return [*found[:4], None, *found[4:]]


def _backward_sample(plan: Plan) -> list[Tensor | None]:
    """The same for `backward`."""
    y, gamma, beta, error, *rest = _forward_sample(plan)
    _, *found = forward(y, gamma, beta, error, *rest, plan)  # type: ignore[arg-type]
    assert y is not None
    grad = torch.randint(-5, 6, y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    return [grad, y, gamma, beta, error, *found]


def _move(running: Tensor, batch: Tensor, silenced: Tensor | None, momentum: float) -> None:
    moved = momentum * batch + (1.0 - momentum) * running
    running.copy_(moved if silenced is None else torch.where(silenced, running, moved))


def _sum(beta: Tensor | None, error: Tensor | None) -> Tensor | None:
    if beta is None or error is None:
        return error if beta is None else beta
    return beta + error


def _affine(gamma: Tensor | None, shift: Tensor | None, mean: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """`α` and `β'`."""
    factor = inverse if gamma is None else inverse * gamma
    return factor, fma(-mean, factor, torch.zeros_like(mean) if shift is None else shift)

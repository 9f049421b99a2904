"""Gradients of rounding: the straight-through estimator.

    forward    the exact value on the grid, bit for bit
    backward   ∂/∂x round(x) = 1;  a clipped value has gradient 0

With a scale `s` that is learned, and the rounding residual `r = round(x/s) − x/s` held constant (LSQ, Esser et al.
2020, equation 3): ∂(s·round(x/s))/∂s = r inside the range, and the bound that was reached outside it. With a zero point
`z` that is learned, too: ∂((code − z)·s)/∂z = 0 inside the range, where the code moves along, and −s outside it.

An expression such as `x + (q − x).detach()` has these gradients too, but where `q` is far from `x` (a clipped value)
not the bits: the sum rounds once more.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from qbench.numerics.bias import bias_codes, dequantize_bias, quantized_bias
from qbench.numerics.blocks import Scratch, at_hand, in_blocks, in_parts
from qbench.numerics.interval import interval_of, is_served, passed
from qbench.numerics.qparams import QParams, along_axis, steps_from_zero

#: What the gradient to a scale `s` is, for each value, where `c` is its code less the zero point:
#:   "none"      there is none
#:   "residual"  c − x/s inside the range, c outside; and that to the zero point −s outside        (LSQ, LSQ+)
#:   "bounds"    0 inside what the end codes stand for, c outside; the gradient to x ends there    (PACT)
GridGradient = Literal["none", "residual", "bounds"]


class _Replace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, source: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def straight_through(source: Tensor, value: Tensor) -> Tensor:
    """`value` going forward, the gradient to `source` going backward; same shape."""
    if not torch.is_grad_enabled():
        return value.detach()
    return _Replace.apply(source, value.detach())


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (factor,) = ctx.saved_tensors
        return grads[0] * factor, None


def scale_gradient(x: Tensor, factor: Tensor) -> Tensor:
    """`x` going forward, its gradient times `factor` (of the shape of `x`) going backward."""
    return _ScaleGradient.apply(x, factor)


class _FakeQuantize(torch.autograd.Function):
    """Saves a mask of one byte a value, or x and the (fresh) scale and zero point: observing again changes neither."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        qmin: int,
        qmax: int,
        axis: int | None,
        group_size: int | None,
    ) -> Tensor:
        ctx.bounds = (qmin, qmax, axis, group_size)
        plain = not any(ctx.needs_input_grad[1:3]) and scale.ndim == 0
        found = QParams(scale, zero_point, qmin, qmax, axis, group_size)
        ctx.masked = plain and at_hand(x) and not zero_point.is_floating_point() and is_served(found)
        if ctx.masked:
            out, mask = torch.empty_like(x), None
            if ctx.needs_input_grad[0]:
                mask = torch.empty_like(x, dtype=torch.int8)
            interval_of(found).quantize(x, out, mask)
            ctx.save_for_backward(mask)
            return out
        ctx.save_for_backward(x, scale, zero_point)
        return round_to_grid(x, *_wide_grid(scale, zero_point, x.ndim, *ctx.bounds))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.masked:
            return grads[0] * ctx.saved_tensors[0], *[None] * 6
        x, scale, zero_point = ctx.saved_tensors
        qmin, qmax, axis, group_size = ctx.bounds
        wide_scale, low, high = _wide_grid(scale, zero_point, x.ndim, *ctx.bounds)
        if not any(ctx.needs_input_grad[1:3]):
            return grad_inside(grads[0], x, wide_scale, low, qmax - qmin), *[None] * 6
        if group_size is None and axis in (None, 0) and at_hand(x) and at_hand(grads[0]):
            wanted = ctx.needs_input_grad[1:3]
            grad_x, to_scale, outside = _grads_in_blocks(grads[0], x, wide_scale, low, high, axis, wanted[1])
            return grad_x, to_scale if wanted[0] else None, None if outside is None else -scale * outside, *[None] * 4
        position = x.float() * (1.0 / wide_scale)
        steps = position.round()
        clipped = steps.clamp(low, high)
        inside = steps == clipped
        grad_scale = None
        if ctx.needs_input_grad[1]:
            slope = torch.where(inside, steps - position, clipped) * grads[0].float()
            grad_scale = sum_by_scale(slope, axis, group_size)
        grad_zero = None
        if ctx.needs_input_grad[2]:
            grad_zero = sum_by_scale(torch.where(inside, 0.0, grads[0].float()), axis, group_size) * -scale
        return grads[0] * inside, grad_scale, grad_zero, None, None, None, None


def _wide_grid(
    scale: Tensor, zero_point: Tensor, ndim: int, qmin: int, qmax: int, axis: int | None, group_size: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`s`, `qmin − z` and `qmax − z`, float32, shaped so that they broadcast against a tensor of `ndim` axes."""
    values = scale, *steps_from_zero(zero_point, qmin, qmax)
    wide_scale, low, high = (along_axis(value, axis, ndim, group_size) for value in values)
    return wide_scale, low, high


def round_to_grid(
    x: Tensor, scale: Tensor, low: Tensor | int | None, high: Tensor | int | None, room: Tensor | None = None
) -> Tensor:
    """`clamp(rne(x · (1/s)), low, high) · s`, computed in float32, in the shape, layout and dtype of `x`; no gradient.

    Args:
        x: float, any shape.
        scale: `s`, float32, broadcasting against `x`.
        low: `qmin − z`, float32, of the shape of `scale`; or one number for all; or None, where nothing lies outside.
        high: `qmax − z`, likewise.
        room: Where eager code puts it, like `x`; None for memory of its own.
    """
    inverse = 1.0 / scale
    if torch.compiler.is_compiling():
        steps = (x.float() * inverse).round()
        inside = steps if low is None else steps.clamp(low, high)  # type: ignore[arg-type]
        return (inside * scale).to(x.dtype)
    result = torch.empty_like(x) if room is None else room
    ends = [end for end in (low, high) if isinstance(end, Tensor)]
    for source, target, step, size, *wide_ends in in_parts(x, result, inverse, scale, *ends):
        wide = source.float()  # not in the product: of float16 with a scalar, that would be float16
        steps = target if wide is source else wide
        torch.mul(wide, step, out=steps).round_()
        if low is not None:
            torch.clamp(steps, *(wide_ends or (low, high)), out=steps)
        steps.mul_(size)
        if steps is not target:
            target.copy_(steps)
    return result


def grad_inside(grad: Tensor, x: Tensor, scale: Tensor, low: Tensor, width: int) -> Tensor:
    """The gradient of `round_to_grid` to `x`: `grad` where `low ≤ rne(x · (1/s)) ≤ low + width`, else 0.

    Args:
        grad: float, shape and dtype of `x`.
        x: float, any shape.
        scale: `s`, float32, broadcasting against `x`.
        low: `qmin − z`, float32, of the shape of `scale`.
        width: `qmax − qmin`.
    """
    inverse = 1.0 / scale
    if torch.compiler.is_compiling() or x.dtype != torch.float32 or width >= EXACT_STEPS:
        steps = (x.float() * inverse).round()
        return torch.where((steps >= low) & (steps <= low + width), grad, 0.0).to(grad.dtype)
    result, room = torch.empty_like(x), Scratch()
    for source, given, target, step, least in in_blocks(x, grad, result, inverse, low):
        above = torch.mul(source, step, out=room.like(source)).round_().sub_(least)
        passed(given, above, -0.5, width + 0.5, out=target)
    return result


def _grads_in_blocks(
    grad: Tensor, x: Tensor, scale: Tensor, low: Tensor, high: Tensor, axis: int | None, learns_zero: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients to `x` and to the scale ("residual"), and for a zero point that is learned the sum outside the grid.

    float32 on a CPU. Sums are per tensor, (), or with an axis of 0 per channel, (channels,).
    """
    result, inverse = torch.empty_like(x), 1.0 / scale
    to_scale: list[Tensor] = []
    outside: list[Tensor] = []
    first, second, third = Scratch(), Scratch(), Scratch()
    for source, given, target, step, least, most in in_blocks(x, grad, result, inverse, low, high):
        position = torch.mul(source, step, out=first.like(source))
        steps = torch.round(position, out=second.like(source))
        clipped = torch.minimum(torch.maximum(steps, least, out=third.like(source)), most, out=third.like(source))
        # 1 inside the grid, else 0, in floats: what is chosen by a bool takes an op that is not vectorised.
        inside = torch.eq(steps, clipped, out=target)
        residual = torch.sub(clipped, position.mul_(inside), out=steps)
        target.mul_(given)
        to_scale.append(_partial_sum(residual.mul_(given), axis))
        if learns_zero:
            outside.append(_partial_sum(torch.sub(given, target, out=third.like(source)), axis))
    return result, _joined(to_scale, axis), _joined(outside, axis) if learns_zero else None


def _partial_sum(block: Tensor, axis: int | None) -> Tensor:
    return block.reshape(len(block), -1).sum(1) if axis == 0 else block.sum(dtype=torch.float64)


def _joined(sums: list[Tensor], axis: int | None) -> Tensor:
    return torch.cat(sums) if axis == 0 else torch.stack(sums).sum().float()


#: Differences of steps below this are exact in float32.
EXACT_STEPS = 1 << 23


def sum_by_scale(values: Tensor, axis: int | None, group_size: int | None) -> Tensor:
    """Sum of the values that share a scale: the counterpart of `along_axis`."""
    if group_size is not None:
        return values.unflatten(1, (-1, group_size)).sum(2)
    dims = [d for d in range(values.ndim) if axis is None or d != axis % values.ndim]
    return values.sum(dims) if dims else values


def fake_quantize_ste(x: Tensor, qparams: QParams, zero_point: Tensor | None = None) -> Tensor:
    """`fake_quantize` with the straight-through gradient, in the dtype of `x` (computed in float32).

    Args:
        x: float, any shape that the grid fits.
        qparams: The grid; its scale may carry a gradient.
        zero_point: The zero point of the grid as float32, where it is learned and carries a gradient.
    """
    zero_point = qparams.zero_point if zero_point is None else zero_point
    grid = qparams.scale, zero_point, qparams.qmin, qparams.qmax, qparams.axis, qparams.group_size
    return _FakeQuantize.apply(x, *grid)


def clip_and_round(x: Tensor, qparams: QParams) -> Tensor:
    """`fake_quantize` with the gradient of the clip alone: 1 inside the range, and to the bounds outside it.

    The range is that of the real values of the lowest and highest code, without the half step beyond that still rounds
    to them. A scale that carries a gradient gets what its bounds get, and nothing from the values inside.
    """
    ends = steps_from_zero(qparams.zero_point, qparams.qmin, qparams.qmax)
    low, high = (qparams.spread(steps * qparams.scale, x) for steps in ends)
    clipped = torch.clamp(x.float(), low, high).to(x.dtype)
    return straight_through(clipped, fake_quantize_ste(x.detach(), qparams))


class _FakeQuantizeBias(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, bias: Tensor, scale: Tensor, bits: int) -> Tensor:
        codes, saturated = bias_codes(bias, scale, bits)
        ctx.save_for_backward(bias, scale, codes, saturated)
        return dequantize_bias(codes, scale, bits)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        bias, scale, codes, saturated = ctx.saved_tensors
        grad_scale = None
        if ctx.needs_input_grad[1]:
            residual = torch.where(saturated, codes.double(), codes.double() - bias.double() / scale.double())
            grad_scale = (residual * grads[0]).float()
            grad_scale = grad_scale.sum() if scale.ndim == 0 else grad_scale
        return grads[0] * ~saturated, grad_scale, None


def fake_quantize_bias_ste(bias: Tensor, scale: Tensor, bits: int) -> Tensor:
    """`b̂ = f32(q_b · s_b)` with gradients to the bias (1, or 0 where saturated) and to its scale (the residual)."""
    if not (torch.is_grad_enabled() and (bias.requires_grad or scale.requires_grad)):
        return quantized_bias(bias, scale, bits)
    return _FakeQuantizeBias.apply(bias, scale, bits)

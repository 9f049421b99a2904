"""An activation that clamps and the quantizer behind it, as generated code.

    a = clamp(v, …)      out = clamp(rne(a·(1/s)), qmin − z, qmax − z)·s

Behind a BatchNorm it is part of `qbench.numerics.generated_epilogue`. Without one, behind a sum of activations for
example, it works in place: one read for the ends of the range, one read and write, and one byte a value that says
whether its gradient passes. Where the grid is learned it is there before the tensor is, and nothing looks for ends;
what is saved then is the tensor itself, and its backward is one read and write.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qbench.numerics.blocks import dense, in_rows
from qbench.numerics.generated import BothWays, Generated, Tensors, generated, once
from qbench.numerics.interval import first_beyond
from qbench.numerics.qparams import LearnedScale, QSpec, choose_qparams, steps_from_zero, to_learned
from qbench.numerics.straight_through import GridGradient


@dataclasses.dataclass(frozen=True)
class Rounding:
    """An activation that clamps and the quantizer behind it, as far as they stay the same from step to step.

    Attributes:
        low: Lower bound of the activation; −inf where it has none.
        high: Upper bound of the activation; inf where it has none.
        spec: Of the output's grid.
        observer: Whose `follow` says how the range moves; None where it stays.
        device: Type of the device.
        gradient: To the grid.
    """

    low: float
    high: float
    spec: QSpec
    observer: Any
    device: str
    gradient: GridGradient = "none"

    def clip(self, v: Tensor) -> Tensor:
        """The activation."""
        if self.low == -math.inf and self.high == math.inf:
            return v
        return v.clamp(None if self.low == -math.inf else self.low, None if self.high == math.inf else self.high)

    def move(
        self, low: Tensor, high: Tensor, scale: Tensor, zero_point: Tensor, state: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The grid, `s` and `z`, after a tensor with these ends, as tensors of its own; writes what is remembered."""
        if self.observer is not None:
            low, high, *new = self.observer.follow(low, high, *state)
            for old, value in zip(state, new, strict=True):
                old.copy_(value)
            found = choose_qparams(low, high, self.spec)
            scale.copy_(found.scale)
            zero_point.copy_(found.zero_point)
            return once(found.scale), once(found.zero_point)
        return scale.clone(), zero_point.clone()

    def round(self, v: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """The values of `clip(v)` on the grid."""
        return self.steps(v, scale, zero_point) * scale

    def steps(self, v: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Their codes less the zero point, in floats; both clamps are one, see `qbench.numerics.interval`."""
        first, last = (steps * scale for steps in self._steps(zero_point))
        low = first if self.low == -math.inf else first.clamp(min=self.low).minimum(last)
        high = last if self.high == math.inf else last.clamp(max=self.high).maximum(first)
        inverse = once(1.0 / scale)
        return (v.maximum(once(low)).minimum(once(high)) * inverse).round()

    def passing(self, scale: Tensor, zero_point: Tensor) -> tuple[Tensor, Tensor]:
        """Where neither the activation nor the grid cuts: above the first number and below the second."""
        least, most = self._steps(zero_point)
        above, below = -first_beyond(-least, scale), first_beyond(most, scale)
        above = above if self.low == -math.inf else above.clamp(min=self.low)
        return once(above), once(below.clamp(max=self.high))

    def passed(self, grad: Tensor, v: Tensor, above: Tensor, below: Tensor) -> Tensor:
        """`grad` where it passes, between the ends of `passing`, else 0; like `v`."""
        # Two choices: in code for CPUs, an `and` of two conditions goes through integers.
        return torch.where(v > above, torch.where(v < below, grad, 0.0), 0.0)

    def _steps(self, zero_point: Tensor) -> tuple[Tensor, Tensor]:
        return steps_from_zero(zero_point, self.spec.qmin, self.spec.qmax)

    def shared(self, grad: Tensor, v: Tensor, scale: Tensor, zero_point: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Where the grid learns: `grad` where it passes, else 0, and what each value hands to `s` and to `−z·s`."""
        least, most = (once(steps) for steps in self._steps(zero_point))
        a = self.clip(v)
        position = a * once(1.0 / scale)
        steps = position.round()
        if self.gradient == "bounds":
            inside, within = (a >= once(least * scale)) & (a <= once(most * scale)), torch.zeros_like(a)
        else:
            inside, within = (steps >= least) & (steps <= most), steps - position
        passes = inside
        if self.low > -math.inf:
            passes = passes & (v > self.low)
        if self.high < math.inf:
            passes = passes & (v < self.high)
        to_scale = grad * torch.where(inside, within, steps.maximum(least).minimum(most))
        return torch.where(passes, grad, 0.0), to_scale, torch.where(inside, 0.0, grad)

    def slopes(self, v: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """∂v̂/∂s of each value, where the grid learns."""
        return self.shared(torch.ones_like(v), v, scale, zero_point)[1]

    def sample(self) -> list[Tensor]:
        """A grid and an observer's state, to try it with."""
        state = () if self.observer is None else (value.clone() for value in self.observer.state())
        found = [torch.tensor(0.05), torch.tensor(3, dtype=torch.int32), *state]
        return [value.to(self.device) for value in found]


@functools.lru_cache(maxsize=256)
def learned_code(*rounding: Any) -> BothWays:
    """The code of `round_learned`; `rounding` is what `Rounding` is made of."""
    found = Rounding(*rounding)
    fixed = dataclasses.replace(found, gradient="none")
    backward = generated(round_backward, round_backward_sample, found)
    return BothWays(generated(round_all, _round_sample, fixed), backward)


@functools.lru_cache(maxsize=256)
def clip_code(*rounding: Any) -> Generated:
    """The code of `clip_quantize`; `rounding` is what `Rounding` is made of."""
    return generated(clip, clip_sample, Rounding(*rounding))


def clip_quantize(v: Tensor, scale: Tensor, zero_point: Tensor, state: tuple[Tensor, ...], code: Generated) -> Tensor:
    """`fused.clip_quantize` by generated code: in place.

    Args:
        v: float32, any shape, without gaps in memory, and not a view.
        scale: `s`, float32, (), written to.
        zero_point: `z`, int32, (), written to.
        state: The observer's, written to.
        code: Of `clip_code`.
    """
    out: Tensor = _GeneratedClip.apply(v, scale, zero_point, state, code)
    return out


class _GeneratedClip(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, v: Tensor, scale: Tensor, zero_point: Tensor, state: tuple[Tensor, ...], code: Generated
    ) -> Tensor:
        ctx.mark_dirty(v)
        (mask,) = code(dense(v).view(-1), scale, zero_point, *state)
        assert mask is not None
        ctx.save_for_backward(mask.as_strided(v.shape, v.stride()))
        return v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0] * ctx.saved_tensors[0], None, None, None, None


class RoundingCode(Protocol):
    """`round_all` and `round_backward`, of one `Rounding`, in any language."""

    def forward(self, out: Tensor, v: Tensor, scale: Tensor, zero_point: Tensor, /) -> Any:
        """See `round_all`."""
        ...

    def backward(self, result: Tensor, grad: Tensor, v: Tensor, scale: Tensor, zero_point: Tensor, /) -> Any:
        """See `round_backward`."""
        ...


def round_learned(
    v: Tensor, scale: LearnedScale, zero_point: Tensor | None, place: Tensor, code: RoundingCode
) -> Tensor:
    """A clamp and a quantizer whose grid is learned, in one pass each way.

    Args:
        v: float32, (rows, …), without gaps in memory; nobody writes to it any more.
        scale: `s`, (), or where the spec has an axis (rows, 1) for `v` of (rows, values).
        zero_point: `z` as float32 with its gradient, of the same shape; None where it is not learned.
        place: `z` as it is, int32, of the same shape.
        code: Of `learned_code`, or of `native.steps.learned_rounding`.
    """
    out: Tensor = _RoundLearned.apply(v, scale.learned, zero_point, scale, place, code)
    return out


class _RoundLearned(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        v: Tensor,
        learned: Tensor,
        zero_point: Tensor | None,
        scale: LearnedScale,
        place: Tensor,
        code: RoundingCode,
    ) -> Tensor:
        out, (value, slope) = torch.empty_like(v), scale.resolved()
        code.forward(in_rows(out), in_rows(v), value, place)
        ctx.code = code
        ctx.save_for_backward(v, value, place, slope)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        v, *grid, slope = ctx.saved_tensors
        result = torch.empty_like(v)
        grad = grads[0] if grads[0].stride() == v.stride() else torch.empty_like(v).copy_(grads[0])
        to_scale, to_zero = ctx.code.backward(*map(in_rows, (result, grad, v)), *grid)
        found = result, to_learned(to_scale, slope), to_zero
        given = (value if needed else None for value, needed in zip(found, ctx.needs_input_grad[:3], strict=True))
        return *given, None, None, None


def round_all(out: Tensor, v: Tensor, scale: Tensor, zero_point: Tensor, rounding: Rounding) -> Tensors:
    """`out`, (rows, values), becomes `v` on the grid."""
    out.copy_(rounding.round(v, scale, zero_point))
    return ()


def round_backward(
    result: Tensor, grad: Tensor, v: Tensor, scale: Tensor, zero_point: Tensor, rounding: Rounding
) -> Tensors:
    """Gradients to `s` and `z`, of their shape; `result`, (rows, values), becomes that to `v`."""
    kept, to_scale, to_zero = rounding.shared(grad, v, scale, zero_point)
    result.copy_(kept)
    if rounding.spec.axis is None:
        grad_scale, outside = (values.sum(1).double().sum().float() for values in (to_scale, to_zero))
    else:
        grad_scale, outside = (values.sum(1, keepdim=True) for values in (to_scale, to_zero))
    return grad_scale, -scale * outside


def _round_sample(rounding: Rounding) -> list[Tensor]:
    flat, *grid = clip_sample(rounding)
    v = flat.view(200, 15)
    if rounding.spec.axis is not None:
        steps = torch.arange(1, 1 + len(v), device=v.device)[:, None]
        grid = [(value * steps / 100).to(value.dtype) for value in grid]
    return [torch.empty_like(v), v, *grid]


def round_backward_sample(rounding: Rounding) -> list[Tensor]:
    """Arguments of `round_backward` whose sums are of one value."""
    out, v, *grid = _round_sample(rounding)
    grad = torch.randint(-5, 6, v.shape, generator=torch.Generator().manual_seed(1)).to(v)
    grad = grad * (torch.arange(v.shape[1], device=v.device) == 7)  # sums of what goes to the grid are exact for one
    return [out, grad, v, *grid]


def clip(v: Tensor, scale: Tensor, zero_point: Tensor, *rest: Any) -> Tensors:
    """Where gradients pass, int8, (values,); `v`, (values,), becomes what it is on the grid."""
    *state, rounding = rest
    clipped = rounding.clip(v)
    grid = rounding.move(clipped.amin(), clipped.amax(), scale, zero_point, state)
    # A bool that is converted or stored makes Inductor's loop scalar on CPUs, ten times slower; a choice of floats not.
    mask = rounding.passed(torch.ones_like(v), v, *rounding.passing(*grid)).to(torch.int8)
    v.copy_(rounding.round(v, *grid))
    return (mask,)


def clip_sample(rounding: Rounding) -> list[Tensor]:
    """Arguments of `clip`: values inside and outside of what is cut."""
    v = torch.randn(3000, generator=torch.Generator().manual_seed(0)) * 3
    return [v.to(rounding.device), *rounding.sample()]

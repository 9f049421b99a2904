"""A layer's steps in training by the functions of `layer.cpp`.

    parameters      W, b, γ, β, μ_r, σ²_r, s_in   →   Ŵ/k, its step, e
    forward         y, γ, β, e                    →   μ, 1/sqrt(σ² + ε), α, β'; the range moves; the output
    backward        g, y, what was found          →   gradients to y, γ, β

Of the observers, the two that keep a range of minima and maxima are known here; others are served by generated code.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qbench.numerics.blocks import channels_are_last
from qbench.numerics.generated import same_bits
from qbench.numerics.generated_epilogue import Plan, backward_sample, forward_sample
from qbench.numerics.generated_epilogue import backward as backward_by_operators
from qbench.numerics.generated_epilogue import forward as forward_by_operators
from qbench.numerics.generated_rounding import Rounding, clip_sample, round_backward, round_backward_sample
from qbench.numerics.generated_rounding import clip as clip_by_operators
from qbench.numerics.generated_rounding import round_all as round_by_operators
from qbench.numerics.native.library import Library, library, trusted
from qbench.numerics.qparams import LearnedScale, QSpec
from qbench.numerics.saved_codes import Coded, fits_a_byte, lowering

# Which of the things that may be missing are there: `Given` in layer.cpp.
_BIAS, _GAMMA, _BETA, _INPUT_SCALE, _BATCH_NORM, _ERROR, _SILENCED = (1 << bit for bit in range(7))
_BATCHES, _OBSERVES, _CODES, _BOUNDS, _LEARNS, _KEEPS, _ZERO, _APART, _INPUT_APART = (1 << bit for bit in range(7, 16))


class Found(NamedTuple):
    """What `Parameters` found.

    Attributes:
        value: `Ŵ/k`, or `Ŵ` without a BatchNorm.
        step: Its scale, (out,).
        error: `e`, (out,), or `b̂` without a BatchNorm; None where the bias stays float.
        silenced: Bool (out,): channels whose weights are all 0 because of the bias.
        kept: What `Parameters.backward` needs, where that was asked for.
    """

    value: Tensor
    step: Tensor
    error: Tensor | None
    silenced: Tensor
    kept: Tensor | None


@dataclasses.dataclass(frozen=True)
class Parameters:
    """The parameters of a layer whose weight has a symmetric range a channel, and whose bias follows from it.

    The range is that of the weight, or one that is learned.

    Attributes:
        qmin: Lowest code of the weight.
        qmax: Highest code of the weight.
        bias_bits: Width of the bias.
        code_limit: Largest |q_b|; 0 where the bias stays float.
        eps: The BatchNorm's; None where there is none.
    """

    qmin: int
    qmax: int
    bias_bits: int
    code_limit: int
    eps: float | None
    functions: Library

    def __call__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        gamma: Tensor | None,
        beta: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        input_scale: Tensor | LearnedScale | None,
        room: Tensor | None = None,
        learned: LearnedScale | None = None,
        keeps: bool = False,
    ) -> Found | None:
        """As `qbench.nn.qat.parameters.training_parameters`; None where a tensor is not as C++ expects it.

        Args:
            weight: `W`, (out, …), float32 on a CPU, like all others; each channel in one piece of memory.
            bias: `b`, (out,), or None.
            gamma: `γ`, (out,), or None.
            beta: `β`, (out,), or None.
            mean: `μ_r`, (out,), with a BatchNorm.
            var: `σ²_r`, (out,), with a BatchNorm.
            input_scale: `s_in`, (), or None.
            room: Where to put the value, like `W` or contiguous; None for memory of its own.
            learned: The steps of the weight's range, (out,) each, where they are learned; else None.
            keeps: Whether to keep what `backward` needs.
        """
        channels = len(weight)
        steps, beside, factor = _parts(learned, weight)
        scale, beside_input, input_factor = _parts(input_scale, weight)
        if not self.serves(weight, bias, gamma, beta, mean, var, *(() if learned is None else (steps, beside))):
            return None
        given = (bias is not None) * _BIAS + (gamma is not None) * _GAMMA + (beta is not None) * _BETA
        given += (self.eps is not None) * _BATCH_NORM + (learned is not None) * _LEARNS + keeps * _KEEPS
        given += (beside is not steps) * _APART + (beside_input is not scale) * _INPUT_APART
        rounds = self.code_limit > 0 and input_scale is not None
        if rounds:
            if not _all_usable(1, scale, beside_input):
                return None
            given += _INPUT_SCALE
        value = torch.empty_like(weight) if room is None else room
        positions = _turned_positions(weight, value)
        if positions is None:
            return None
        step, error = weight.new_empty(channels), weight.new_empty(channels)
        silenced = weight.new_empty(channels, dtype=torch.bool)
        kept = weight.new_empty(4 * channels + 2) if keeps else None
        tensors = (weight if one is None else one for one in (bias, gamma, beta, mean, var))
        sizes = given, channels, weight.numel() // channels, positions, _bits(self.eps or 0.0)
        rule = self.qmin, self.qmax, self.bias_bits, self.code_limit, input_factor, factor
        to = value, step, error, silenced, step if kept is None else kept
        self.functions.parameters(weight, *tensors, scale, beside_input, steps, beside, *sizes, *rule, *to)
        return Found(value, step, error if rounds else None, silenced, kept)

    def backward(
        self,
        grad: Tensor,
        weight: Tensor,
        step: Tensor,
        grad_error: Tensor | None,
        kept: Tensor,
        learns: bool,
        into: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Gradients to W, to what is learned of the steps of its range, and to that of `s_in` where there is an e.

        Args:
            grad: That to the value, like `W`; written to unless there is an `into`.
            weight: `W`.
            step: As found.
            grad_error: That to e, (out,), or None.
            kept: As found.
            learns: Whether the steps are learned.
            into: Where to put the gradient to W, like W, where the steps are learned; None for the place of `grad`.
        """
        if learns and into is None:
            grad = self.in_order_of(weight, grad)
        elif learns and grad.stride() != weight.stride():
            grad = torch.empty_like(weight).copy_(grad)
        channels, given = len(weight), learns * _LEARNS + (grad_error is not None) * _ERROR + _KEEPS
        grad_step = torch.empty_like(step) if learns else step
        grad_input = weight.new_empty(())
        tensors = grad, weight, step, kept if grad_error is None else grad_error.contiguous(), kept
        sizes = given, channels, weight.numel() // channels, self.qmin, self.qmax, self.bias_bits
        grad_weight = into if learns and into is not None else grad
        self.functions.backward_of_weight(*tensors, *sizes, grad_weight, grad_step, grad_input)
        return grad_weight, grad_step if learns else None, None if grad_error is None else grad_input

    @staticmethod
    def serves(weight: Tensor, *others: Tensor | None) -> bool:
        """Whether `W` and others, (out,), are as C++ expects them."""
        return _in_one_piece(weight) and _all_usable(len(weight), *others)

    def again(self, weight: Tensor, step: Tensor, value: Tensor) -> bool:
        """Round to the value once more; answers whether that was done.

        Args:
            weight: As before.
            step: As found before.
            value: Like `W` or contiguous, written to.
        """
        channels, positions = len(weight), _turned_positions(weight, value)
        if not _in_one_piece(weight) or positions is None or not _usable(step, channels):
            return False
        sizes = channels, weight.numel() // channels, positions
        self.functions.again(weight, step, *sizes, self.qmin, self.qmax, value)
        return True

    def in_order_of(self, weight: Tensor, grad: Tensor) -> Tensor:
        """A gradient in the order of memory of `W`, which may have taken the place of the one that is given."""
        if grad.stride() == weight.stride():
            return grad
        positions = _turned_positions(weight, grad)
        if positions is None or grad.dtype is not torch.float32 or not _in_one_piece(weight):
            return torch.empty_like(weight).copy_(grad)
        self.functions.turned(grad, len(weight), weight.numel() // len(weight), positions)
        return grad.as_strided(weight.shape, weight.stride())


class Remembered(NamedTuple):
    """What a step writes to, apart from its output; on a CPU, of one piece of memory each.

    Attributes:
        mean: `μ_r`, float32, (channels,).
        var: `σ²_r`, float32, (channels,).
        batches: How many batches there were, int64, (); or None.
        min_val: The observer's lowest value, float32, (); anything where nothing observes.
        max_val: Its highest.
        scale: `s`, float32, (); only read where it is learned.
        zero_point: `z`, int32, (); likewise.
    """

    mean: Tensor
    var: Tensor
    batches: Tensor | None
    min_val: Tensor
    max_val: Tensor
    scale: Tensor | LearnedScale
    zero_point: Tensor


def kept_values(channels: int) -> int:
    """How many numbers `Following.forward` keeps: five behind those of the channels."""
    return 4 * channels + 5


class Following:
    """BatchNorm, an activation that clamps, and a quantizer per tensor.

    Args:
        plan: Either way of its channels.
        weight: Of the newest range in a moving average; −1 for the range of everything seen; None where it stays.
        functions: Of `layer.cpp`.
    """

    def __init__(self, plan: Plan, weight: float | None, functions: Library) -> None:
        rounding, spec = plan.rounding, plan.rounding.spec
        self._functions, self._fits = functions, fits_a_byte(spec)
        self._observes, self._learns = weight is not None, rounding.gradient != "none"
        self._given = self._observes * _OBSERVES + self._learns * _LEARNS + (rounding.gradient == "bounds") * _BOUNDS
        batch_norm = _bits(plan.eps), plan.momentum, 1.0 - plan.momentum
        self._grid = rounding.low, rounding.high, spec.qmin, spec.qmax, lowering(spec)
        self._rule = *batch_norm, *self._grid, int(spec.symmetric), 0.0 if weight is None else weight

    def forward(
        self,
        y: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        error: Tensor | None,
        silenced: Tensor | None,
        to: Remembered,
        with_codes: bool = False,
    ) -> tuple[Tensor, Tensor, Coded | None] | None:
        """The output, what `backward` needs, and the output's codes where they are asked for and fit into a byte.

        None where a tensor is not as C++ expects it: nothing was written to then.

        Args:
            y: (batch, channels, …), float32 on a CPU, like all others.
            gamma: `γ`, (channels,), or None for ones.
            beta: `β`, (channels,), or None for zeros.
            error: `e`, (channels,), or None for zeros.
            silenced: Bool (channels,): channels whose running statistics stay; or None.
            to: What is written to.
            with_codes: Whether to write down the codes.
        """
        sizes = _sizes(y)
        if sizes is None or not _all_usable(sizes[1], gamma, beta, error, to.mean, to.var):
            return None
        scale, beside, factor = _parts(to.scale, y)
        if not _all_usable(1, to.min_val, to.max_val, scale, beside) or not _is_counter(to.batches):
            return None
        with_codes = with_codes and self._fits
        given = self._given + (gamma is not None) * _GAMMA + (beta is not None) * _BETA + (error is not None) * _ERROR
        given += (silenced is not None) * _SILENCED + (to.batches is not None) * _BATCHES + with_codes * _CODES
        given += (beside is not scale) * _APART
        kept, out = y.new_empty(kept_values(sizes[1])), torch.empty_like(y)
        codes = torch.empty_like(y, dtype=torch.int8) if with_codes else out
        tensors = (y if one is None else one for one in (gamma, beta, error, silenced, *to[:5], scale, to.zero_point))
        self._functions.forward(y, *tensors, beside, factor, given, *sizes, *self._rule, kept, out, codes)
        if self._observes:  # autograd hears of what was written to
            torch.autograd.graph.increment_version((scale, to.zero_point))
        return out, kept, Coded(codes, kept[-2], kept[-1]) if with_codes else None

    def backward(self, grad: Tensor, y: Tensor, kept: Tensor, to_zero: bool = True) -> tuple[Tensor, ...]:
        """Gradients to y, γ and β, and where the grid learns to what is learned of `s`, and to `z`.

        Args:
            grad: That to the output.
            y: As in `forward`.
            kept: What that answered with.
            to_zero: Whether that to `z` is asked for; otherwise it is anything.
        """
        if grad.stride() != y.stride() or grad.dtype is not torch.float32:
            grad = torch.empty_like(y).copy_(grad)
        sizes = _sizes(y)
        assert sizes is not None
        grads = torch.empty_like(y), y.new_empty(sizes[1]), y.new_empty(sizes[1])
        to_grid = y.new_empty(2) if self._learns else grads[1]
        self._functions.backward(grad, y, kept, self._given + to_zero * _ZERO, *sizes, *self._grid, *grads, to_grid)
        return (*grads, *to_grid.unbind()) if self._learns else grads


def round_weight(weight: Tensor, step: Tensor, qmin: int, qmax: int, functions: Library) -> Tensor | None:
    """A weight on a symmetric grid a channel whose steps learn, with the gradient to both; None where C++ cannot.

    Args:
        weight: `W`, (out, …).
        step: `t`, (out,), float32.
        qmin: Lowest code.
        qmax: Highest code.
        functions: Of `layer.cpp`.
    """
    if not _in_one_piece(weight) or not _usable(step, len(weight)):
        return None
    out: Tensor = _RoundWeight.apply(weight, step, (qmin, qmax), functions)
    return out


class _RoundWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, step: Tensor, codes: tuple[int, int], functions: Library) -> Tensor:
        value, channels = torch.empty_like(weight), len(weight)
        functions.again(weight, step, channels, weight.numel() // channels, 1, *codes, value)
        ctx.codes, ctx.functions = codes, functions
        ctx.save_for_backward(weight, step)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, step = ctx.saved_tensors
        grad = grads[0] if grads[0].stride() == weight.stride() else torch.empty_like(weight).copy_(grads[0])
        channels, grad_weight, grad_step = len(weight), torch.empty_like(weight), torch.empty_like(step)
        sizes = _LEARNS, channels, weight.numel() // channels, *ctx.codes, 0
        none = step, step
        ctx.functions.backward_of_weight(grad, weight, step, *none, *sizes, grad_weight, grad_step, grad_step)
        return grad_weight, grad_step, None, None


@functools.lru_cache(maxsize=256)
def weight_rounding(spec: QSpec) -> Library | None:
    """The functions for `round_weight`; None where there are none, or none with the same bits.

    Args:
        spec: Of the weight: symmetric, an axis 0.
    """
    functions = library()
    if functions is None:
        return None
    rounding = Rounding(-math.inf, math.inf, spec, None, "cpu", "residual")
    out, grad, weight, scale, _ = round_backward_sample(rounding)
    zero_point = torch.zeros_like(scale, dtype=torch.int32)
    round_by_operators(out, weight, scale, zero_point, rounding)
    to_weight = torch.empty_like(weight)
    (to_scale, _) = round_backward(to_weight, grad, weight, scale, zero_point, rounding)
    w, step = weight.clone().requires_grad_(), scale.flatten().clone().requires_grad_()
    with torch.enable_grad():
        value = round_weight(w, step, spec.qmin, spec.qmax, functions)
        assert value is not None
        grads = torch.autograd.grad(value, (w, step), grad)
    found, wanted = (value.detach(), *grads), (out, to_weight, None if to_scale is None else to_scale.flatten())
    return trusted(functions, all(map(same_bits, found, wanted)))


class Clipping:
    """An activation that clamps and a quantizer per tensor, where a tensor lies.

    Args:
        rounding: Both.
        weight: As of `Following`.
        functions: Of `layer.cpp`.
    """

    def __init__(self, rounding: Rounding, weight: float | None, functions: Library) -> None:
        spec = rounding.spec
        self._functions, self._fits = functions, fits_a_byte(spec)
        self._given = 0 if weight is None else _OBSERVES
        grid = rounding.low, rounding.high, spec.qmin, spec.qmax, lowering(spec)
        self._rule = *grid, int(spec.symmetric), 0.0 if weight is None else weight

    def __call__(
        self, v: Tensor, ends: tuple[Tensor, Tensor], scale: Tensor, zero_point: Tensor, with_codes: bool = False
    ) -> tuple[Tensor, Coded | None] | None:
        """`v`, on the grid, and its codes where they are asked for and fit into a byte.

        None where a tensor is not as C++ expects it: nothing was written to then.

        Args:
            v: float32 on a CPU, any shape, without gaps in memory, and not a view: written to.
            ends: The observer's lowest and highest value, float32, (), written to; anything where nothing observes.
            scale: `s`, float32, (), written to.
            zero_point: `z`, int32, (), written to.
            with_codes: Whether to write down the codes.
        """
        if not _all_usable(1, *ends, scale):
            return None
        codes: list[Coded | None] = []
        out: Tensor = _Clip.apply(v, (*ends, scale, zero_point), self, with_codes and self._fits, codes)
        return out, codes[0]

    def clip(
        self, v: Tensor, to: tuple[Tensor, ...], with_codes: bool, out: Tensor | None = None
    ) -> tuple[Tensor, Coded | None]:
        """Where gradients pass, int8 like `v`, and the codes; the values are put to `out`, or take the place of `v`."""
        mask, kept = torch.empty_like(v, dtype=torch.int8), v.new_empty(2)
        codes = torch.empty_like(mask) if with_codes else mask
        given = self._given + with_codes * _CODES
        self._functions.clip(v, *to, given, v.numel(), *self._rule, v if out is None else out, mask, kept, codes)
        torch.autograd.graph.increment_version(to[-2:])
        return mask, Coded(codes, kept[0], kept[1]) if with_codes else None

    def backward(self, grad: Tensor, mask: Tensor) -> Tensor:
        """`grad` where it passes, else 0."""
        if grad.stride() != mask.stride() or grad.dtype is not torch.float32:
            return grad * mask
        out = torch.empty_like(grad)
        self._functions.masked(grad, mask, grad.numel(), out)
        return out


class _Clip(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, v: Tensor, to: tuple[Tensor, ...], clipping: Clipping, with_codes: bool, codes: list[Coded | None]
    ) -> Tensor:
        ctx.mark_dirty(v)
        mask, coded = clipping.clip(v, to, with_codes)
        codes.append(coded)
        ctx.clipping = clipping
        ctx.save_for_backward(mask)
        return v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.clipping.backward(grads[0], ctx.saved_tensors[0]), None, None, None, None


@functools.lru_cache(maxsize=256)
def clipping(*rounding: Any) -> Clipping | None:
    """An activation and a quantizer by C++; None where there is nothing for it, or nothing with the same bits.

    Args:
        rounding: What `Rounding` is made of: on a CPU, a grid that does not learn.
    """
    plan, functions = Rounding(*rounding), library()
    if functions is None or not _knows(plan):
        return None
    found = Clipping(plan, _weight_of(plan), functions)
    return trusted(found, _clips_alike(found, plan))


class LearnedRounding:
    """An activation that clamps and a quantizer per tensor whose grid is learned: a `BothWays` of `round_learned`.

    Args:
        rounding: Both.
        functions: Of `layer.cpp`.

    Attributes:
        rounding: Both.
    """

    def __init__(self, rounding: Rounding, functions: Library) -> None:
        spec, self.rounding = rounding.spec, rounding
        self._functions, self._given = functions, (rounding.gradient == "bounds") * _BOUNDS
        self._rule = rounding.low, rounding.high, spec.qmin, spec.qmax

    def forward(self, out: Tensor, v: Tensor, scale: Tensor, zero_point: Tensor) -> None:
        """`out` becomes `v` on the grid; all tensors are in the order of memory, as `round_learned` hands them over."""
        self._functions.rounded(v, scale, zero_point, v.numel(), *self._rule, out)

    def backward(
        self, result: Tensor, grad: Tensor, v: Tensor, scale: Tensor, zero_point: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradients to `s` and `z`; `result` becomes that to `v`."""
        found = v.new_empty(2)
        self._functions.backward_of_rounded(
            grad, v, scale, zero_point, self._given, v.numel(), *self._rule, result, found
        )
        return found[0], found[1]


@functools.lru_cache(maxsize=256)
def learned_rounding(*rounding: Any) -> LearnedRounding | None:
    """The code of `round_learned` by C++; None where there is none, or none with the same bits.

    Args:
        rounding: What `Rounding` is made of: on a CPU, a grid per tensor that learns.
    """
    plan, functions = Rounding(*rounding), library()
    if functions is None or plan.spec.axis is not None:
        return None
    found = LearnedRounding(plan, functions)
    out, grad, v, scale, zero_point = round_backward_sample(plan)
    wanted, result, wanted_result = torch.empty_like(out), torch.empty_like(v), torch.empty_like(v)
    with torch.no_grad():
        found.forward(out, v, scale, zero_point)
        round_by_operators(wanted, v, scale, zero_point, plan)
        ours = found.backward(result, grad, v, scale, zero_point)
        theirs = round_backward(wanted_result, grad, v, scale, zero_point, plan)
    pairs = zip((out, result, *ours), (wanted, wanted_result, *theirs), strict=True)
    return trusted(found, all(same_bits(a, b) for a, b in pairs))


@functools.lru_cache(maxsize=256)
def following(momentum: float, eps: float, *rounding: Any) -> Following | None:
    """The steps of a layer by C++; None where there are none, or none with the same bits.

    Args:
        momentum: Of the BatchNorm.
        eps: Of the BatchNorm.
        rounding: What `Rounding` is made of: on a CPU.
    """
    plan, functions = Plan(False, momentum, eps, Rounding(*rounding)), library()
    if functions is None or not _knows(plan.rounding):
        return None
    found = Following(plan, _weight_of(plan.rounding), functions)
    return trusted(found, all(_agrees(found, dataclasses.replace(plan, last=last)) for last in (False, True)))


def _weight_of(rounding: Rounding) -> float | None:
    weight: float | None = None if rounding.observer is None else rounding.observer.weight_of_newest
    return weight


def _knows(rounding: Rounding) -> bool:
    """Whether C++ knows how the range moves, if it does."""
    return rounding.observer is None or (_weight_of(rounding) is not None and not rounding.spec.power_of_two)


@torch.no_grad()
def _clips_alike(clip: Clipping, rounding: Rounding) -> bool:
    """Whether two calls, one after the other, give the bits of PyTorch's operators."""
    ours, theirs = clip_sample(rounding), clip_sample(rounding)
    for _ in range(2):
        v, scale, zero_point, *state = ours
        mask, coded = clip.clip(v, (*(state or (scale, scale)), scale, zero_point), fits_a_byte(rounding.spec))
        pairs = zip((mask, *ours), (*clip_by_operators(*theirs, rounding), *theirs), strict=True)
        decoded = coded is None or same_bits(coded.value() + 0.0, v + 0.0)
        grads = clip.backward(theirs[0], mask), theirs[0] * mask
        if not (decoded and same_bits(*grads) and all(same_bits(a, b) for a, b in pairs)):
            return False
        ours[0], theirs[0] = (clip_sample(rounding)[0] * 1.7 for _ in range(2))
    return True


@torch.no_grad()
def _agrees(steps: Following, plan: Plan) -> bool:
    """Whether two steps, one after the other, give the bits of PyTorch's operators."""
    ours, theirs = forward_sample(plan), forward_sample(plan)
    grad, *_ = backward_sample(plan)
    fits = fits_a_byte(plan.rounding.spec)
    if not fits:
        ours[1] = theirs[1] = None
    for _ in range(2):
        out, codes, y, gamma, beta, error, _, *rest = ours
        mean, var, scale, zero_point, *state = (value for value in rest if value is not None)
        low, high = state or (scale, scale)
        to = Remembered(mean, var, None, low, high, scale, zero_point)
        seen = _as_image(y, plan)
        found = steps.forward(seen, gamma, beta, error, None, to, fits)
        if found is None:
            return False
        _as_image(out, plan).copy_(found[0])
        kept, coded = found[1:]
        if coded is not None:
            _as_image(codes, plan).copy_(coded.codes)
        grad_y, *others = steps.backward(_as_image(grad, plan), seen, kept)
        wanted = forward_by_operators(*theirs, plan)  # type: ignore[arg-type]
        wanted_grad, *wanted_others = backward_by_operators(grad, theirs[2], *wanted[:6], plan)  # type: ignore[arg-type]
        ends: Sequence[Tensor] = kept[-4:-2].unbind()
        if plan.rounding.gradient != "none":
            ends = kept[-2], (kept[-1] + lowering(plan.rounding.spec)).to(torch.int32)
        numbers = *kept[:-5].view(4, -1), *ends, *(kept[-2:] if fits else ())
        pairs = zip((*numbers, *others, *ours), (*wanted, *wanted_others, *theirs), strict=True)
        if not all(same_bits(a, b) for a, b in pairs) or not same_bits(grad_y, _as_image(wanted_grad, plan)):
            return False
        for sample in (ours[2], theirs[2]):
            assert sample is not None
            sample.mul_(1.5)
    return True


def _as_image(values: Tensor | None, plan: Plan) -> Tensor:
    """(outer, channels, inner), or (outer, inner, channels) where that is the plan, as (outer, channels, inner)."""
    assert values is not None
    return values.movedim(-1, 1) if plan.last else values


def _bits(x: float) -> int:
    """Of a float64: the functions take numbers of 32 bits, or of 64 that are whole."""
    found: int = struct.unpack("q", struct.pack("d", x))[0]
    return found


def _parts(scale: Tensor | LearnedScale | None, otherwise: Tensor) -> tuple[Tensor, Tensor, float]:
    """The two parts of a scale, one and the same where it is as it is, and the factor."""
    if scale is None or isinstance(scale, Tensor):
        scale = LearnedScale(otherwise if scale is None else scale)
    learned, beside, factor = scale
    return learned, learned if beside is None else beside, factor


def _usable(x: Tensor | None, values: int) -> bool:
    return x is None or (x.dtype is torch.float32 and x.numel() == values and x.is_contiguous() and x.is_cpu)


def _all_usable(channels: int, *tensors: Tensor | None) -> bool:
    return all(_usable(one, channels) for one in tensors)


def _is_counter(batches: Tensor | None) -> bool:
    return batches is None or (batches.dtype is torch.int64 and batches.is_cpu)


def _in_one_piece(weight: Tensor) -> bool:
    dense = weight.is_contiguous() or bool(channels_are_last(weight))
    return dense and weight.dtype is torch.float32 and weight.is_cpu


def _turned_positions(weight: Tensor, value: Tensor) -> int | None:
    """How many positions of a row stand before its channels in `W` and behind them in `value`; None: another order.

    One where rows are alike.

    Args:
        weight: `W`, in one piece of memory.
        value: Of the same shape.
    """
    if value.stride() == weight.stride():
        return 1
    return math.prod(weight.shape[2:]) if value.is_contiguous() else None


def _sizes(y: Tensor) -> tuple[int, int, int, int] | None:
    """Batch, channels, values of each, and whether channels are last; None where memory is in neither order."""
    outer, channels = y.shape[:2]
    if y.is_contiguous():
        return outer, channels, y.numel() // (outer * channels), 0
    return (outer, channels, y.numel() // (outer * channels), 1) if channels_are_last(y) else None

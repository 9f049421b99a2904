"""A layer in training as one function with one backward: its weights, its linear part, and what follows.

    Ŵ/k, e    from W, BatchNorm and s_in    the gradient to Ŵ/k is that to W, or also one to scales that are learned
    y         = F.conv*(x̂, Ŵ/k) + b
    out       = what follows y: BatchNorm with e in its shift, activation, quantizer

Apart from fewer nodes in autograd's graph, one function knows what lies on which grid, so that backward needs less:
Ŵ/k is rounded again from W, which is there anyway, in place of being kept; and `x̂` is kept as codes where low memory
is asked for. The values are those that were used in forward, to the bit.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from qbench.numerics.blocks import Room, memory_format
from qbench.numerics.fused import Followed
from qbench.numerics.qparams import LearnedScale, QParams, to_learned
from qbench.numerics.saved_codes import Coded

#: Of more weights than this, Ŵ/k is rounded again in backward; fewer cost less memory than rounding them costs time.
KEPT_WEIGHTS, KEPT_WEIGHTS_LOW_MEMORY = 1 << 18, 1 << 13


# Over maps of at most so many values, a large convolution takes a tenth to a half more time with channels last.
_SMALL_MAP = 32

#: Of a thread, for the one `Ŵ/k` that is at work.
ROOM_OF_WEIGHTS = Room()


class Learned(NamedTuple):
    """Of the grids at a layer, what is learned, with its gradient; None where it is not.

    Attributes:
        input_scale: `s_in`, ().
        step: `t`, (out,): the steps of W.
        scale: `s` of the output, ().
        zero_point: `z` of the output as float32, ().
        place: `z` as it is where `s` is learned, int32, ().
        image: What `x̂` was rounded from, where nothing but `s_in` needs the gradient to `x̂`; see `_along_image`.
        slopes: ∂x̂/∂s_in for each value of `image`.
    """

    input_scale: LearnedScale | None = None
    step: LearnedScale | None = None
    scale: LearnedScale | None = None
    zero_point: Tensor | None = None
    place: Tensor | None = None
    image: Tensor | None = None
    slopes: Callable[[Tensor], Tensor] | None = None

    def tensors(self) -> tuple[Tensor | None, ...]:
        """What gets gradients: of the three scales, and the zero point."""
        scales = (None if one is None else one.learned for one in self[:3])
        return *scales, self.zero_point


NOTHING_LEARNED = Learned()


class TrainingParameters(NamedTuple):
    """What a layer computes with where BatchNorm normalises with the batch's statistics.

    Attributes:
        weight: `Ŵ/k`, with the gradient to `W`.
        qparams: Its grid, or None where it lies on none.
        error: `e`, (out,), with the gradient to scales that learn; None where the bias stays float.
        silenced: Bool (out,): channels whose weights are all 0; None where there is none.
        saved: What `Parameters.backward` needs.
    """

    weight: Tensor
    qparams: QParams | None
    error: Tensor | None
    silenced: Tensor | None
    saved: tuple[Tensor | None, ...] = ()


@dataclasses.dataclass(frozen=True)
class Convolution:
    """A convolution and its gradients, as PyTorch computes them.

    Attributes:
        stride: For each dimension.
        padding: For each dimension, with zeros.
        dilation: For each dimension.
        groups: Groups of channels.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(batch, in, …) -> (batch, out, …)."""
        return torch.convolution(x, weight, bias, *self._arguments())

    def backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, wanted: list[bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients to input, weight and bias, as far as they are wanted."""
        found: tuple[Tensor | None, Tensor | None, Tensor | None] = torch.ops.aten.convolution_backward.default(
            grad, x, weight, [len(weight)] if wanted[2] else None, *self._arguments(), wanted
        )
        return found

    def is_better_turned(self, x: Tensor, weight: Tensor) -> bool:
        """Whether it is faster on contiguous memory though its weight has channels last: a large one on small maps."""
        small = self.groups == 1 and math.prod(x.shape[2:]) <= _SMALL_MAP
        return small and weight.numel() > KEPT_WEIGHTS and not weight.is_contiguous()

    def output_shape(self, x: Tensor, weight: Tensor) -> tuple[int, ...]:
        """(batch, out, …), for (batch, in, …) and (out, in/groups, …)."""
        kept = zip(x.shape[2:], weight.shape[2:], self.stride, self.padding, self.dilation, strict=True)
        sizes = ((size + 2 * pad - by * (kernel - 1) - 1) // step + 1 for size, kernel, step, pad, by in kept)
        return x.shape[0], weight.shape[0], *sizes

    def _arguments(self) -> tuple[Any, ...]:
        return self.stride, self.padding, self.dilation, False, [0] * len(self.stride), self.groups


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=memory_format(True, x.ndim))


#: What follows a linear part: from y, γ, β, e and the channels that are silenced.
Follow = Callable[[Tensor, "Tensor | None", "Tensor | None", "Tensor | None", "Tensor | None"], Followed]


class Parameters(Protocol):
    """Finds `Ŵ/k` and `e`, without autograd.

    Where `room` is given, like W, `Ŵ/k` may be put there, and comes with its grid: it is not kept.
    """

    @property
    def turns(self) -> bool:
        """Whether `room` may be contiguous where W has channels last, at no cost worth mention."""
        ...

    def __call__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        gamma: Tensor | None,
        beta: Tensor | None,
        room: Tensor | None,
        learned: Learned,
    ) -> TrainingParameters:
        """From W, b, γ, β, and the scales that are learned."""
        ...

    def again(self, weight: Tensor, qparams: QParams, room: Tensor | None) -> Tensor:
        """`Ŵ/k` from W and the grid that was found."""
        ...

    def in_order_of(self, weight: Tensor, grad: Tensor) -> Tensor:
        """A gradient to `Ŵ/k` in the order of memory of W; it may take the place of the one that is given."""
        ...

    def backward(
        self,
        grad: Tensor,
        grad_error: Tensor | None,
        weight: Tensor,
        saved: tuple[Tensor | None, ...],
        learns: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Gradients to W, and to what is learned of `s_in` and `t`.

        Args:
            grad: That to `Ŵ/k`; may be written to.
            grad_error: That to `e`, or None.
            weight: W.
            saved: Of what was found.
            learns: Whether `t` is learned.
        """
        ...


class FollowByPath(Protocol):
    """A `Follow` that says which code it took, one of `qbench.report.paths.PATHS`."""

    @property
    def path(self) -> str:
        """Of the last call."""
        ...

    def __call__(
        self,
        y: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        error: Tensor | None,
        silenced: Tensor | None,
        grid: tuple[LearnedScale, Tensor] | None = None,
    ) -> Followed:
        """See `Follow`; with `s` and `z` of the output where they are learned."""
        ...


@dataclasses.dataclass(frozen=True)
class LayerStep:
    """What a layer does in training.

    Attributes:
        linear: The linear part.
        parameters: Finds `Ŵ/k` and `e`.
        follow: What follows.
        coded: A tensor as codes, to be kept for backward, or None; None where it is kept as it is.
    """

    linear: Convolution
    parameters: Parameters
    follow: FollowByPath
    coded: Callable[[Tensor], Coded | None] | None = None


def layer_step(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    step: LayerStep,
    learned: Learned = NOTHING_LEARNED,
) -> tuple[Tensor, Coded | None]:
    """The output of a layer, and its codes where they are at hand.

    Args:
        x: `x̂`, (batch, in, …).
        weight: `W`.
        bias: `b`, (out,), or None.
        gamma: `γ`, (out,), or None.
        beta: `β`, (out,), or None.
        step: What to do.
        learned: Of the grids, what is learned.
    """
    codes: list[Coded | None] = []
    more = () if learned is NOTHING_LEARNED else (learned, *learned.tensors())
    out: Tensor = _Layer.apply(x, weight, bias, gamma, beta, step, codes, *more)
    return out, codes[0]


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gamma: Tensor | None,
        beta: Tensor | None,
        step: LayerStep,
        codes: list[Coded | None],
        learned: Learned = NOTHING_LEARNED,
        *_: Tensor | None,
    ) -> Tensor:
        again = weight.numel() > (KEPT_WEIGHTS if step.coded is None else KEPT_WEIGHTS_LOW_MEMORY)
        turned = again and step.parameters.turns and step.linear.is_better_turned(x, weight)
        room = ROOM_OF_WEIGHTS.like(weight, contiguous=turned) if again else None
        found = step.parameters(weight, bias, gamma, beta, room, learned)
        y = step.linear(x.contiguous(), found.weight, bias) if turned else step.linear(x, found.weight, bias)
        y = _channels_last(y) if turned else y
        if y.size(0) == 1 and y.numel() == y.size(1):
            F.batch_norm(y, None, None, training=True)  # one value a channel: it refuses, in its own words
        grid = None if learned.scale is None or learned.place is None else (learned.scale, learned.place)
        followed = step.follow(y, gamma, beta, found.error, found.silenced, grid)
        coded = step.coded(x) if step.coded is not None and any(ctx.needs_input_grad) else None
        codes.append(followed.coded)
        ctx.step, ctx.back, ctx.coded, ctx.turned = step, followed.backward, coded is not None, turned
        grid_of_weight = ctx.grid = found.qparams if again and room is not None else None
        ctx.parameters, ctx.input_scale, ctx.slopes = len(found.saved), learned.input_scale, learned.slopes
        inputs = (x,) if coded is None else (coded.codes, coded.scale, coded.zero)
        kept = found.weight if grid_of_weight is None else None
        source = weight if kept is None or found.saved else None
        ctx.save_for_backward(source, kept, y, learned.image, *found.saved, *inputs, *followed.saved)
        return followed.out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, value, y, image, *others = ctx.saved_tensors
        found, (x, *saved) = others[: ctx.parameters], others[ctx.parameters :]
        if ctx.coded:
            x, saved = Coded(x, *saved[:2]).value(), saved[2:]
        step: LayerStep = ctx.step
        if value is None:
            value = step.parameters.again(weight, ctx.grid, ROOM_OF_WEIGHTS.like(weight, contiguous=ctx.turned))
        wanted = ctx.needs_input_grad
        of_input, of_step, *of_output = wanted[8:] or (False,) * 4
        scales_learn = of_input or of_step
        needed = True, *wanted[3:5], scales_learn, *of_output
        grad_y, grad_gamma, grad_beta, grad_error, *to_grid = ctx.back(grads[0], y, tuple(saved), needed)
        by_linear = [wanted[0], wanted[1] or scales_learn, wanted[2]]
        if ctx.turned:
            grad_y, x = grad_y.contiguous(), x.contiguous()
        grad_x, grad_weight, grad_bias = step.linear.backward(grad_y, x, value, by_linear)
        if ctx.turned:
            grad_x = None if grad_x is None else _channels_last(grad_x)
            grad_weight = None if grad_weight is None else step.parameters.in_order_of(weight, grad_weight)
        to_input = to_step = None
        if scales_learn and grad_weight is not None:
            given = grad_weight, grad_error, weight, tuple(found), of_step
            grad_weight, to_input, to_step = step.parameters.backward(*given)
        if image is not None and of_input:
            along = _along_image(ctx.input_scale, ctx.slopes(image), step.linear, value, grad_y)
            to_input = along if to_input is None else to_input + along
        to_layer = grad_x, grad_weight if wanted[1] else None, grad_bias, grad_gamma, grad_beta, None, None
        return (*to_layer, None, to_input if of_input else None, to_step, *to_grid) if wanted[7:] else to_layer


def _along_image(scale: LearnedScale, slopes: Tensor, linear: Convolution, value: Tensor, grad: Tensor) -> Tensor:
    """What the gradient to `x̂` hands to what is learned of `s_in`, (), where it is for nothing else.

        Σ (∂x̂/∂s_in) · convᵀ(g, Ŵ/k)  =  Σ g · conv(∂x̂/∂s_in, Ŵ/k)

    Of an image of few channels, the convolution on the right takes half the time of that on the left, or less.
    """
    return to_learned(torch.sum(linear(slopes, value, None) * grad), scale.resolved()[1])


def normalized(
    y: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    error: Tensor | None,
    silenced: Tensor | None,
    follow: Follow,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
) -> Tensor:
    """What follows a linear part that is a function of its own.

    Args:
        y: (batch, channels, …).
        gamma: `γ`, (channels,), or None.
        beta: `β`, (channels,), or None.
        error: `e`, (channels,), or None.
        silenced: Bool, (channels,): channels whose running statistics stay; or None.
        follow: What to do.
        scale: `s` of the output, where it is learned; else None.
        zero_point: `z`, likewise.
    """
    out: Tensor = _Normalized.apply(y, gamma, beta, error, scale, zero_point, silenced, follow)
    return out


class _Normalized(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        error: Tensor | None,
        scale: Tensor | None,
        zero_point: Tensor | None,
        silenced: Tensor | None,
        follow: Follow,
    ) -> Tensor:
        out, saved, ctx.back, _ = follow(y, gamma, beta, error, silenced)
        ctx.save_for_backward(y, *saved)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        y, *saved = ctx.saved_tensors
        return (*ctx.back(grads[0], y, tuple(saved), ctx.needs_input_grad[:6]), None, None)

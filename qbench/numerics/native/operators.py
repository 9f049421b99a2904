"""The steps of a layer as operators of PyTorch: what `torch.compile` of a whole model calls in place of tracing them.

    qbench::layer              x̂, W, …         →   the output; what it remembers moves
    qbench::layer_forward      the same        →   the output, and what backward needs
    qbench::layer_backward     g, x̂, W, y, …   →   gradients to x̂, W, b, γ and β
    qbench::clip               v, …            →   the output; what it remembers moves
    qbench::clip_forward       the same        →   the output, and where gradients pass

What a model calls, `layer` and `clip`, takes itself apart when it is called, into a function of autograd: a compiled
graph has the others alone, which know nothing of autograd, so that a call of them costs no more than it must. What
moves is written to where it lies, as in eager mode: the schemas say so, and compilers keep the order.

The convolution is part of the layer: Ŵ/k stays in the memory that a thread keeps for it, rounded once each way. Its
output has the order of memory that a compiler says (`lowering`), or that of PyTorch's convolution.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from qbench.numerics.blocks import channels_are_last, dense, memory_format
from qbench.numerics.generated_epilogue import Plan
from qbench.numerics.generated_rounding import Rounding
from qbench.numerics.layer_step import ROOM_OF_WEIGHTS, Convolution
from qbench.numerics.native.library import library
from qbench.numerics.native.steps import Clipping, Following, Parameters, Remembered, kept_values
from qbench.numerics.qparams import QSpec
from qbench.numerics.straight_through import round_to_grid

_LIBRARY = torch.library.Library("qbench", "FRAGMENT")

_OBSERVED = "Tensor(a!)? min_val, Tensor(b!)? max_val, Tensor(c!) scale, Tensor(d!) zero_point"
_LAYER = (
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? gamma, Tensor? beta, Tensor? input_scale, "
    f"Tensor(e!) mean, Tensor(f!) var, Tensor(g!)? batches, {_OBSERVED}, "
    "int[] stride, int[] padding, int[] dilation, int groups, int[] codes, int bias_bits, int code_limit, "
    "float momentum, float eps, float low, float high, int bits, bool signed, bool symmetric, float? of_newest, "
    "bool? last)"
)
_CLIP = f"(Tensor v, {_OBSERVED}, float low, float high, int bits, bool signed, bool symmetric, float? of_newest)"
_LAYER_BACKWARD = (
    "(Tensor grad, Tensor x, Tensor weight, Tensor y, Tensor step, Tensor kept, int[] stride, int[] padding, "
    "int[] dilation, int groups, int[] codes, bool[] wanted)"
)

for _schema in (
    f"layer{_LAYER} -> Tensor",
    f"layer_forward{_LAYER} -> (Tensor, Tensor, Tensor, Tensor)",
    f"layer_backward{_LAYER_BACKWARD} -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    f"clip{_CLIP} -> Tensor",
    f"clip_forward{_CLIP} -> (Tensor, Tensor)",
):
    # Memory in any order is taken as it comes: otherwise a compiler that reorders it would copy back and forth.
    _LIBRARY.define(_schema, tags=(torch.Tag.flexible_layout,))


@functools.lru_cache(maxsize=256)
def _parameters(qmin: int, qmax: int, bias_bits: int, code_limit: int, eps: float) -> Parameters:
    functions = library()
    assert functions is not None  # asked for before an operator is
    return Parameters(qmin, qmax, bias_bits, code_limit, eps, functions)


@functools.lru_cache(maxsize=256)
def _following(
    momentum: float, eps: float, low: float, high: float, bits: int, signed: bool, symmetric: bool, weight: float | None
) -> Following:
    functions = library()
    assert functions is not None  # asked for before an operator is
    spec = QSpec(bits=bits, signed=signed, symmetric=symmetric)
    return Following(Plan(False, momentum, eps, Rounding(low, high, spec, None, "cpu")), weight, functions)


@functools.lru_cache(maxsize=256)
def _clipping(low: float, high: float, bits: int, signed: bool, symmetric: bool, weight: float | None) -> Clipping:
    functions = library()
    assert functions is not None  # asked for before an operator is
    spec = QSpec(bits=bits, signed=signed, symmetric=symmetric)
    return Clipping(Rounding(low, high, spec, None, "cpu"), weight, functions)


def _layer_forward(x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    bias, gamma, beta, input_scale = (None if one is None else one.contiguous() for one in rest[:4])
    linear, (codes, bias_bits, code_limit, momentum, eps, *rounding, last) = _convolution(*rest[11:15]), rest[15:]
    turned, order = _turned(linear, x, weight, last), None if last is None else memory_format(last, x.ndim)
    with _in_one_piece(rest[4:11]) as (mean, var, batches, *grid):
        given = bias, gamma, beta, mean, var, input_scale
        rule = _parameters(*codes, bias_bits, code_limit, eps)
        room = ROOM_OF_WEIGHTS.like(weight, contiguous=turned)
        parameters = rule(weight, *given, room) or rule(weight.contiguous(), *given)
        assert parameters is not None
        seen = x.contiguous() if turned else x if order is None else x.contiguous(memory_format=order)
        y = linear(seen, parameters.value, bias)
        y = y.contiguous(memory_format=memory_format(last is not False, x.ndim)) if turned or last is not None else y
        if batches is not None and batches.dtype is not torch.int64:
            batches.add_(1)
            batches = None
        to = Remembered(mean, var, batches, *_observed(grid))
        found = _following(momentum, eps, *rounding).forward(y, gamma, beta, parameters.error, parameters.silenced, to)
        assert found is not None
    return found[0], y, found[1], parameters.step


def _turned(linear: Convolution, x: Tensor, weight: Tensor, last: bool | None) -> bool:
    """Whether to compute on contiguous memory though W has channels last."""
    return linear.is_better_turned(x, weight) or (last is False and not weight.is_contiguous())


@contextlib.contextmanager
def _in_one_piece(tensors: Sequence[Tensor | None]) -> Iterator[list[Any]]:
    """What is written to, each in one piece of memory; what was not gets the values afterwards."""
    there: list[Any] = [one if one is None else one.contiguous() for one in tensors]
    yield there
    for given, written in zip(tensors, there, strict=True):
        if given is not None and written is not None and written is not given:
            given.copy_(written)


def _observed(grid: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """The ends of a range, its scale and its zero point; where there are no ends, anything stands for them."""
    low, high, scale, zero_point = grid
    return scale if low is None else low, scale if high is None else high, scale, zero_point


def _convolution(stride: list[int], padding: list[int], dilation: list[int], groups: int) -> Convolution:
    return Convolution(tuple(stride), tuple(padding), tuple(dilation), groups)


def _layer_backward(
    grad: Tensor, x: Tensor, weight: Tensor, y: Tensor, step: Tensor, kept: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    *of_linear, codes, wanted = rest
    linear, follow = _convolution(*of_linear), _following(0.0, 1.0, -math.inf, math.inf, 8, True, False, None)
    in_order = y if y.is_contiguous() or channels_are_last(y) else y.contiguous()
    last, rule = bool(channels_are_last(in_order)), _parameters(*codes, 0, 0, 0.0)
    turned = _turned(linear, x, weight, last)
    grad_y, *others = follow.backward(grad, in_order, kept)  # of what `follow` is made of, it needs nothing
    room = ROOM_OF_WEIGHTS.like(weight, contiguous=turned)
    value = torch.empty_like(weight) if room is None else room
    if not rule.again(weight, step, value):
        value = round_to_grid(weight, step.view(-1, *[1] * (weight.ndim - 1)), *codes)
    order = memory_format(last and not turned, x.ndim)
    grad_y, seen = (one.contiguous(memory_format=order) for one in (grad_y, x))
    to_x, to_weight, to_bias = linear.backward(grad_y, seen, value, wanted)
    nothing = y.new_empty(0)
    return (
        nothing if to_x is None else _laid_out(to_x, x),
        nothing if to_weight is None else rule.in_order_of(weight, to_weight),
        nothing if to_bias is None else to_bias,
        *others,
    )


def _laid_out(value: Tensor, like: Tensor) -> Tensor:
    """The same values in the same order of memory as another tensor: what a compiler was told to expect."""
    return value if value.stride() == like.stride() else torch.empty_like(like, dtype=value.dtype).copy_(value)


def _clip_forward(v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    in_order = v if dense(v).is_contiguous() else v.contiguous()
    out = torch.empty_like(in_order)
    with _in_one_piece(rest[:4]) as grid:
        mask, _ = _clipping(*rest[4:]).clip(in_order, _observed(grid), False, out)
    return _laid_out(out, v), _laid_out(mask, v)


def _fake_forward(x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    y, last = _convolution(*rest[11:15])(x, weight, None), rest[-1]
    if last is not None:
        y = torch.empty_like(y, memory_format=memory_format(last, y.ndim))
    return torch.empty_like(y), torch.empty_like(y), x.new_empty(kept_values(len(weight))), x.new_empty(len(weight))


def _fake_backward(grad: Tensor, x: Tensor, weight: Tensor, y: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    channels, wanted = weight.shape[0], rest[-1]
    linear = torch.empty_like(x), torch.empty_like(weight), y.new_empty(channels)
    nothing, others = y.new_empty(0), (y.new_empty(channels), y.new_empty(channels))
    return *(one if asked else nothing for one, asked in zip(linear, wanted, strict=True)), *others


def _fake_clip_forward(v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return torch.empty_like(v), torch.empty_like(v, dtype=torch.int8)


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        out, y, kept, step = torch.ops.qbench.layer_forward(*arguments)
        ctx.linear = arguments[13:18]
        ctx.save_for_backward(*arguments[:2], y, step, kept)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        wanted = ctx.needs_input_grad
        found = torch.ops.qbench.layer_backward(grads[0], *ctx.saved_tensors, *ctx.linear, list(wanted[:3]))
        kept = (value if asked else None for value, asked in zip(found, wanted[:5], strict=True))
        return *kept, *[None] * (len(wanted) - len(found))


class _Clip(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        out, mask = torch.ops.qbench.clip_forward(*arguments)
        ctx.save_for_backward(mask)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return grads[0] * ctx.saved_tensors[0], *[None] * (len(ctx.needs_input_grad) - 1)


def layer(*arguments: Any) -> Tensor:
    """The output; arguments as of the operator, of which those that it remembers move."""
    found: Tensor = torch.ops.qbench.layer(*arguments)
    return found


def clip(*arguments: Any) -> Tensor:
    """The output; arguments as of the operator, of which those that it remembers move."""
    found: Tensor = torch.ops.qbench.clip(*arguments)
    return found


for _name, _function, _fake in (
    ("layer_forward", _layer_forward, _fake_forward),
    ("layer_backward", _layer_backward, _fake_backward),
    ("clip_forward", _clip_forward, _fake_clip_forward),
):
    _LIBRARY.impl(_name, _function, "CPU")
    torch.library.register_fake(f"qbench::{_name}", _fake, lib=_LIBRARY)
_LIBRARY.impl("layer", _Layer.apply, "CompositeImplicitAutograd")
_LIBRARY.impl("clip", _Clip.apply, "CompositeImplicitAutograd")

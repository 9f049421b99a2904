"""The steps of a layer as operators of PyTorch: what `torch.compile` of a whole model calls in place of tracing them.

    qbench::layer_forward      x̂, W, …         →   the output, what backward needs, and what is remembered
    qbench::layer_backward     g, x̂, W, y, …   →   gradients to x̂, W, b, γ and β
    qbench::clip               v, …            →   the output, where gradients pass, and what is remembered

They write to nothing: what moves comes back as new tensors, which the traced code copies to its place. So they can be
functionalised, and have a backward.

The convolution is part of both: Ŵ/k stays in the memory that a thread keeps for it, rounded once each way. It takes
memory in the order that is faster for it, whatever its input came in: see `takes_channels_last`.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from qbench.numerics.blocks import CHANNELS_LAST, channels_are_last, dense
from qbench.numerics.generated_epilogue import Plan
from qbench.numerics.generated_rounding import Rounding
from qbench.numerics.layer_step import ROOM_OF_WEIGHTS, Convolution
from qbench.numerics.native.library import library
from qbench.numerics.native.steps import Clipping, Following, Parameters, Remembered, kept_values
from qbench.numerics.qparams import QSpec
from qbench.numerics.straight_through import round_to_grid

_LIBRARY = torch.library.Library("qbench", "FRAGMENT")

# Memory in any order is taken as it comes: otherwise a compiler that reorders convolutions would copy back and forth.
_ANY_LAYOUT = (torch.Tag.flexible_layout,)

_LIBRARY.define(
    "layer_forward(Tensor x, Tensor weight, Tensor? bias, Tensor? gamma, Tensor? beta, Tensor? input_scale, "
    "Tensor mean, Tensor var, Tensor min_val, Tensor max_val, Tensor scale, Tensor zero_point, int[] stride, "
    "int[] padding, int[] dilation, int groups, int[] codes, int bias_bits, int code_limit, float momentum, float eps, "
    "float low, float high, int bits, bool signed, bool symmetric, float? of_newest, bool last) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=_ANY_LAYOUT,
)
_LIBRARY.define(
    "layer_backward(Tensor grad, Tensor x, Tensor weight, Tensor y, Tensor step, Tensor kept, int[] stride, "
    "int[] padding, int[] dilation, int groups, int[] codes, bool[] wanted) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=_ANY_LAYOUT,
)
_LIBRARY.define(
    "clip(Tensor v, Tensor min_val, Tensor max_val, Tensor scale, Tensor zero_point, float low, float high, int bits, "
    "bool signed, bool symmetric, float? weight) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=_ANY_LAYOUT,
)


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
    mean, var, *grid = (tensor.clone(memory_format=torch.contiguous_format) for tensor in rest[4:10])
    codes, bias_bits, code_limit, momentum, eps, *rounding, last = rest[14:]
    given = bias, gamma, beta, mean, var, input_scale
    rule = _parameters(*codes, bias_bits, code_limit, eps)
    parameters = rule(weight, *given, ROOM_OF_WEIGHTS.like(weight)) or rule(weight.contiguous(), *given)
    assert parameters is not None
    order = _order(last, x.ndim)
    y = _convolution(*rest[10:14])(x.contiguous(memory_format=order), parameters.value, bias)
    y = y.contiguous(memory_format=order)
    to = Remembered(mean, var, None, *grid)
    found = _following(momentum, eps, *rounding).forward(y, gamma, beta, parameters.error, parameters.silenced, to)
    assert found is not None
    return found[0], y, found[1], parameters.step, mean, var, *grid


def _convolution(stride: list[int], padding: list[int], dilation: list[int], groups: int) -> Convolution:
    return Convolution(tuple(stride), tuple(padding), tuple(dilation), groups)


def _order(last: bool, ndim: int) -> torch.memory_format:
    return CHANNELS_LAST.get(ndim, torch.contiguous_format) if last else torch.contiguous_format


def _layer_backward(
    grad: Tensor, x: Tensor, weight: Tensor, y: Tensor, step: Tensor, kept: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    *linear, codes, wanted = rest
    rule = _following(0.0, 1.0, -math.inf, math.inf, 8, True, False, None)  # of which backward needs nothing
    in_order = y if y.is_contiguous() or channels_are_last(y) else y.contiguous()
    grad_y, *others = rule.backward(grad, in_order, kept)
    room = ROOM_OF_WEIGHTS.like(weight)
    value = torch.empty_like(weight) if room is None else room
    if not _parameters(*codes, 0, 0, 0.0).again(weight, step, value):
        value = round_to_grid(weight, step.view(-1, *[1] * (weight.ndim - 1)), *codes)
    seen = x.contiguous(memory_format=_order(bool(channels_are_last(in_order)), x.ndim))
    pairs = zip(_convolution(*linear).backward(grad_y, seen, value, wanted), (x, weight, step), strict=True)
    nothing = y.new_empty(0)
    return *(nothing if one is None else _laid_out(one, like) for one, like in pairs), *others


def _laid_out(value: Tensor, like: Tensor) -> Tensor:
    """The same values in the same order of memory as another tensor: what a compiler was told to expect."""
    return value if value.stride() == like.stride() else torch.empty_like(like, dtype=value.dtype).copy_(value)


def _clip(v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    moved = tuple(tensor.clone(memory_format=torch.contiguous_format) for tensor in rest[:4])
    in_order = v if dense(v).is_contiguous() else v.contiguous()
    out = torch.empty_like(in_order)
    mask, _ = _clipping(*rest[4:]).clip(in_order, moved, False, out)
    return _laid_out(out, v), _laid_out(mask, v), *moved


def _fake_forward(x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    shape, order = _convolution(*rest[10:14]).output_shape(x, weight), _order(rest[-1], x.ndim)
    out, y = (torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=order) for _ in range(2))
    kept, step = x.new_empty(kept_values(len(weight))), x.new_empty(len(weight))
    return out, y, kept, step, *(torch.empty_like(one) for one in rest[4:10])


def _fake_backward(grad: Tensor, x: Tensor, weight: Tensor, y: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    channels, wanted = weight.shape[0], rest[-1]
    linear = torch.empty_like(x), torch.empty_like(weight), y.new_empty(channels)
    nothing, others = y.new_empty(0), (y.new_empty(channels), y.new_empty(channels))
    return *(one if asked else nothing for one, asked in zip(linear, wanted, strict=True)), *others


def _fake_clip(v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return torch.empty_like(v), torch.empty_like(v, dtype=torch.int8), *(torch.empty_like(one) for one in rest[:4])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.linear = inputs[12:17]
    ctx.save_for_backward(*inputs[:2], output[1], output[3], output[2])


def _backward_of_forward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    wanted = ctx.needs_input_grad
    found = torch.ops.qbench.layer_backward(grads[0], *ctx.saved_tensors, *ctx.linear, list(wanted[:3]))
    return *(value if asked else None for value, asked in zip(found, wanted[:5], strict=True)), *[None] * 23


def _keep_mask(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[1])


def _masked(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    return grads[0] * ctx.saved_tensors[0], *[None] * 10


# A dense convolution whose weight has more values than this many of an image stays contiguous.
_WEIGHTS_PER_VALUE = 8


def takes_channels_last(x: Tensor, weight: Tensor, groups: int) -> bool:
    """In which order of memory a convolution is to be taken.

    Channels last is faster for groups, and for dense ones on large maps. On small ones of many channels, weights and
    their gradients would have to change places, which costs more than it wins. Of one value a map, a weight lies in
    both orders; the input decides then.

    Args:
        x: (batch, in, …).
        weight: (out, in/groups, …).
        groups: Groups of channels.
    """
    last = CHANNELS_LAST.get(x.ndim)
    if last is None:
        return False
    if groups > 1 or not weight.is_contiguous():
        return True
    if weight.is_contiguous(memory_format=last):
        return x.is_contiguous(memory_format=last)
    return _WEIGHTS_PER_VALUE * math.prod(x.shape[1:]) > weight.numel()


def layer_forward(*arguments: Any) -> tuple[Tensor, ...]:
    """The output, three that backward needs, and the six tensors that move; arguments as of the operator."""
    found: tuple[Tensor, ...] = torch.ops.qbench.layer_forward(*arguments)
    return found


def clip(*arguments: Any) -> tuple[Tensor, ...]:
    """The output, where gradients pass, and the four tensors that move; arguments as of the operator."""
    found: tuple[Tensor, ...] = torch.ops.qbench.clip(*arguments)
    return found


for _name, _function, _fake in (
    ("layer_forward", _layer_forward, _fake_forward),
    ("layer_backward", _layer_backward, _fake_backward),
    ("clip", _clip, _fake_clip),
):
    _LIBRARY.impl(_name, _function, "CPU")
    torch.library.register_fake(f"qbench::{_name}", _fake, lib=_LIBRARY)
torch.library.register_autograd("qbench::layer_forward", _backward_of_forward, setup_context=_keep, lib=_LIBRARY)
torch.library.register_autograd("qbench::clip", _masked, setup_context=_keep_mask, lib=_LIBRARY)

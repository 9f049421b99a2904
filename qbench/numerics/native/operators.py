"""The steps of a layer as operators of PyTorch: what `torch.compile` of a whole model calls in place of tracing them.

    qbench::layer_parameters     W, …        →   Ŵ/k, its step, e, silenced channels        ∂/∂W of Ŵ/k is 1
    qbench::layer_forward        y, …        →   the output, what backward needs, and what is remembered from now on
    qbench::layer_backward       g, y, …     →   gradients to y, γ and β
    qbench::clip                 v, …        →   the output, where gradients pass, and what is remembered from now on

They write to nothing: what moves comes back as new tensors, which the traced code copies to its place. So they can be
functionalised, and have a backward.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from qbench.numerics.blocks import channels_are_last, dense
from qbench.numerics.generated_epilogue import Plan
from qbench.numerics.generated_rounding import Rounding
from qbench.numerics.native.library import library
from qbench.numerics.native.steps import Clipping, Following, Parameters, Remembered
from qbench.numerics.qparams import QSpec

_LIBRARY = torch.library.Library("qbench", "FRAGMENT")

# Memory in any order is taken as it comes: otherwise a compiler that reorders convolutions would copy back and forth.
_ANY_LAYOUT = (torch.Tag.flexible_layout,)

_LIBRARY.define(
    "layer_parameters(Tensor weight, Tensor? bias, Tensor? gamma, Tensor? beta, Tensor mean, Tensor var, "
    "Tensor? input_scale, float eps, int qmin, int qmax, int bias_bits, int code_limit) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    tags=_ANY_LAYOUT,
)
_LIBRARY.define(
    "layer_forward(Tensor y, Tensor? gamma, Tensor? beta, Tensor? error, Tensor? silenced, Tensor mean, Tensor var, "
    "Tensor min_val, Tensor max_val, Tensor scale, Tensor zero_point, float momentum, float eps, float low, "
    "float high, int bits, bool signed, bool symmetric, float? weight) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=_ANY_LAYOUT,
)
_LIBRARY.define(
    "layer_backward(Tensor grad, Tensor y, Tensor kept) -> (Tensor, Tensor, Tensor)",
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


def _layer_parameters(
    weight: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *tensors, eps, qmin, qmax, bias_bits, code_limit = rest
    given: list[Any] = [None if one is None else one.contiguous() for one in (bias, *tensors)]
    rule = _parameters(qmin, qmax, bias_bits, code_limit, eps)
    found = rule(weight, *given) or rule(weight.contiguous(), *given)
    assert found is not None
    if found.value.stride() != weight.stride():
        found = found._replace(value=torch.empty_like(weight).copy_(found.value))
    error = torch.zeros_like(found.step) if found.error is None else found.error
    return found.value, found.step, error, found.silenced


def _layer_forward(
    y: Tensor, gamma: Tensor | None, beta: Tensor | None, error: Tensor | None, silenced: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    mean, var, *grid = (tensor.clone(memory_format=torch.contiguous_format) for tensor in rest[:6])
    steps, to = _following(*rest[6:]), Remembered(mean, var, None, *grid)
    given: tuple[Any, ...]
    given = *(None if one is None else one.contiguous() for one in (gamma, beta, error, silenced)), to
    found = steps.forward(y, *given) or steps.forward(y.contiguous(), *given)
    assert found is not None
    out, kept, _ = found
    if out.stride() != y.stride():
        out = torch.empty_like(y).copy_(out)
    return out, kept, mean, var, *grid


def _layer_backward(grad: Tensor, y: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rule = _following(0.0, 1.0, -math.inf, math.inf, 8, True, False, None)  # of which backward needs nothing
    in_order = y if y.is_contiguous() or channels_are_last(y) else y.contiguous()
    grad_y, *others = rule.backward(grad, in_order, kept)
    if grad_y.stride() != y.stride():
        grad_y = torch.empty_like(y).copy_(grad_y)
    return grad_y, others[0], others[1]


def _clip(v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    moved = tuple(tensor.clone(memory_format=torch.contiguous_format) for tensor in rest[:4])
    in_order = v if dense(v).is_contiguous() else v.contiguous()
    out = torch.empty_like(in_order)
    mask, _ = _clipping(*rest[4:]).clip(in_order, moved, False, out)
    if out.stride() != v.stride():
        out, mask = (torch.empty_like(v, dtype=one.dtype).copy_(one) for one in (out, mask))
    return out, mask, *moved


def _fake_parameters(weight: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    channels = weight.shape[0]
    silenced = weight.new_empty(channels, dtype=torch.bool)
    return torch.empty_like(weight), weight.new_empty(channels), weight.new_empty(channels), silenced


def _fake_forward(y: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    kept = y.new_empty(4 * y.shape[1] + 4)
    return torch.empty_like(y), kept, *(torch.empty_like(one) for one in rest[4:10])


def _fake_backward(grad: Tensor, y: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(y), y.new_empty(y.shape[1]), y.new_empty(y.shape[1])


def _fake_clip(v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return torch.empty_like(v), torch.empty_like(v, dtype=torch.int8), *(torch.empty_like(one) for one in rest[:4])


def _straight_through(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    return grads[0], *[None] * 11


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(inputs[0], output[1])


def _backward_of_forward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    y, kept = ctx.saved_tensors
    grad_y, *others = torch.ops.qbench.layer_backward(grads[0], y, kept)
    # The gradient to e, which is added to β, is that to β.
    given = zip((*others, others[1]), ctx.needs_input_grad[1:4], strict=True)
    return grad_y, *(value if asked else None for value, asked in given), *[None] * 15


def _keep_mask(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[1])


def _masked(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    return grads[0] * ctx.saved_tensors[0], *[None] * 10


def layer_parameters(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`Ŵ/k`, its step, `e` (zeros where the bias stays float) and silenced channels; arguments as of the operator."""
    found: tuple[Tensor, Tensor, Tensor, Tensor] = torch.ops.qbench.layer_parameters(*arguments)
    return found


def layer_forward(*arguments: Any) -> tuple[Tensor, ...]:
    """The output, what backward needs, and the six tensors that move; arguments as of the operator."""
    found: tuple[Tensor, ...] = torch.ops.qbench.layer_forward(*arguments)
    return found


def clip(*arguments: Any) -> tuple[Tensor, ...]:
    """The output, where gradients pass, and the four tensors that move; arguments as of the operator."""
    found: tuple[Tensor, ...] = torch.ops.qbench.clip(*arguments)
    return found


for _name, _function, _fake in (
    ("layer_parameters", _layer_parameters, _fake_parameters),
    ("layer_forward", _layer_forward, _fake_forward),
    ("layer_backward", _layer_backward, _fake_backward),
    ("clip", _clip, _fake_clip),
):
    _LIBRARY.impl(_name, _function, "CPU")
    torch.library.register_fake(f"qbench::{_name}", _fake, lib=_LIBRARY)
torch.library.register_autograd("qbench::layer_parameters", _straight_through, lib=_LIBRARY)
torch.library.register_autograd("qbench::layer_forward", _backward_of_forward, setup_context=_keep, lib=_LIBRARY)
torch.library.register_autograd("qbench::clip", _masked, setup_context=_keep_mask, lib=_LIBRARY)

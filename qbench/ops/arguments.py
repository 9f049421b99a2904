"""What every operator checks and derives from its arguments: grids of inputs, the output's grid, the target's function.

A program stores an input's grid as `X_scale, X_zero_point`; its codes may use the whole range of their dtype. The
output's grid is `output_scale, output_zero_point, output_min, output_max, dtype`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qbench import targets
from qbench.errors import ConfigError, NumericsError
from qbench.numerics.arithmetic import Arithmetic, Grid

CODE_DTYPES = (torch.int8, torch.uint8)


def input_grid(name: str, codes: Tensor, scale: float, zero_point: int) -> Grid:
    """The grid of an operator's input, its codes checked.

    Args:
        name: Of the operator's argument, for the message.
        codes: int8 or uint8, any shape.
        scale: Positive.
        zero_point: A code of the dtype.

    Raises:
        NumericsError: not codes, or a grid that these codes cannot lie on.
    """
    if codes.dtype not in CODE_DTYPES:
        raise NumericsError(
            f"{name} has dtype {codes.dtype}; expected codes in torch.int8 or torch.uint8: quantize floats first with "
            "torch.ops.qbench.quantize_q8to"
        )
    info = torch.iinfo(codes.dtype)
    _check_scale(f"{name}_scale", scale)
    if not info.min <= zero_point <= info.max:
        raise NumericsError(
            f"{name}_zero_point is {zero_point}; expected a code of {codes.dtype}, {info.min} to {info.max}"
        )
    return Grid(scale, zero_point, info.min, info.max, codes.dtype)


def output_grid(scale: float, zero_point: int, qmin: int, qmax: int, dtype: torch.dtype, target: str) -> Grid:
    """The grid of an operator's result; `target` is only there so that a call can pass its last six arguments on.

    Raises:
        NumericsError: a dtype that holds no 8-bit codes, codes outside it, an empty range, a scale that is not
            positive.
    """
    if dtype not in CODE_DTYPES:
        raise NumericsError(f"dtype is {dtype}; expected torch.int8 or torch.uint8")
    info = torch.iinfo(dtype)
    _check_scale("output_scale", scale)
    if not info.min <= qmin <= qmax <= info.max:
        raise NumericsError(
            f"output_min {qmin} and output_max {qmax} are no range of {dtype}; expected "
            f"{info.min} <= output_min <= output_max <= {info.max}"
        )
    if not info.min <= zero_point <= info.max:
        raise NumericsError(f"output_zero_point is {zero_point}; expected a code of {dtype}, {info.min} to {info.max}")
    return Grid(scale, zero_point, qmin, qmax, dtype)


def _check_scale(name: str, scale: float) -> None:
    if not 0 < scale < float("inf"):
        raise NumericsError(f"{name} is {scale}; expected a positive, finite number")


def arithmetic_of(target: str) -> Arithmetic:
    """The arithmetic of a target.

    Raises:
        ConfigError: an unknown target, or one whose arithmetic is not stated.
    """
    arithmetic = targets.get(target).arithmetic
    if arithmetic is None:
        stated = [entry.name for entry in targets.TARGETS if entry.arithmetic is not None]
        raise ConfigError(
            f"the arithmetic of target {target!r} is not stated, so a program for it has no integer form; expected one "
            f"of {', '.join(stated)}: qbench.passes.fuse_qdq(program, target={stated[0]!r})"
        )
    return arithmetic


def operation(target: str, name: str) -> Callable[..., Tensor]:
    """The function `name` of a target's arithmetic.

    Raises:
        ConfigError: the target is unknown, or has no exact row for this operation; the message says why.
    """
    arithmetic = arithmetic_of(target)
    function: Callable[..., Tensor] | None = getattr(arithmetic, name)
    if function is None:
        reason = arithmetic.inexact.get(name, "it states no steps for it")
        raise ConfigError(
            f"target {target!r} has no exact {name}: {reason}. Keep this operation in float (q → float → dq) or build "
            "the program for another target"
        )
    return function


def check_weight(weight: Tensor, scales: Tensor, bias: Tensor | None, outputs: int) -> None:
    """Weight codes, their scales and the bias codes of a layer with `outputs` output channels.

    Raises:
        NumericsError: a wrong dtype or shape.
    """
    if weight.dtype != torch.int8:
        raise NumericsError(f"weight has dtype {weight.dtype}; expected int8 codes with zero point 0")
    if scales.dtype != torch.float32 or tuple(scales.shape) not in ((), (1,), (outputs,)):
        raise NumericsError(
            f"weight_scales is {scales.dtype} of shape {tuple(scales.shape)}; expected float32 of shape ({outputs},) "
            "or ()"
        )
    if bias is not None and (bias.dtype != torch.int32 or tuple(bias.shape) != (outputs,)):
        raise NumericsError(
            f"bias is {bias.dtype} of shape {tuple(bias.shape)}; expected int32 codes of shape ({outputs},): "
            "qbench.passes.quantize_bias(program) makes them"
        )


def channel_scale(input_scale: float, weight_scales: Tensor, trailing: int) -> Tensor:
    """`s_in · s_w`: the accumulator's scale, () or (out, 1, …) with `trailing` ones behind the channel.

    In float64, which holds the product of two float32 values exactly: whether it is rounded is the target's rule.
    """
    rounded = torch.tensor(input_scale, dtype=torch.float32, device=weight_scales.device)
    scale = weight_scales.to(torch.float64) * rounded
    return scale.reshape(()) if scale.numel() == 1 else scale.reshape(-1, *[1] * trailing)


def broadcast(a: Tensor, b: Tensor, trailing: int = 0) -> Sequence[Any]:
    """The shape that the dims of `a` and `b` have together, all but the last `trailing`; sizes may be symbols.

    Raises:
        NumericsError: they do not broadcast.
    """
    first, second = (tensor.shape[: tensor.ndim - trailing] for tensor in (a, b))
    if first == second:
        return first
    try:
        return torch.broadcast_shapes(first, second)
    except RuntimeError as error:
        raise NumericsError(
            f"a has shape {list(a.shape)} and b {list(b.shape)}; expected shapes that broadcast"
            + (f", but for the last {trailing} dims" if trailing else "")
        ) from error


def empty_like_format(shape: Sequence[Any], dtype: torch.dtype, like: Tensor) -> Tensor:
    """An empty tensor of this shape (symbols while a program is traced), in the memory format of `like`.

    A contiguous input gives a contiguous result, as programs are traced: a `view` behind it must not fail.
    """
    return torch.empty(shape, dtype=dtype, device=like.device, memory_format=memory_format(like))


def memory_format(x: Tensor) -> torch.memory_format:
    """The memory format that a result takes over from its input: channels_last if it is that alone, else contiguous."""
    last = x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format

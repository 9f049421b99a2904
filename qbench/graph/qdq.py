"""The `quantized_decomposed` operators: found where a library defines them, else defined here.

`import torch` does not register them. A namespace can be defined only once in a process, and other libraries
(ExecuTorch, torchao) import the definition that ships inside PyTorch; so that one is used as long as it exists, and the
same schemas are defined here only where nothing else offers them. Nothing happens at import: the first call of
`quantized_decomposed` does the work.

    quantize     clamp(rne(x · (1/s)) + z, qmin, qmax)
    dequantize   (q − z) · s

A scale belongs to a tensor, to a channel, or to a group of `group_size` neighbours in a row of a matrix.
"""

from __future__ import annotations

import contextlib
import importlib
from typing import Any

import torch

from qbench.numerics.qparams import along_axis, in_groups

# Modules known to register the namespace on import; tried in order.
_DEFINING_MODULES = ("torch.ao.quantization.fx._decomposed",)

_SCHEMAS = {
    "quantize_per_tensor": "(Tensor input, float scale, int zero_point, int quant_min, int quant_max, "
    "ScalarType dtype) -> Tensor",
    "dequantize_per_tensor": "(Tensor input, float scale, int zero_point, int quant_min, int quant_max, "
    "ScalarType dtype, *, ScalarType? out_dtype=None) -> Tensor",
    "quantize_per_channel": "(Tensor input, Tensor scales, Tensor zero_points, int axis, int quant_min, "
    "int quant_max, ScalarType dtype) -> Tensor",
    "dequantize_per_channel": "(Tensor input, Tensor scales, Tensor? zero_points, int axis, int quant_min, "
    "int quant_max, ScalarType dtype, *, ScalarType? out_dtype=None) -> Tensor",
    "quantize_per_channel_group": "(Tensor input, Tensor scales, Tensor zero_points, int quant_min, int quant_max, "
    "ScalarType dtype, int group_size) -> Tensor",
    "dequantize_per_channel_group": "(Tensor input, Tensor scales, Tensor? zero_points, int quant_min, int quant_max, "
    "ScalarType dtype, int group_size, ScalarType output_dtype) -> Tensor",
}


def quantized_decomposed() -> Any:
    """Return `torch.ops.quantized_decomposed` with the q and dq operators registered."""
    _register()
    return torch.ops.quantized_decomposed


def _is_registered() -> bool:
    return all(hasattr(torch.ops.quantized_decomposed, name) for name in _SCHEMAS)


def _register() -> None:
    if _is_registered():
        return
    for module in _DEFINING_MODULES:
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(module)
        if _is_registered():
            return
    define_operators(torch.library.Library("quantized_decomposed", "DEF"))


def define_operators(library: torch.library.Library) -> None:
    """Define q and dq, per tensor, channel and group, in `library` (kept alive by the caller's process).

    The kernels are composite: they run on every device and trace through fake tensors.
    """
    kernels = {
        "quantize_per_tensor": _quantize_per_tensor,
        "dequantize_per_tensor": _dequantize_per_tensor,
        "quantize_per_channel": _quantize_per_channel,
        "dequantize_per_channel": _dequantize_per_channel,
        "quantize_per_channel_group": _quantize_per_channel_group,
        "dequantize_per_channel_group": _dequantize_per_channel_group,
    }
    for name, schema in _SCHEMAS.items():
        library.define(name + schema)
        library.impl(name, kernels[name], "CompositeExplicitAutograd")
    _LIBRARIES.append(library)


# A Library unregisters its operators when it is collected.
_LIBRARIES: list[torch.library.Library] = []


def _quantize_per_tensor(
    input: torch.Tensor, scale: float, zero_point: int, quant_min: int, quant_max: int, dtype: torch.dtype
) -> torch.Tensor:
    return torch.clamp(torch.round(input.float() * (1.0 / scale)) + zero_point, quant_min, quant_max).to(dtype)


def _dequantize_per_tensor(
    input: torch.Tensor,
    scale: float,
    zero_point: int,
    quant_min: int,
    quant_max: int,
    dtype: torch.dtype,
    *,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    return (input.to(out_dtype or torch.float32) - zero_point) * scale


def _quantize_per_channel(
    input: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor,
    axis: int,
    quant_min: int,
    quant_max: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    scale, zero_point = along_axis(scales, axis, input.ndim), along_axis(zero_points, axis, input.ndim)
    return torch.clamp(torch.round(input.float() * (1.0 / scale)) + zero_point, quant_min, quant_max).to(dtype)


def _dequantize_per_channel(
    input: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None,
    axis: int,
    quant_min: int,
    quant_max: int,
    dtype: torch.dtype,
    *,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    codes = input if zero_points is None else input - along_axis(zero_points, axis, input.ndim)
    return (codes * along_axis(scales, axis, input.ndim)).to(out_dtype or torch.float32)


def _quantize_per_channel_group(
    input: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor,
    quant_min: int,
    quant_max: int,
    dtype: torch.dtype,
    group_size: int,
) -> torch.Tensor:
    scale, zero_point = (_by_group(values, input) for values in (scales, zero_points))
    steps = torch.round(in_groups(input, group_size).float() * (1.0 / scale) + zero_point)  # z inside the rounding
    return torch.clamp(steps, quant_min, quant_max).to(dtype).reshape(input.shape)


def _dequantize_per_channel_group(
    input: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None,
    quant_min: int,
    quant_max: int,
    dtype: torch.dtype,
    group_size: int,
    output_dtype: torch.dtype,
) -> torch.Tensor:
    codes = in_groups(input, group_size)
    # int8 codes minus a zero point leave int8: count in int32.
    codes = codes if zero_points is None else codes.to(torch.int32) - _by_group(zero_points, input)
    return (codes * _by_group(scales, input)).reshape(input.shape).to(output_dtype)


def _by_group(values: torch.Tensor, input: torch.Tensor) -> torch.Tensor:
    """(out · in/group_size,) in any shape -> (out, in/group_size, 1)."""
    return values.reshape(input.shape[0], -1, 1)

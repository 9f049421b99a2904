"""From real to codes, and from one grid to another.

quantize_q8to           codes of float values by the target's rule (division or reciprocal, NaN)
requantize_q8ta_q8to    the same reals on another grid: q after dq
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qbench.errors import NumericsError
from qbench.numerics.arithmetic import Grid
from qbench.ops.arguments import empty_like_format, input_grid, memory_format, operation, output_grid
from qbench.ops.library import OUT, define

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def quantize(input: Tensor, *out: Any) -> Tensor:
    """Codes of float values, any shape.

    Raises:
        NumericsError: the input is not float32 (or a narrower float, which float32 holds exactly).
        ConfigError: the target has no arithmetic.
    """
    fake_quantize(input, *out)
    codes: Tensor = operation(out[-1], "quantize")(input.to(torch.float32), output_grid(*out))
    return codes.contiguous(memory_format=memory_format(input))


def fake_quantize(input: Tensor, *out: Any) -> Tensor:
    """Shape and dtype of `quantize`."""
    if input.dtype not in _FLOATS:
        raise NumericsError(f"input has dtype {input.dtype}; expected torch.float32: pass input.to(torch.float32)")
    return empty_like_format(input.shape, output_grid(*out).dtype, input)


def requantize(input: Tensor, input_scale: float, input_zero_point: int, *out: Any) -> Tensor:
    """Codes of the same reals on the output's grid; arguments as in the schema.

    Raises:
        NumericsError: the input holds no codes.
        ConfigError: the grids differ and the target has no exact rescaling.
    """
    grid = input_grid("input", input, input_scale, input_zero_point)
    codes = on_grid(input, grid, output_grid(*out), out[-1]).contiguous(memory_format=memory_format(input))
    # An operator must not hand its input back.
    return codes.clone() if codes.data_ptr() == input.data_ptr() else codes


def fake_requantize(input: Tensor, input_scale: float, input_zero_point: int, *out: Any) -> Tensor:
    """Shape and dtype of `requantize`."""
    input_grid("input", input, input_scale, input_zero_point)
    return empty_like_format(input.shape, output_grid(*out).dtype, input)


def on_grid(codes: Tensor, grid: Grid, out: Grid, target: str) -> Tensor:
    """`codes` on another grid; on the same one they are only clamped, and returned as they are where nothing is to do.

    Raises:
        ConfigError: the grids differ and the target has no exact rescaling.
    """
    if (grid.scale, grid.zero_point, grid.dtype) == (out.scale, out.zero_point, out.dtype):
        whole = (grid.qmin, grid.qmax) == (out.qmin, out.qmax)
        return codes if whole else codes.clamp(out.qmin, out.qmax)
    return operation(target, "rescale")(codes, grid, out)


define(f"quantize_q8to(Tensor input, {OUT}", quantize, fake_quantize)
define(
    f"requantize_q8ta_q8to(Tensor input, float input_scale, int input_zero_point, {OUT}", requantize, fake_requantize
)

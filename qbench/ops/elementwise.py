"""Operators of several tensors of codes: add, sub and mul with broadcasting, and cat.

The steps are the target's (`Arithmetic.add`, `sub`, `mul`); a part of a cat that lies on the output's grid keeps its
codes, any other is `Arithmetic.rescale`d.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qbench.errors import NumericsError
from qbench.numerics.arithmetic import Grid
from qbench.ops.arguments import broadcast, input_grid, memory_format, operation, output_grid
from qbench.ops.boundary import on_grid
from qbench.ops.library import OUT, define


def _define_binary(name: str) -> None:
    def checked(
        a: Tensor, a_scale: float, a_zero_point: int, b: Tensor, b_scale: float, b_zero_point: int, *out: Any
    ) -> tuple[Grid, Grid, Grid, Sequence[Any]]:
        grids = input_grid("a", a, a_scale, a_zero_point), input_grid("b", b, b_scale, b_zero_point)
        return *grids, output_grid(*out), broadcast(a, b)

    def kernel(a: Tensor, a_scale: float, a_zero_point: int, b: Tensor, *rest: Any) -> Tensor:
        a_grid, b_grid, out, shape = checked(a, a_scale, a_zero_point, b, *rest)
        function = operation(rest[-1], name)
        if _layout(a, b) is torch.contiguous_format:
            return function(a, a_grid, b, b_grid, out).reshape(shape).contiguous()
        # The same codes in the order of memory.
        codes = function(a.permute(0, 2, 3, 1), a_grid, b.permute(0, 2, 3, 1), b_grid, out)
        return codes.contiguous().permute(0, 3, 1, 2)

    def fake(a: Tensor, a_scale: float, a_zero_point: int, b: Tensor, *rest: Any) -> Tensor:
        *_, out, shape = checked(a, a_scale, a_zero_point, b, *rest)
        return torch.empty(shape, dtype=out.dtype, device=a.device, memory_format=_layout(a, b))

    define(
        f"{name}_q8ta_q8ta_q8to(Tensor a, float a_scale, int a_zero_point, Tensor b, float b_scale, int b_zero_point, "
        f"{OUT}",
        kernel,
        fake,
    )


def _layout(*tensors: Tensor) -> torch.memory_format:
    """The memory format of a result: channels_last if every operand is and none is broadcast, else contiguous."""
    formats = {memory_format(tensor) for tensor in tensors}
    alike = len(formats) == 1 and all(tensor.shape == tensors[0].shape for tensor in tensors)
    return formats.pop() if alike else torch.contiguous_format


def cat(inputs: Sequence[Tensor], scales: Sequence[float], zero_points: Sequence[int], dim: int, *out: Any) -> Tensor:
    """Codes of a concatenation; arguments as in the schema.

    Raises:
        NumericsError: shapes, or numbers of grids, that do not fit.
        ConfigError: a part needs another grid and the target has no exact rescaling.
    """
    grids, codes = _checked_cat(inputs, scales, zero_points, dim, *out)
    parts = [on_grid(part, grid, output_grid(*out), out[-1]) for part, grid in zip(inputs, grids, strict=True)]
    return torch.cat(parts, dim, out=codes)


def _checked_cat(
    inputs: Sequence[Tensor], scales: Sequence[float], zero_points: Sequence[int], dim: int, *out: Any
) -> tuple[list[Grid], Tensor]:
    if not inputs or not len(inputs) == len(scales) == len(zero_points):
        raise NumericsError(
            f"{len(inputs)} inputs, {len(scales)} scales and {len(zero_points)} zero points; expected one scale and "
            "one zero point for each of at least one input"
        )
    named = zip(inputs, scales, zero_points, strict=True)
    grids = [input_grid(f"inputs[{index}]", *part) for index, part in enumerate(named)]
    first, dims = inputs[0], inputs[0].ndim
    if not -dims <= dim < dims:
        raise NumericsError(f"dim is {dim}; expected a dimension of inputs of shape {list(first.shape)}")
    axis = dim % dims
    for part in inputs[1:]:
        fits = part.ndim == dims and all(
            part.shape[other] == first.shape[other] for other in range(dims) if other != axis
        )
        if not fits:
            raise NumericsError(
                f"inputs of shapes {[list(part.shape) for part in inputs]} do not fit along dim {dim}; expected equal "
                "sizes in every other dimension"
            )
    shape = list(first.shape)
    shape[axis] = sum(part.shape[axis] for part in inputs)
    formats = {memory_format(part) for part in inputs}
    layout = formats.pop() if len(formats) == 1 else torch.contiguous_format
    return grids, torch.empty(shape, dtype=output_grid(*out).dtype, device=first.device, memory_format=layout)


for _name in ("add", "sub", "mul"):
    _define_binary(_name)
define(
    f"cat_q8ta_q8to(Tensor[] inputs, float[] scales, int[] zero_points, int dim, {OUT}",
    cat,
    lambda *given: _checked_cat(*given)[1],
)

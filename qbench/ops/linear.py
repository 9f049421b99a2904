"""A linear layer on codes.

    acc = (x − z) · wᵀ + bias                       exact (see `qbench.ops.exact`)
    y   = requantize(acc, f32(s_in · s_w))          the target's

Shapes: input (…, in), weight (out, in), weight_scales (out,) or (), bias (out,), result (…, out).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qbench.errors import NumericsError
from qbench.numerics.arithmetic import Grid
from qbench.ops import exact
from qbench.ops.arguments import channel_scale, check_weight, input_grid, operation, output_grid
from qbench.ops.library import OUT, define
from qbench.ops.plans import remembered


def linear(
    input: Tensor,
    input_scale: float,
    input_zero_point: int,
    weight: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None,
    *out: Any,
) -> Tensor:
    """Codes of a linear layer; arguments as in the schema.

    Raises:
        NumericsError: dtypes or shapes that do not fit.
        ConfigError: the target has no arithmetic.
    """
    grid, codes = _checked(input, input_scale, input_zero_point, weight, weight_scales, bias, *out)
    requantize = operation(out[-1], "requantize")
    if codes.numel() == 0:
        return codes
    float32 = exact.float32_is_summed(input.device, "matmul")
    plan = remembered(
        weight,
        bias,
        (grid.zero_point, grid.dtype, float32),
        lambda: exact.plan(weight[..., None], bias, grid, float32=float32),
    )
    parts, weights = plan.parts, plan.floats(weight)
    acc = exact.add_parts(input, grid, -1, parts, lambda run, index: F.linear(run, weights[index], parts[index].bias))
    return requantize(acc, channel_scale(input_scale, weight_scales, 0), output_grid(*out))


def fake_linear(
    input: Tensor,
    input_scale: float,
    input_zero_point: int,
    weight: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None,
    *out: Any,
) -> Tensor:
    """Shape and dtype of `linear`."""
    return _checked(input, input_scale, input_zero_point, weight, weight_scales, bias, *out)[1]


def _checked(
    input: Tensor,
    input_scale: float,
    input_zero_point: int,
    weight: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None,
    *out: Any,
) -> tuple[Grid, Tensor]:
    """The input's grid and an empty result."""
    grid = input_grid("input", input, input_scale, input_zero_point)
    if weight.ndim != 2 or input.ndim == 0 or input.shape[-1] != weight.shape[1]:
        raise NumericsError(
            f"input has shape {list(input.shape)} and weight {list(weight.shape)}; expected (…, in) and (out, in)"
        )
    check_weight(weight, weight_scales, bias, int(weight.shape[0]))
    shape = [*input.shape[:-1], weight.shape[0]]
    return grid, torch.empty(shape, dtype=output_grid(*out).dtype, device=input.device)


define(
    "linear_q8ta_q8csw_q8to(Tensor input, float input_scale, int input_zero_point, Tensor weight, "
    f"Tensor weight_scales, Tensor? bias, {OUT}",
    linear,
    fake_linear,
)

"""Pools on codes.

max        codes -> codes on the same grid: order is kept, padding never wins
average    over windows, `Arithmetic.average_pool`
mean       over whole dimensions, `Arithmetic.global_average` of Σ (c − z), which is summed in integers
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from qbench.errors import NumericsError
from qbench.numerics.arithmetic import Grid, Window
from qbench.ops.arguments import empty_like_format, input_grid, operation, output_grid
from qbench.ops.geometry import numbers
from qbench.ops.library import OUT, define


class Windows(NamedTuple):
    """Numbers per dimension of a pool."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    ceil_mode: bool

    def shape(self, input: Tensor) -> list[Any]:
        """Shape of the result, symbols included.

        Raises:
            NumericsError: too few dimensions, padding beyond half a kernel, or an input smaller than the kernel.
        """
        dims = len(self.kernel)
        if input.ndim not in (dims + 1, dims + 2):
            raise NumericsError(f"input has shape {list(input.shape)}; expected (batch, channels and {dims} sizes)")
        if any(2 * pad > size for pad, size in zip(self.padding, self.kernel, strict=True)):
            raise NumericsError(
                f"padding is {list(self.padding)}; expected at most half of the kernel {list(self.kernel)}"
            )
        return [*input.shape[:-dims], *(self._size(axis, size) for axis, size in enumerate(input.shape[-dims:]))]

    def _size(self, axis: int, size: Any) -> Any:
        """With `ceil_mode` a last window may start inside the input or its left padding and end beyond both."""
        step, pad = self.stride[axis], self.padding[axis]
        room = size + 2 * pad - self.dilation[axis] * (self.kernel[axis] - 1) - 1
        count = (room + (step - 1 if self.ceil_mode else 0)) // step + 1
        if self.ceil_mode and (count - 1) * step >= size + pad:
            count = count - 1
        if count <= 0:
            raise NumericsError(f"an input of size {size} is too small for windows {self}")
        return count


def windows(
    dims: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> Windows:
    """The checked numbers of a pool; an empty stride is the kernel's size."""
    kernel = numbers("kernel_size", kernel_size, dims, 1)
    return Windows(
        kernel,
        numbers("stride", stride or kernel, dims, 1),
        numbers("padding", padding, dims, 0),
        numbers("dilation", dilation, dims, 1),
        ceil_mode,
    )


def _define_max_pool(dims: int) -> None:
    def checked(input: Tensor, *sizes: Any) -> tuple[Tensor, Windows]:
        input_grid("input", input, 1.0, 0)
        found = windows(dims, *sizes)
        return empty_like_format(found.shape(input), input.dtype, input), found

    def kernel(input: Tensor, *sizes: Any) -> Tensor:
        codes, found = checked(input, *sizes)
        return codes if codes.numel() == 0 else codes.copy_(_max_pool(input, found, codes.shape))

    define(
        f"max_pool{dims}d_q8ta(Tensor input, int[] kernel_size, int[] stride, int[] padding, int[] dilation, "
        "bool ceil_mode) -> Tensor",
        kernel,
        lambda *given: checked(*given)[0],
    )


def _max_pool(x: Tensor, sizes: Windows, shape: Sequence[int]) -> Tensor:
    """The greatest code of every window, one axis after the other.

    PyTorch's own pool of integers is 15 times slower, and refuses large channels_last inputs.
    """
    first = x.ndim - len(sizes.kernel)
    for position, numbers_of_axis in enumerate(zip(*sizes[:4], strict=True)):
        x = _greatest(x, first + position, shape[first + position], *numbers_of_axis)
    return x


def _greatest(x: Tensor, axis: int, count: int, kernel: int, stride: int, padding: int, dilation: int) -> Tensor:
    """A max pool along one axis: the maximum of one strided view for each position of the kernel."""
    reach = (count - 1) * stride + 1
    behind = max(0, reach + dilation * (kernel - 1) - padding - x.shape[axis])
    if padding or behind:
        x = F.pad(x, [0, 0] * (x.ndim - 1 - axis) + [padding, behind], value=torch.iinfo(x.dtype).min)
    steps = (slice(None),) * axis + (slice(None, None, stride),)
    views = [x.narrow(axis, dilation * position, reach)[steps] for position in range(kernel)]
    return functools.reduce(torch.maximum, views)


def average_pool(
    input: Tensor,
    input_scale: float,
    input_zero_point: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
    *out: Any,
) -> Tensor:
    """Codes of an average over windows; arguments as in the schema.

    Raises:
        NumericsError: dtypes or shapes that do not fit.
        ConfigError: the target has no exact average pool.
    """
    grid, window, codes = _checked_average(
        input,
        input_scale,
        input_zero_point,
        kernel_size,
        stride,
        padding,
        ceil_mode,
        count_include_pad,
        divisor_override,
        *out,
    )
    function = operation(out[-1], "average_pool")
    if codes.numel() == 0:
        return codes
    batched = input if input.ndim == 4 else input.unsqueeze(0)
    return codes.copy_(function(batched, grid, output_grid(*out), window).reshape(codes.shape))


def _checked_average(
    input: Tensor,
    input_scale: float,
    input_zero_point: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
    *out: Any,
) -> tuple[Grid, Window, Tensor]:
    grid = input_grid("input", input, input_scale, input_zero_point)
    if divisor_override == 0:
        raise NumericsError("divisor_override is 0; expected None or a divisor that is not 0")
    sizes = windows(2, kernel_size, stride, padding, (1,), ceil_mode)
    kernel, steps, pads = ((pair[0], pair[1]) for pair in (sizes.kernel, sizes.stride, sizes.padding))
    window = Window(kernel, steps, pads, ceil_mode, count_include_pad, divisor_override)
    return grid, window, empty_like_format(sizes.shape(input), output_grid(*out).dtype, input)


def global_average(
    input: Tensor, input_scale: float, input_zero_point: int, dim: Sequence[int], keepdim: bool, *out: Any
) -> Tensor:
    """Codes of the mean over dimensions (all of them where `dim` is empty); arguments as in the schema.

    Raises:
        NumericsError: dimensions that the input does not have, or a mean of nothing.
        ConfigError: the target has no exact mean.
    """
    grid, axes, codes = _checked_mean(input, input_scale, input_zero_point, dim, keepdim, *out)
    function = operation(out[-1], "global_average")
    if codes.numel() == 0:
        return codes
    count = math.prod(input.shape[axis] for axis in axes)
    if count == 0:
        raise NumericsError(f"the mean of no value: input has shape {list(input.shape)}, dim is {list(dim)}")
    sums = input.sum(axes, keepdim=keepdim, dtype=torch.int64) - count * grid.zero_point
    return codes.copy_(function(sums, count, grid, output_grid(*out)))


def _checked_mean(
    input: Tensor, input_scale: float, input_zero_point: int, dim: Sequence[int], keepdim: bool, *out: Any
) -> tuple[Grid, list[int], Tensor]:
    grid = input_grid("input", input, input_scale, input_zero_point)
    wanted = list(dim) or list(range(input.ndim))
    axes = sorted({axis % input.ndim for axis in wanted if -input.ndim <= axis < input.ndim})
    if len(axes) != len(wanted):
        raise NumericsError(f"dim is {list(dim)}; expected different dimensions of an input of {input.ndim}")
    shape = [1 if axis in axes else size for axis, size in enumerate(input.shape) if keepdim or axis not in axes]
    return grid, axes, torch.empty(shape, dtype=output_grid(*out).dtype, device=input.device)


for _dims in (1, 2, 3):
    _define_max_pool(_dims)
define(
    "avg_pool2d_q8ta_q8to(Tensor input, float input_scale, int input_zero_point, int[2] kernel_size, int[2] stride, "
    "int[2] padding, bool ceil_mode, bool count_include_pad, int? divisor_override, "
    f"{OUT}",
    average_pool,
    lambda *given: _checked_average(*given)[2],
)
define(
    f"global_avg_pool_q8ta_q8to(Tensor input, float input_scale, int input_zero_point, int[] dim, bool keepdim, {OUT}",
    global_average,
    lambda *given: _checked_mean(*given)[2],
)

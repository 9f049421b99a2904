"""Geometry of a convolution: numbers, checked, and the shape that they give.

forward       size' = floor((size + 2·padding − dilation·(kernel − 1) − 1) / stride) + 1
transposed    size' = (size − 1)·stride − 2·padding + dilation·(kernel − 1) + output_padding + 1
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from qbench.errors import NumericsError


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Numbers per dimension of a convolution (there are `len(stride)`); `groups` divides both channel counts."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    transposed: bool = False
    output_padding: tuple[int, ...] = ()

    @property
    def dims(self) -> int:
        """Number of dimensions that the kernel moves along."""
        return len(self.stride)

    def outputs(self, weight: Tensor) -> int:
        """Number of output channels."""
        return int(weight.shape[1]) * self.groups if self.transposed else int(weight.shape[0])

    def shape(self, input: Tensor, weight: Tensor) -> list[Any]:
        """Shape of the result, symbols included; without a batch where the input has none.

        Raises:
            NumericsError: shapes that do not fit together.
        """
        self._check(input, weight)
        sizes = zip(input.shape[-self.dims :], weight.shape[2:], strict=True)
        spatial = [self._size(position, size, kernel) for position, (size, kernel) in enumerate(sizes)]
        return [*input.shape[: -self.dims - 1], self.outputs(weight), *spatial]

    def read(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Geometry]:
        """The part of a batched input that is read, and the geometry on it.

        A kernel of one position with a stride skips the rest.
        """
        if self.transposed or any(self.padding) or set(weight.shape[2:]) != {1} or set(self.stride) == {1}:
            return x, self
        for axis, stride in enumerate(self.stride, start=2):
            x = x[(slice(None),) * axis + (slice(None, None, stride),)]
        return x, dataclasses.replace(self, stride=(1,) * self.dims)

    def _size(self, position: int, size: Any, kernel: int) -> Any:
        stride, padding, dilation = self.stride[position], self.padding[position], self.dilation[position]
        span = dilation * (kernel - 1) + 1
        if self.transposed:
            found = (size - 1) * stride - 2 * padding + span + self.output_padding[position]
        else:
            found = (size + 2 * padding - span) // stride + 1
        if found <= 0:
            raise NumericsError(
                f"an input of size {size} is too small for a kernel of {kernel} with padding {padding} and dilation "
                f"{dilation}: the result would have size {found}"
            )
        return found

    def _check(self, input: Tensor, weight: Tensor) -> None:
        if weight.ndim != self.dims + 2 or input.ndim not in (self.dims + 1, self.dims + 2):
            raise NumericsError(
                f"input has shape {list(input.shape)} and weight {list(weight.shape)}; expected (batch, channels and "
                f"{self.dims} sizes) and a weight of {self.dims + 2} dimensions"
            )
        sizes = zip(self.output_padding, self.stride, self.dilation, strict=self.transposed)
        if any(extra >= max(stride, dilation) for extra, stride, dilation in sizes):
            raise NumericsError(
                f"output_padding is {list(self.output_padding)}; expected less than the stride {list(self.stride)} or "
                f"the dilation {list(self.dilation)}"
            )
        channels = input.shape[-self.dims - 1]
        wanted = weight.shape[0] if self.transposed else weight.shape[1] * self.groups
        if channels != wanted or weight.shape[0] % self.groups:
            form = "(in, out / groups, …)" if self.transposed else "(out, in / groups, …)"
            raise NumericsError(
                f"input of shape {list(input.shape)} has {channels} channels, weight of shape {list(weight.shape)} "
                f"with groups={self.groups} takes {wanted}; expected a weight {form}, in and out divisible by groups"
            )


def numbers(name: str, values: Sequence[int], count: int, least: int) -> tuple[int, ...]:
    """`values` as `count` numbers; one number stands for all.

    Raises:
        NumericsError: another length, or a number below `least`.
    """
    listed = tuple(values) * count if len(values) == 1 else tuple(values)
    if len(listed) != count or any(value < least for value in listed):
        raise NumericsError(f"{name} is {list(values)}; expected {count} numbers that are at least {least}")
    return listed

"""Functional operations as modules, so that they can own the quantizer of their output.

`qbench.fuse` puts them where a model adds, subtracts, multiplies, concatenates or averages tensors; in a model with
Python control flow they are written by hand: `self.add = qbench.nn.Add()`, then `self.add(x, y)` for `x + y`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qbench.nn.functional_calls import FunctionalCalls


class Operation(FunctionalCalls):
    """Base of the modules of this file, whose forward is one operation: `fuse` does not look inside."""


class Add(Operation):
    """`x + y`."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Tensors of shapes that broadcast -> their sum."""
        return torch.add(x, y)


class AddReLU(Add):
    """`relu(x + y)`, one op on most integer hardware."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Tensors of shapes that broadcast -> the rectified sum."""
        return F.relu(torch.add(x, y))


class Sub(Operation):
    """`x − y`."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Tensors of shapes that broadcast -> their difference."""
        return torch.sub(x, y)


class Mul(Operation):
    """`x · y`."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Tensors of shapes that broadcast -> their product."""
        return torch.mul(x, y)


class Cat(Operation):
    """Concatenation along one axis.

    Args:
        dim: The axis.
    """

    def __init__(self, dim: int = 0) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, *tensors: Tensor) -> Tensor:
        """Tensors that differ in size along `dim` only -> one tensor."""
        return torch.cat(tensors, self.dim)

    def extra_repr(self) -> str:
        """The axis."""
        return f"dim={self.dim}"


class Mean(Operation):
    """The average over some axes; over those of the plane, a global average pool.

    Args:
        dim: The axes.
        keepdim: Keep them, with size 1.
    """

    def __init__(self, dim: int | Sequence[int], keepdim: bool = False) -> None:
        super().__init__()
        self.dim = (dim,) if isinstance(dim, int) else tuple(dim)
        self.keepdim = keepdim

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, high, wide) -> (batch, channels) for `dim=(2, 3)`."""
        return torch.mean(x, self.dim, self.keepdim)

    def extra_repr(self) -> str:
        """The axes."""
        return f"dim={self.dim}, keepdim={self.keepdim}"

"""Functional operations as modules, so that they can own the quantizer of their output.

`qbench.fuse` puts them where a model adds, multiplies or concatenates tensors; in a model with Python control flow
they are written by hand: `self.add = qbench.nn.Add()`, then `self.add(x, y)` for `x + y`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Add(nn.Module):
    """`x + y`."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Tensors of shapes that broadcast -> their sum."""
        return torch.add(x, y)


class AddReLU(Add):
    """`relu(x + y)`, one op on most integer hardware."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Tensors of shapes that broadcast -> the rectified sum."""
        return F.relu(torch.add(x, y))


class Mul(nn.Module):
    """`x · y`."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Tensors of shapes that broadcast -> their product."""
        return torch.mul(x, y)


class Cat(nn.Module):
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

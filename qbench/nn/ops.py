"""Functional operations as modules, so that they can own the quantizer of their output.

`qbench.fuse` puts them where a model adds, multiplies, concatenates or averages tensors, and the like; in a model with
Python control flow they are written by hand: `self.add = qbench.nn.Add()`, then `self.add(x, y)` for `x + y`.

One operand may be a number. Then the operation is a function of one value, whose output gets a grid of its own like any
other: the range is observed, a learned scale is learned, and what is deployed is a table of 256 codes. (A new scale for
the same codes would do for a product, and cost nothing; but runtimes know no operator that renames a scale.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qbench.nn.functional_calls import FunctionalCalls

# A tensor, a Python number, or a number that is computed from sizes.
Operand = Any


class Operation(FunctionalCalls):
    """Base of the modules of this file, whose forward is one operation: `fuse` does not look inside."""


class Add(Operation):
    """`x + y`."""

    def forward(self, x: Operand, y: Operand) -> Tensor:
        """Tensors of shapes that broadcast, or a tensor and a number -> their sum."""
        return _tensor(x + y)


class AddReLU(Add):
    """`relu(x + y)`, one op on most integer hardware."""

    def forward(self, x: Operand, y: Operand) -> Tensor:
        """Tensors of shapes that broadcast, or a tensor and a number -> the rectified sum."""
        return F.relu(_tensor(x + y))


class Sub(Operation):
    """`x − y`."""

    def forward(self, x: Operand, y: Operand) -> Tensor:
        """Tensors of shapes that broadcast, or a tensor and a number -> their difference."""
        return _tensor(x - y)


class Mul(Operation):
    """`x · y`."""

    def forward(self, x: Operand, y: Operand) -> Tensor:
        """Tensors of shapes that broadcast, or a tensor and a number -> their product."""
        return _tensor(x * y)


class Div(Operation):
    """`x / y`."""

    def forward(self, x: Operand, y: Operand) -> Tensor:
        """Tensors of shapes that broadcast, or a tensor and a number -> their quotient."""
        return _tensor(x / y)


class MatMul(Operation):
    """`x @ y`: of two activations, or of an activation and a parameter that belongs to no layer."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """(…, rows, inner), (…, inner, columns) -> (…, rows, columns)."""
        return torch.matmul(x, y)


def spread(inputs: Iterable[Any]) -> Iterator[Any]:
    """Arguments one by one, with the tensors of a list in place of the list: a forward may hand one on as it got it."""
    for value in inputs:
        of_tensors = isinstance(value, (list, tuple)) and value and all(isinstance(part, Tensor) for part in value)
        yield from value if of_tensors else (value,)


class Cat(Operation):
    """Concatenation along one axis.

    Args:
        dim: The axis.
    """

    def __init__(self, dim: int = 0) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, *tensors: Tensor | Sequence[Tensor]) -> Tensor:
        """Tensors that differ in size along `dim` only, one by one or in a list -> one tensor."""
        return torch.cat(tuple(spread(tensors)), self.dim)

    def extra_repr(self) -> str:
        """The axis."""
        return f"dim={self.dim}"


class Stack(Cat):
    """Concatenation along a new axis.

    Args:
        dim: The new axis, of the result.
    """

    def forward(self, *tensors: Tensor | Sequence[Tensor]) -> Tensor:
        """Tensors of one shape, one by one or in a list -> one tensor with an axis more."""
        # What torch.stack does, in operators that integer runtimes have.
        return torch.cat([tensor.unsqueeze(self.dim) for tensor in spread(tensors)], self.dim)


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


class Clamp(Operation):
    """Values limited to a range.

    Args:
        min: The lower bound, or None.
        max: The upper bound, or None.
    """

    def __init__(self, min: float | None = None, max: float | None = None) -> None:
        super().__init__()
        self.min, self.max = min, max

    def forward(self, x: Tensor) -> Tensor:
        """Any shape -> the same shape."""
        return torch.clamp(x, self.min, self.max)

    def extra_repr(self) -> str:
        """The bounds."""
        return f"min={self.min}, max={self.max}"


class Interpolate(Operation):
    """Resampling, as `torch.nn.functional.interpolate`; the size may come with each call.

    Args:
        size: Of the result; None where it comes with the call or follows from `scale_factor`.
        scale_factor: Of the result's size over that of the input.
        mode: `"bilinear"` and the like. `"nearest"` and `"nearest-exact"` repeat values.
        align_corners: See `torch.nn.functional.interpolate`, like the next two.
        recompute_scale_factor: See there.
        antialias: See there.
    """

    def __init__(
        self,
        size: int | Sequence[int] | None = None,
        scale_factor: float | Sequence[float] | None = None,
        mode: str = "nearest",
        align_corners: bool | None = None,
        recompute_scale_factor: bool | None = None,
        antialias: bool = False,
    ) -> None:
        super().__init__()
        self.size, self.scale_factor, self.mode = size, scale_factor, mode
        self.options: dict[str, Any] = {
            "align_corners": align_corners,
            "recompute_scale_factor": recompute_scale_factor,
            "antialias": antialias,
        }

    def forward(self, x: Tensor, size: Any = None) -> Tensor:
        """(batch, channels, …), the size of … or None -> (batch, channels, *size)."""
        size = self.size if size is None else size
        resampled: Tensor = F.interpolate(x, size, self.scale_factor, self.mode, **self.options)
        return resampled

    def extra_repr(self) -> str:
        """What is not the default."""
        given = {"size": self.size, "scale_factor": self.scale_factor, "mode": self.mode, **self.options}
        return ", ".join(f"{name}={value!r}" for name, value in given.items() if value not in (None, False))


class NormalizeLayer(Operation):
    """`torch.nn.functional.layer_norm` with a factor and an offset that belong to another module.

    Args:
        normalized_shape: Sizes of the last axes, over which it normalises.
        eps: Added to the variance.
    """

    def __init__(self, normalized_shape: Sequence[int], eps: float = 1e-5) -> None:
        super().__init__()
        self.normalized_shape, self.eps = tuple(normalized_shape), eps

    def forward(self, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """(…, *normalized_shape) -> the same shape."""
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)

    def extra_repr(self) -> str:
        """The sizes."""
        return f"{self.normalized_shape}, eps={self.eps}"


class NormalizeGroups(Operation):
    """`torch.nn.functional.group_norm` with a factor and an offset that belong to another module.

    Args:
        num_groups: Groups of channels.
        eps: Added to the variance.
    """

    def __init__(self, num_groups: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.num_groups, self.eps = num_groups, eps

    def forward(self, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """(batch, channels, …) -> the same shape."""
        return F.group_norm(x, self.num_groups, weight, bias, self.eps)

    def extra_repr(self) -> str:
        """The groups."""
        return f"{self.num_groups}, eps={self.eps}"


def _tensor(value: Any) -> Tensor:
    """Python's operators on a tensor and a number give tensors."""
    tensor: Tensor = value
    return tensor

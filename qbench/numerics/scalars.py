"""Arithmetic on single numbers, which are tensors or scalars of NumPy.

Functions that are written with these and with Python's operators take both, float32, with the same bits. An operator on
a tensor of one number takes ten times as long as on the number, and a quantizer that observes has some thirty of them.
Compiled code and other devices need tensors; eager training on a CPU does not.

Each operation rounds once on either side: a product and a sum in one would not.
"""

from __future__ import annotations

import contextlib
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

#: A tensor, or a scalar of NumPy.
Number = Any
_F = TypeVar("_F")


def of_numbers(function: _F) -> _F:
    """Say of a function that it takes both; one that overrides it does not, until that is said of it."""
    function.of_numbers = True  # type: ignore[attr-defined]
    return function


def is_of_numbers(function: object) -> bool:
    """Whether `of_numbers` was said of a function."""
    return getattr(function, "of_numbers", False)


def numbers(*values: Tensor) -> list[Number]:
    """Of tensors on a CPU, float32, (), their numbers."""
    return [np.float32(value.item()) for value in values]


def quietly() -> contextlib.AbstractContextManager[None]:
    """Infinities and NaN come and go, as they do in tensors."""
    return np.errstate(all="ignore")


def maximum(a: Number, b: Number | float) -> Number:
    """The larger of each pair; NaN where one is."""
    if isinstance(a, Tensor):
        return torch.maximum(a, b) if isinstance(b, Tensor) else a.clamp(min=b)
    return a if a >= b or a != a else np.float32(b)


def minimum(a: Number, b: Number | float) -> Number:
    """The smaller of each pair; NaN where one is."""
    if isinstance(a, Tensor):
        return torch.minimum(a, b) if isinstance(b, Tensor) else a.clamp(max=b)
    return a if a <= b or a != a else np.float32(b)


def where(condition: Number, a: Number, b: Number) -> Number:
    """`a` where the condition holds, else `b`."""
    if isinstance(condition, Tensor):
        return torch.where(condition, a, b)
    return a if condition else b


def rint(x: Number) -> Number:
    """The nearest whole number, the even one of two."""
    return torch.round(x) if isinstance(x, Tensor) else np.rint(x)


def nan_to_zero(x: Number) -> Number:
    """0 in place of NaN."""
    if isinstance(x, Tensor):
        return torch.nan_to_num(x, nan=0.0, posinf=torch.inf, neginf=-torch.inf)
    return np.float32(0.0) if x != x else x


def to_float(x: Number) -> Number:
    """As float32."""
    return x.float() if isinstance(x, Tensor) else x


def to_int32(x: Number) -> Number:
    """As int32."""
    return x.to(torch.int32) if isinstance(x, Tensor) else int(x)


def full_int32(value: int, reference: Number) -> Number:
    """int32, of the shape of `reference`, all of one value."""
    return torch.full_like(reference, value, dtype=torch.int32) if isinstance(reference, Tensor) else value

"""How an operator of the namespace `qbench` is defined: schema, kernel, fake kernel, in one call.

    schema      what a program stores, what `torch.library.opcheck` tests
    kernel      runs on every device (CompositeExplicitAutograd), never under autocast, never recorded by autograd
    fake        gives shape and dtype while a program is traced; the batch may be a symbol

Importing a module that calls `define` only registers functions: nothing is computed, no other package is imported.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LIBRARY = torch.library.Library("qbench", "FRAGMENT")

# How the schema of every static operator ends: the grid of its codes, and whose arithmetic computes them.
OUT = (
    "float output_scale, int output_zero_point, int output_min, int output_max, ScalarType dtype, str target) -> Tensor"
)


def define(schema: str, kernel: Callable[..., Tensor], fake: Callable[..., Tensor]) -> None:
    """Register one operator.

    Args:
        schema: `"name(Tensor input, …) -> Tensor"`, without the namespace.
        kernel: Takes the schema's arguments in order and returns a new tensor.
        fake: The same arguments -> an empty tensor of the result's shape, dtype and memory format.
    """
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    name = schema[: schema.index("(")]
    LIBRARY.impl(name, _undisturbed(kernel), "CompositeExplicitAutograd")
    torch.library.register_fake(f"qbench::{name}", fake, lib=LIBRARY)


def _undisturbed(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`kernel` without autocast, which would send an exact float32 sum to bfloat16, and without autograd."""

    @functools.wraps(kernel)
    def call(*arguments: Any) -> Tensor:
        with torch.no_grad():
            device = _device_type(arguments)
            if not torch.is_autocast_enabled(device):
                return kernel(*arguments)
            with torch.autocast(device, enabled=False):
                return kernel(*arguments)

    return call


def _device_type(arguments: tuple[Any, ...]) -> str:
    first = arguments[0][0] if isinstance(arguments[0], (list, tuple)) and arguments[0] else arguments[0]
    return first.device.type if isinstance(first, Tensor) else "cpu"

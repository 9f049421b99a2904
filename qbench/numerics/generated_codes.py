"""Tensors to their codes as generated code: one pass in place of eight operators in blocks.

    c = clamp(rne(x·(1/s)) + z, −128, 127)      and whether (c − z)·s is x everywhere

The way back stays three operators in blocks: code that is generated for CPUs reads int8 three times as slowly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qbench.numerics.blocks import in_rows
from qbench.numerics.generated import Generated, Tensors, generated


def encoder(device: str) -> Generated:
    """The code of `encoded` for a type of device."""
    return generated(_encode, _sample, device)


def encoded(x: Tensor, scale: Tensor, zero: Tensor, code: Generated) -> Tensor | None:
    """Codes of `x`, int8, in its layout; None where they do not give `x` again.

    Args:
        x: float32, (rows, …), without gaps in memory.
        scale: `s`, float32, () or one a row, broadcasting against `x`.
        zero: `z`, float32, likewise.
        code: Of `encoder`.
    """
    codes = torch.empty_like(x, dtype=torch.int8)
    (different,) = code(in_rows(codes), in_rows(x), scale.reshape(-1, 1), zero.reshape(-1, 1))
    assert different is not None
    return None if bool(different) else codes


def _encode(codes: Tensor, x: Tensor, scale: Tensor, zero: Tensor, device: str) -> Tensors:
    """1.0 where a value is not that of its code, else 0.0, (); `codes`, (rows, values), becomes the codes of `x`."""
    code = ((x * (1.0 / scale)).round() + zero).clamp(-128.0, 127.0)
    codes.copy_(code.to(torch.int8))
    return (torch.where((code - zero) * scale == x, 0.0, 1.0).amax(),)


def _sample(device: str) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-128, 128, (24, 129), generator=generator, dtype=torch.int8)
    scale, zero = torch.rand(24, 1, generator=generator) + 0.01, torch.arange(-12.0, 12.0)[:, None]
    found = torch.zeros_like(codes), (codes.float() - zero) * scale, scale, zero
    return [value.to(device) for value in found]

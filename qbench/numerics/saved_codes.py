"""Tensors on a grid, kept for backward as their codes: one byte a value in place of four, and not a bit lost.

    saved       c = rne(x·(1/s)) + z                 int8 or uint8
    in backward x = (c − z)·s                        the product that `x` was made by, so the same bits

A tensor is kept so only where that was seen to hold: its codes are computed, turned back and compared. A quantizer that
moved on since `x` was made, or values that lie on no grid, are kept as they are. (A zero that was −0 comes back as +0:
no sum of products can tell.)
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from qbench.numerics.blocks import Scratch, at_hand, dense, in_blocks
from qbench.numerics.generated_codes import encoded, encoder
from qbench.numerics.native.library import loaded
from qbench.numerics.qparams import QParams, QSpec


@functools.cache
def say_once(message: str) -> None:
    """Put a message into the log, the first time."""
    logging.getLogger("qbench").warning(message)


_listeners: list[Callable[[Tensor], object]] = []


@contextlib.contextmanager
def kept_tensors_told_to(listener: Callable[[Tensor], object]) -> Iterator[None]:
    """While it is entered, `SavingCodes` tells of each tensor that it keeps.

    Of hooks that are nested, PyTorch calls the inner ones alone: hooks around these would not see it.
    """
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


@dataclasses.dataclass(frozen=True)
class Coded:
    """A tensor as codes.

    Attributes:
        codes: int8 or uint8, of its shape and layout.
        scale: `s`, broadcasting against it.
        zero: `z`, float32, likewise.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor

    def value(self) -> Tensor:
        """The tensor."""
        found = torch.empty_like(self.codes, dtype=torch.float32)
        functions = loaded()
        if functions is not None and self.scale.numel() == 1 and _is_dense_int8(self.codes):
            functions.decode(self.codes, self.scale, self.zero, self.codes.numel(), found)
            return found
        for target, codes, scale, zero in in_blocks(found, self.codes, self.scale, self.zero):
            target.copy_(codes).sub_(zero).mul_(scale)
        return found


def _is_dense_int8(codes: Tensor) -> bool:
    return codes.dtype is torch.int8 and codes.is_cpu and dense(codes).is_contiguous()


def lowering(codes: QParams | QSpec) -> int:
    """How much lower than a code is what is kept of it: int8 holds what uint8 does, and copying to it is vectorised."""
    return 128 if codes.dtype is torch.uint8 else 0


def fits_a_byte(codes: QParams | QSpec) -> bool:
    """Whether codes are of 8 bits or fewer."""
    return codes.dtype in (torch.int8, torch.uint8)


def encode(x: Tensor, qparams: QParams, *, fast_path: bool = False) -> Coded | None:
    """`x` as codes of a grid of 8 bits or fewer; None where they do not give `x` again, or nothing can be looked at.

    Args:
        x: float32, any shape.
        qparams: The grid.
        fast_path: Whether to do it by generated code where there is some.
    """
    if not at_hand(x) or not fits_a_byte(qparams) or qparams.group_size is not None:
        return None
    scale = qparams.spread(qparams.scale.detach(), x)
    zero = qparams.spread(qparams.zero_point.float() - lowering(qparams), x)
    if fast_path and x.ndim and qparams.axis in (None, 0) and dense(x).is_contiguous():
        code = encoder(x.device.type)
        if code.ready():
            found = encoded(x, scale, zero, code)
            return None if found is None else Coded(found, scale, zero)
    codes, inverse, room = torch.empty_like(x, dtype=torch.int8), 1.0 / scale, Scratch()
    for source, stored, *grid in in_blocks(x, codes, inverse, scale, zero):
        step, size, offset = grid
        value = torch.mul(source, step, out=room.like(source)).round_()
        stored.copy_(value.add_(offset))
        if not torch.equal(value.copy_(stored).sub_(offset).mul_(size), source):
            return None
    return Coded(codes, scale, zero)


class SavingCodes(torch.autograd.graph.saved_tensors_hooks):
    """While it is entered, what autograd saves of the given tensors, or of views of them, is saved as codes.

    Args:
        tensors: float32 tensors and the grids that they lie on, or their codes where they are at hand.
        fast_path: As of `encode`.
    """

    def __init__(self, *tensors: tuple[Tensor, QParams | Coded | None], fast_path: bool = False) -> None:
        self._fast_path = fast_path
        self._known = {tensor.data_ptr(): (tensor, grid) for tensor, grid in tensors if grid is not None}
        self._coded: dict[int, Coded | None] = {}
        super().__init__(self._pack, _unpack)

    def __exit__(self, *args: object) -> None:
        super().__exit__(*args)
        # Autograd keeps the hooks as long as what was saved: they must not keep the tensors themselves.
        self._known.clear()
        self._coded.clear()

    def _pack(self, saved: Tensor) -> Any:
        kept = self._coded_or_same(saved)
        tensors = (kept[0].codes, kept[0].scale, kept[0].zero) if isinstance(kept, tuple) else (kept,)
        for listener in _listeners:
            for tensor in tensors:
                listener(tensor)
        return kept

    def _coded_or_same(self, saved: Tensor) -> Tensor | tuple[Coded, torch.Size, tuple[int, ...]]:
        tensor, grid = self._known.get(saved.data_ptr(), (None, None))
        if tensor is None or grid is None or tensor.numel() != saved.numel() or tensor.dtype != saved.dtype:
            return saved
        key = saved.data_ptr()
        if key not in self._coded:
            self._coded[key] = (
                grid if isinstance(grid, Coded) else encode(tensor.detach(), grid, fast_path=self._fast_path)
            )
        coded = self._coded[key]
        if coded is None or coded.codes.stride() != tensor.stride():  # with gaps between its values, or expanded
            return saved
        return coded, saved.shape, saved.stride()


def _unpack(saved: Any) -> Tensor:
    if isinstance(saved, Tensor):
        return saved
    coded, shape, strides = saved
    value: Tensor = coded.value()
    return value if (value.shape, value.stride()) == (shape, strides) else value.as_strided(shape, strides)

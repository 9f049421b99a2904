"""Elementwise chains in eager PyTorch, a cache-sized block at a time.

    whole tensor    each op reads and writes main memory            n ops → n passes over it
    in blocks       all ops on one block, then the next block       n ops → 1 pass over it

Where the largest cache holds a tensor and its result, and no scratch is needed, the whole is faster: threads meet once
an op, and not once an op and block (`in_parts`).

A fresh result as large as an activation costs more than the arithmetic in it (the system hands out its pages one by
one), so chains write into one result and one scratch block. Compiled code and GPUs get the whole tensor as one block:
there, kernels are fused by the compiler, or launched at a price.
"""

from __future__ import annotations

import contextlib
import functools
import re
import threading
from collections.abc import Collection, Iterator
from pathlib import Path

import torch
from torch import Tensor

#: Values in a block, for each thread: with its result and a scratch, 256 KiB each, it stays in a core's second cache.
BLOCK = 1 << 16


_CPU = ("cpu",)


def at_hand(x: Tensor, devices: Collection[str] = _CPU) -> bool:
    """Whether values are there to be computed with at once: float32 on such a device, neither fake nor compiled."""
    if x.dtype is not torch.float32 or type(x) not in (Tensor, torch.nn.Parameter) or torch.compiler.is_compiling():
        return False
    return (x.is_cpu if devices is _CPU else x.device.type in devices) and x.numel() > 0


def in_blocks(first: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The tensors, cut alike along the first axis of `first`.

    Args:
        first: Any shape.
        others: Of the same shape, or broadcasting against it: what has no such axis is handed on whole.

    Yields:
        Views: a block of `first`, then what goes with it of each other tensor.
    """
    rows = first.shape[0] if first.ndim else 1
    step = rows
    if first.device.type == "cpu" and not torch.compiler.is_compiling():
        step = max(1, BLOCK * torch.get_num_threads() * rows // max(1, first.numel()))
    if step >= rows:
        yield first, *others
        return
    cut = [other.ndim == first.ndim and other.shape[0] == rows for other in others]
    for start in range(0, rows, step):
        part = slice(start, start + step)
        yield first[part], *(other[part] if inside else other for other, inside in zip(others, cut, strict=True))


def in_parts(source: Tensor, target: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """`in_blocks` for a chain that writes to `target` alone: all in one where the largest cache holds both."""
    if source.nbytes + target.nbytes <= _largest_cache():
        return iter([(source, target, *others)])
    return in_blocks(source, target, *others)


@functools.cache
def _largest_cache() -> int:
    """In bytes; 0 where the system does not say."""
    sizes = [0]
    with contextlib.suppress(OSError):
        for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
            found = re.fullmatch(r"(\d+)([KM]?)", path.read_text(encoding="ascii").strip())
            if found is not None:
                sizes.append(int(found[1]) << {"": 0, "K": 10, "M": 20}[found[2]])
    return max(sizes)


class Scratch:
    """Room for one block, made once and used for all."""

    def __init__(self) -> None:
        self._room: Tensor | None = None

    def like(self, block: Tensor) -> Tensor:
        """A tensor of the shape, layout and dtype of a block, which holds anything; the first block is the largest."""
        if self._room is None:
            self._room = torch.empty_like(block)
        return self._room if self._room.shape == block.shape else self._room[: len(block)]


class Room(threading.local):
    """Memory that a thread keeps for one tensor at a time, as fresh memory can cost more than what is done in it."""

    def __init__(self) -> None:
        self._values: Tensor | None = None
        self._most = 0

    def like(self, x: Tensor, contiguous: bool = False) -> Tensor | None:
        """Room for a tensor, which holds anything; None for one with gaps in memory, or no float32 on a CPU.

        Args:
            x: What it is for.
            contiguous: Whether its memory is contiguous; otherwise it is in the order of that of `x`.
        """
        if not at_hand(x) or not dense(x).is_contiguous():
            return None
        if self._values is None or self._values.numel() < x.numel():
            # As much as was ever needed: memory that nothing was written to is not there yet.
            self._most = max(self._most, x.numel())
            self._values = torch.empty(self._most, dtype=torch.float32, device="cpu")
        return self._values[: x.numel()].view(x.shape) if contiguous else self._values.as_strided(x.shape, x.stride())


class RoomOfBackward(Room):
    """The same for tensors of backward, each of which is done with in its node: let go when that backward ends."""

    def __init__(self) -> None:
        super().__init__()
        self._task = -1

    def like(self, x: Tensor, contiguous: bool = False) -> Tensor:
        """Room for a tensor, which holds anything: fresh memory for one with gaps, or outside of backward."""
        form = torch.contiguous_format if contiguous else torch.preserve_format
        task = torch._C._current_graph_task_id()
        if task == -1:
            return torch.empty_like(x, memory_format=form)
        if task != self._task:  # asked of each, as one that fails calls nobody back
            self._task = task
            torch.autograd.Variable._execution_engine.queue_callback(self._let_go)
        found = super().like(x, contiguous)
        return torch.empty_like(x, memory_format=form) if found is None else found

    def _let_go(self) -> None:
        self._values = None


#: Of so many axes; asked for these, a tensor answers in a third of the time that a view of it takes.
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def channels_are_last(x: Tensor) -> bool | None:
    """Whether (batch, channels, …) has its channels last in memory; None where its memory is in neither order."""
    if x.is_contiguous():
        return False
    form = CHANNELS_LAST.get(x.ndim)
    if form is None:
        return True if x.movedim(1, -1).is_contiguous() else None
    return True if x.is_contiguous(memory_format=form) else None


def memory_format(last: bool, ndim: int) -> torch.memory_format:
    """Channels last, or contiguous: of tensors of so many axes, where there is such a format."""
    return CHANNELS_LAST.get(ndim, torch.contiguous_format) if last else torch.contiguous_format


def in_memory_order(x: Tensor, last: bool) -> Tensor:
    """(batch, channels, …), or with `last` (batch, …, channels), contiguous: a view where memory is in that order."""
    return (x.movedim(1, -1) if last else x).contiguous()


def from_memory_order(values: Tensor, like: Tensor, last: bool) -> Tensor:
    """The inverse of `in_memory_order`: as many values, in that order, as a view of the shape of `like`."""
    return values.view(like.movedim(1, -1).shape).movedim(-1, 1) if last else values.view(like.shape)


def dense(x: Tensor) -> Tensor:
    """A view with the axes in the order of memory: reductions over all of `x` then need no contiguous copy of it."""
    if torch.compiler.is_compiling() or x.is_contiguous():
        return x
    strides = x.stride()
    return x.permute(sorted(range(x.ndim), key=lambda axis: -strides[axis]))


def in_rows(x: Tensor) -> Tensor:
    """(rows, …) as (rows, values), in the order of memory: a view of what has no gaps there."""
    return dense(x).view(len(x), -1)

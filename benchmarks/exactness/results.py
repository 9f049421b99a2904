"""What a sweep of one operation returns, and how its codes are counted."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class OpResult:
    """How many codes of one operation differ between this library's function and the runtime itself.

    Attributes:
        op: The operation, `"add"`.
        target: The target's name.
        compared: How many codes (or table entries, or floats) were compared.
        different: How many of them differ.
        largest_step: The largest difference in codes; 0 where none differs.
        note: What a reader must know: the runtime's kernel, what is excluded, where the differences lie.
    """

    op: str
    target: str
    compared: int
    different: int
    largest_step: int
    note: str = ""


@dataclasses.dataclass
class Tally:
    """Counts codes as they come, and turns them into an `OpResult`."""

    compared: int = 0
    different: int = 0
    largest_step: int = 0
    notes: dict[str, None] = dataclasses.field(default_factory=dict)

    def add(self, ours: Tensor, theirs: Tensor) -> int:
        """Count two tensors of codes of one shape and dtype; returns how many differ.

        Raises:
            ValueError: shapes or dtypes differ, so that nothing was compared.
        """
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            raise ValueError(f"{ours.dtype} {tuple(ours.shape)} against {theirs.dtype} {tuple(theirs.shape)}")
        steps = (ours.to(torch.int64) - theirs.to(torch.int64)).abs()
        different = int((steps != 0).sum())
        self.compared += steps.numel()
        self.different += different
        self.largest_step = max(self.largest_step, int(steps.max()) if steps.numel() else 0)
        return different

    def note(self, *notes: str) -> None:
        """Remember a remark once, however often it is made."""
        self.notes.update(dict.fromkeys(notes))

    def result(self, op: str, target: str) -> OpResult:
        """What was counted."""
        return OpResult(op, target, self.compared, self.different, self.largest_step, "; ".join(self.notes))


def table(results: Iterable[OpResult]) -> str:
    """Results as lines of text: op, target, codes, different, largest step, note."""
    head = ("op", "target", "codes", "different", "step", "note")
    rows = [(r.op, r.target, f"{r.compared:,}", f"{r.different:,}", str(r.largest_step), r.note) for r in results]
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(5)]
    lines = []
    for row in (head, *rows):
        words = [row[0].ljust(widths[0]), row[1].ljust(widths[1])]
        words += [row[column].rjust(widths[column]) for column in range(2, 5)]
        lines.append("  ".join([*words, row[5]]).rstrip())
    return "\n".join(lines)

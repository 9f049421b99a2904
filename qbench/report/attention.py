"""Which attention modules were written out, and which were not, with the reason."""

from __future__ import annotations

import dataclasses

from qbench.report.preparation import LeftInFloat


@dataclasses.dataclass(frozen=True)
class ReplacedAttention:
    """An attention module that was written out: path, and the names of both classes."""

    path: str
    kind: str
    explicit: str


@dataclasses.dataclass(frozen=True)
class AttentionReport:
    """What `explicit_attention` did.

    Attributes:
        replaced: Modules that were written out.
        left: Attention modules that stay as they are, with the reason.
    """

    replaced: tuple[ReplacedAttention, ...] = ()
    left: tuple[LeftInFloat, ...] = ()

    def __str__(self) -> str:
        lines = [f"{len(self.replaced)} attention modules written out"]
        lines += [f"{found.path or '(root)'}: {found.kind} → {found.explicit}" for found in self.replaced]
        lines += [f"left as it is: {found.path or '(root)'} [{found.kind}], {found.reason}" for found in self.left]
        return "\n".join(lines)

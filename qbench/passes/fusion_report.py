"""What `qbench.passes.fuse_qdq` returns."""

from __future__ import annotations

import dataclasses
from collections import Counter

from qbench.graph.rules import Miss, Rewrite
from qbench.passes.bias_report import BiasReport


@dataclasses.dataclass(frozen=True)
class FloatOperator:
    """An operator of the integer program that computes on real values.

    Attributes:
        node: Its name.
        op: Its operator.
        path: Path of the module that it was traced in.
        reason: Why, as far as a rule said so; else that no rule starts at it.
    """

    node: str
    op: str
    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path or self.node} ({self.op}) stays in float: {self.reason}"


@dataclasses.dataclass(frozen=True)
class FusionReport:
    """What `fuse_qdq` did to a program.

    Attributes:
        target: Whose arithmetic the fused operators have.
        fused: Every rewrite: which rule, at which node, of which module.
        missed: Nodes at which rules start but that none rewrote, with every rule's reason.
        left_float: Operators that compute on real values in the result.
        bias: What the bias pass, which runs first, did.
    """

    target: str
    fused: tuple[Rewrite, ...]
    missed: tuple[Miss, ...]
    left_float: tuple[FloatOperator, ...]
    bias: BiasReport

    @property
    def modified(self) -> bool:
        """Whether the program changed."""
        return bool(self.fused) or self.bias.modified

    @property
    def integer(self) -> bool:
        """Whether nothing computes on real values between the first quantize and the last dequantize operator."""
        return not self.left_float

    @property
    def by_rule(self) -> dict[str, int]:
        """How many rewrites each rule did."""
        return dict(Counter(rewrite.rule for rewrite in self.fused))

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {rule}" for rule, count in self.by_rule.items()) or "nothing"
        lines = [f"fused for {self.target}: {counts}"]
        return "\n".join([*lines, *(f"- {entry}" for entry in self.left_float)])

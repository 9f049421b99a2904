"""Rewriting a graph by rules: each names the operators it starts at, matches or refuses with a reason, and rewrites.

    for node in graph:  for rule in rules that start at node's operator:  Match → rewrite, next node
                                                                          Refusal → note it, next rule

The rules are an explicit tuple and their order is the order in which they are tried. Each node is looked at once, so a
pass is linear in the number of nodes as long as a rule looks at a bounded neighbourhood. A rewrite changes the graph at
once: what follows sees it.
"""

from __future__ import annotations

import abc
import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, ClassVar, Generic, TypeVar

from torch import fx

from qbench.errors import PassError
from qbench.graph.constants import Constants
from qbench.graph.dialect import packet
from qbench.graph.edit import module_path

Context = TypeVar("Context")
Found = TypeVar("Found")


@dataclasses.dataclass(frozen=True)
class Refusal:
    """Why a rule leaves a node as it is: a clause that reads well after the node's name and a colon."""

    reason: str


class Refused(Exception):
    """Raised inside `Rule.match` by what it calls, to refuse from any depth; `apply_rules` makes it a `Refusal`."""


@dataclasses.dataclass(frozen=True)
class Rewrite:
    """What one rule did at one place.

    Attributes:
        rule: Name of the rule.
        node: Name of the node that it started at.
        op: Operator of that node, `"aten.conv2d.default"`.
        path: Path of the module that the node was traced in.
        result: Names of the nodes that took over.
    """

    rule: str
    node: str
    op: str
    path: str
    result: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.path or self.node}: {self.op} -> {', '.join(self.result)} ({self.rule})"


@dataclasses.dataclass(frozen=True)
class Miss:
    """A node at which rules start and that none of them rewrote.

    Attributes:
        node: Its name.
        op: Its operator.
        path: Path of the module that it was traced in.
        reasons: (rule, reason) of every rule that was tried, in order.
    """

    node: str
    op: str
    path: str
    reasons: tuple[tuple[str, str], ...]

    @property
    def reason(self) -> str:
        """The reasons in one line."""
        return "; ".join(dict.fromkeys(reason for _, reason in self.reasons))

    def __str__(self) -> str:
        return f"{self.path or self.node} ({self.op}, {self.node}): {self.reason}"


class Rule(abc.ABC, Generic[Context, Found]):
    """One rewrite.

    Attributes:
        name: What reports call it.
        anchors: Operator packets (`torch.ops.aten.conv2d`) that it starts at.
    """

    name: ClassVar[str]
    anchors: ClassVar[tuple[Any, ...]]

    @abc.abstractmethod
    def match(self, node: fx.Node, context: Context) -> Found | Refusal | None:
        """What the rewrite needs to know of a node; a `Refusal`; or None where the node is not its business.

        It must not change the graph. It may raise `Refused(reason)` instead of returning a `Refusal`.
        """

    @abc.abstractmethod
    def rewrite(self, found: Found, context: Context) -> Sequence[fx.Node]:
        """Change the graph; returns the nodes that took over."""


def apply_rules(
    constants: Constants, rules: Sequence[Rule[Any, Any]], context: object
) -> tuple[tuple[Rewrite, ...], tuple[Miss, ...]]:
    """Apply rules to every node of a graph once, in the graph's order; nodes that rules insert are not looked at.

    Args:
        constants: The stored tensors of the graph, which is `constants.graph`.
        rules: Tried in this order; the first that matches rewrites.
        context: Handed to every rule.

    Returns:
        What was rewritten, and the nodes that rules start at but none rewrote, each with every reason.

    Raises:
        PassError: something in `rules` is not a rule.
    """
    starting: dict[Any, list[Rule[Any, Any]]] = defaultdict(list)
    for rule in rules:
        if not isinstance(rule, Rule):
            raise PassError(f"{rule!r} is not a rule; rules=(MyRule(), *qbench.passes.FUSION_RULES) passes instances")
        for anchor in rule.anchors:
            starting[anchor].append(rule)
    rewrites: list[Rewrite] = []
    misses: list[Miss] = []
    for node in list(constants.graph.nodes):
        # What an earlier rewrite took over from has no reader left.
        if node.op != "call_function" or not node.users:
            continue
        done = _apply(node, starting.get(packet(node.target), ()), context)
        if isinstance(done, Rewrite):
            rewrites.append(done)
        elif done is not None:
            misses.append(done)
    return tuple(rewrites), tuple(misses)


def _apply(node: fx.Node, rules: Sequence[Rule[Any, Any]], context: object) -> Rewrite | Miss | None:
    reasons = []
    place = node.name, str(node.target), module_path(node)
    for rule in rules:
        try:
            found = rule.match(node, context)
        except Refused as refused:
            found = Refusal(str(refused))
        if isinstance(found, Refusal):
            reasons.append((rule.name, found.reason))
        elif found is not None:
            results = rule.rewrite(found, context)
            return Rewrite(rule.name, *place, tuple(result.name for result in results))
    return Miss(*place, tuple(reasons)) if reasons else None

"""Rules: which are tried, in which order, what is reported, and that each node is looked at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import fx, nn

from qbench.errors import PassError
from qbench.graph.cleanup import read_instead
from qbench.graph.constants import Constants, constants_of
from qbench.graph.edit import insert_call
from qbench.graph.rules import Miss, Refusal, Refused, Rewrite, Rule, apply_rules

aten = torch.ops.aten


class ReluToClamp(Rule[Any, fx.Node]):
    """relu(x) -> clamp_min(x, 0), where the context allows it."""

    name = "relu"
    anchors = (aten.relu,)

    constants: Constants

    def __init__(self) -> None:
        self.seen: list[str] = []

    def match(self, node: fx.Node, context: Any) -> fx.Node | Refusal | None:
        self.seen.append(node.name)
        return node if context is None else Refusal(f"the context is {context}")

    def rewrite(self, found: fx.Node, context: Any) -> Sequence[fx.Node]:
        new = insert_call(found, aten.clamp_min.default, (found.args[0], 0))
        read_instead(found, new, self.constants)
        return [new]


class Never(ReluToClamp):
    name = "never"

    def match(self, node: fx.Node, context: Any) -> fx.Node:
        raise Refused("never")


class NotMine(ReluToClamp):
    name = "not mine"

    def match(self, node: fx.Node, context: Any) -> None:
        return None


class Net(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(torch.relu(x) + torch.neg(x))


def program() -> torch.export.ExportedProgram:
    return torch.export.export(Net(), (torch.randn(4),), strict=False)


def apply(rules: Sequence[Any], context: Any = None) -> tuple[Any, Any, torch.export.ExportedProgram]:
    found = program()
    ReluToClamp.constants = constants_of(found)
    rewrites, misses = apply_rules(ReluToClamp.constants, rules, context)
    found.graph.eliminate_dead_code()
    constants_of(found).finish()
    return rewrites, misses, found


def targets(found: torch.export.ExportedProgram) -> list[str]:
    return [str(node.target) for node in found.graph.nodes if node.op == "call_function"]


def test_a_rule_rewrites_every_place_it_matches() -> None:
    rewrites, misses, found = apply([ReluToClamp()])
    assert [str(entry.op) for entry in rewrites] == ["aten.relu.default"] * 2
    assert not misses
    assert targets(found) == ["aten.clamp_min.default", "aten.neg.default", "aten.add.Tensor", "aten.clamp_min.default"]
    x = torch.randn(4)
    assert torch.equal(found.module()(x), Net()(x))


def test_each_node_is_looked_at_once_and_inserted_ones_are_not() -> None:
    rule = ReluToClamp()
    apply([rule])
    assert rule.seen == ["relu", "relu_1"]


def test_the_first_that_matches_wins_and_its_refusing_elders_are_forgotten() -> None:
    rewrites, misses, _ = apply([Never(), NotMine(), ReluToClamp()])
    assert [entry.rule for entry in rewrites] == ["relu", "relu"]
    assert not misses


def test_a_miss_holds_every_reason_in_order() -> None:
    rewrites, misses, found = apply([NotMine(), Never(), ReluToClamp()], context="closed")
    assert not rewrites
    assert [miss.node for miss in misses] == ["relu", "relu_1"]
    assert misses[0].reasons == (("never", "never"), ("relu", "the context is closed"))
    assert str(misses[0]) == "relu (aten.relu.default, relu): never; the context is closed"
    assert targets(found).count("aten.relu.default") == 2


def test_nodes_that_are_nobodys_business_are_not_reported() -> None:
    assert apply([NotMine()])[:2] == ((), ())


def test_what_a_rewrite_left_without_a_reader_is_not_tried() -> None:
    class TakesBoth(ReluToClamp):
        """Rewrites the first relu and makes the second one dead."""

        def rewrite(self, found: fx.Node, context: Any) -> Sequence[fx.Node]:
            output = next(node for node in found.graph.nodes if node.op == "output")
            output.args = ((found,),)
            return [found]

    rule = TakesBoth()
    found = program()
    rewrites, _ = apply_rules(constants_of(found), [rule], None)
    assert rule.seen == ["relu"] and len(rewrites) == 1


def test_a_class_is_not_a_rule() -> None:
    with pytest.raises(PassError, match=r"rules=\(MyRule\(\), \*qbench.passes.FUSION_RULES\)"):
        apply([ReluToClamp])


def test_records_read_well() -> None:
    assert str(Rewrite("r", "conv", "aten.conv2d.default", "layer1.conv", ("a", "b"))) == (
        "layer1.conv: aten.conv2d.default -> a, b (r)"
    )
    assert Miss("n", "op", "", (("a", "same"), ("b", "same"))).reason == "same"

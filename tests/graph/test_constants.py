"""Stored tensors of modules and programs: the same questions and edits, the same answers."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from qbench.errors import PassError
from qbench.graph.aliasing import written_nodes, written_off_grid
from qbench.graph.constants import Constants, ModuleConstants, ProgramConstants, constants_of


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 2)
        self.register_buffer("kept", torch.tensor([1.0, 2.0]))
        self.register_buffer("transient", torch.tensor([3.0, 4.0]), persistent=False)
        self.register_buffer("counter", torch.zeros(2))
        self.register_buffer("unused", torch.zeros(7))

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x) + self.kept * self.transient + torch.tensor([5.0, 6.0])
        self.counter.add_(1.0)
        return y + self.counter + self.kept.sum() + torch.rand_like(self.kept) * 0


X = torch.randn(4, 3)
FORMS = ("module", "program")


def make(form: str) -> tuple[Any, Constants]:
    torch.manual_seed(0)
    program = torch.export.export(Model(), (X,), strict=False)
    made = program if form == "program" else program.module()
    return made, constants_of(made)


def call(made: Any) -> Tensor:
    return (made.module() if isinstance(made, ExportedProgram) else made)(X)


def node_of(constants: Constants, key: str) -> fx.Node:
    (node,) = constants.nodes(key)
    return node


def named(constants: Constants, target: Any) -> fx.Node:
    return next(node for node in constants.graph.nodes if node.target is target)


@pytest.mark.parametrize("form", FORMS)
def test_which_form(form: str) -> None:
    assert type(make(form)[1]) is (ProgramConstants if form == "program" else ModuleConstants)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("key", "value"), [("kept", [1.0, 2.0]), ("transient", [3.0, 4.0]), ("lifted_tensor_0", [5.0, 6.0])]
)
def test_get(form: str, key: str, value: list[float]) -> None:
    _, constants = make(form)
    found = constants.get(node_of(constants, key))
    assert found.tolist() == value and not found.requires_grad


@pytest.mark.parametrize("form", FORMS)
def test_what_is_computed_from_stored_tensors_is_known(form: str) -> None:
    aten = torch.ops.aten
    _, constants = make(form)
    assert constants.get(named(constants, aten.mul.Tensor)).tolist() == [3.0, 8.0]
    assert constants.get(named(constants, aten.detach_.default)).tolist() == [5.0, 6.0]
    assert constants.get(named(constants, aten.sum.default)).item() == 3.0


@pytest.mark.parametrize("form", FORMS)
def test_what_changes_from_run_to_run_is_not(form: str) -> None:
    aten = torch.ops.aten
    _, constants = make(form)
    unknown = [named(constants, aten.linear.default), named(constants, aten.rand_like.default)]
    unknown += [node_of(constants, "counter"), named(constants, aten.add_.Tensor)]
    unknown += [node for node in constants.graph.nodes if node.name == "x" or node.op == "output"]
    assert [constants.get(node) for node in unknown] == [None] * 6


@pytest.mark.parametrize("form", FORMS)
def test_readers(form: str) -> None:
    _, constants = make(form)
    names = sorted(str(node.target) for node in constants.readers(node_of(constants, "kept")))
    assert names == ["aten.mul.Tensor", "aten.rand_like.default", "aten.sum.default"]
    graph = constants.graph
    mul = named(constants, torch.ops.aten.mul.Tensor)
    mul.args = (mul.args[0], mul.args[0])
    assert len(constants.readers(mul.args[0])) == 4
    graph.lint()


@pytest.mark.parametrize("key", ["inner.bias", "kept", "transient", "lifted_tensor_0"])
@pytest.mark.parametrize("form", FORMS)
def test_replace(form: str, key: str) -> None:
    made, constants = make(form)
    before, node = call(made), node_of(constants, key)
    old = constants.get(node).clone()
    constants.replace(node, old + 10.0)
    constants.finish()
    assert torch.equal(constants_of(made).get(node), old + 10.0)
    assert node.meta["val"].shape == old.shape
    assert not torch.equal(call(made), before)
    if form == "program":
        assert torch.equal(reload(made).module()(X), made.module()(X))


@pytest.mark.parametrize("form", FORMS)
def test_replacing_in_a_copy_leaves_the_first(form: str) -> None:
    """A program and its module share tensors, not the tables that name them."""
    made, _ = make(form)
    other = made.module() if form == "program" else torch.export.export(made, (X,), strict=False)
    constants = constants_of(other)
    key = "kept" if form == "program" else next(k for k in other.state_dict if k.endswith("kept"))
    constants.replace(node_of(constants, key), torch.zeros(2))
    first = constants_of(made)
    assert first.get(node_of(first, "kept")).tolist() == [1.0, 2.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.int64])
@pytest.mark.parametrize("form", FORMS)
def test_add(form: str, dtype: torch.dtype) -> None:
    made, constants = make(form)
    before = call(made)
    mul = named(constants, torch.ops.aten.mul.Tensor)
    first = constants.add("kept", torch.tensor([7, 8], dtype=dtype), before=mul)
    second = constants.add("kept", torch.tensor([9, 9], dtype=dtype), before=mul)
    assert (constants.key(first), constants.key(second)) == ("kept_1", "kept_2")
    assert constants.get(first).tolist() == [7, 8] and first.meta["val"].dtype == dtype
    old = mul.args[0]
    mul.args = (first, mul.args[1])
    constants.finish()
    extra = torch.tensor([7.0, 8.0]) * torch.tensor([3.0, 4.0]) - torch.tensor([3.0, 8.0])
    # Every call adds one to the counter, which a program and its modules share.
    assert torch.allclose(call(made), before + extra + 1.0)
    assert old.users
    if form == "program":
        signature = made.graph_signature
        assert list(signature.user_inputs) == ["x"] and signature.input_specs[-1].arg.name == "x"
        assert "kept_1" in signature.buffers and "kept_1" in made.state_dict
        assert torch.allclose(reload(made).module()(X), before + extra + 2.0)
        retraced = torch.export.export(made.module(), (X,), strict=False)
        assert len(retraced.graph_signature.user_inputs) == 1


@pytest.mark.parametrize("form", FORMS)
def test_drop_unused(form: str) -> None:
    made, constants = make(form)
    kept = node_of(constants, "kept")
    extra = constants.add("extra", torch.ones(1), before=kept if form == "program" else kept.next)
    assert constants.drop_unused(["kept"]) == []
    dropped = constants.drop_unused()
    assert "extra" in dropped and "counter" not in dropped and extra not in constants.graph.nodes
    constants.finish()
    stored = made.state_dict if form == "program" else made.state_dict()
    assert "extra" not in stored and "kept" in stored
    assert call(made).shape == (4, 2)


def test_program_without_inputs_or_tensors() -> None:
    class Empty(nn.Module):
        def forward(self) -> Tensor:
            return torch.ones(2)

    program = torch.export.export(Empty(), (), strict=False)
    constants = constants_of(program)
    ones = named(constants, torch.ops.aten.ones.default)
    node = constants.add("two", torch.full((2,), 2.0), before=ones)
    ones.replace_all_uses_with(node)
    program.graph_signature.replace_all_uses(ones.name, node.name)
    constants.finish()
    assert torch.equal(program.module()(), torch.full((2,), 2.0))


def test_replace_of_what_is_not_stored() -> None:
    made, constants = make("program")
    x = next(node for node in made.graph.nodes if node.name == "x")
    with pytest.raises(PassError, match=r"x \(placeholder\) is not a stored tensor.*Constants\.add"):
        constants.replace(x, torch.zeros(1))


def reload(program: ExportedProgram) -> ExportedProgram:
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


aten = torch.ops.aten


def hand_made() -> tuple[fx.Graph, dict[str, fx.Node]]:
    """y = x·2 is viewed, the view is written; z = x·3 is clamped in place by relu_; w = x·4 is written by nobody."""
    graph = fx.Graph()
    nodes = {"x": graph.placeholder("x")}
    for name, factor in (("y", 2), ("z", 3), ("w", 4)):
        nodes[name] = graph.call_function(aten.mul.Tensor, (nodes["x"], factor))
    nodes["view"] = graph.call_function(aten.view.default, (nodes["y"], [-1]))
    nodes["part"] = graph.call_function(aten.slice.Tensor, (nodes["y"], 0, 0, 1))
    nodes["write"] = graph.call_function(aten.add_.Tensor, (nodes["view"], 1))
    nodes["relu"] = graph.call_function(aten.relu_.default, (nodes["z"],))
    nodes["detach"] = graph.call_function(aten.detach_.default, (nodes["w"],))
    nodes["clone"] = graph.call_function(aten.mul.Tensor, (nodes["y"], 1))
    graph.output((nodes["clone"], nodes["relu"]))
    return graph, nodes


def test_written_nodes() -> None:
    graph, nodes = hand_made()
    written = {name for name, node in nodes.items() if node in written_nodes(graph)}
    assert written == {"y", "view", "part", "write", "z", "relu"}
    off_grid = {name for name, node in nodes.items() if node in written_off_grid(graph)}
    assert off_grid == {"y", "view", "part", "write"}

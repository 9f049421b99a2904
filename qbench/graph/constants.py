"""The stored tensors of a graph, whichever way the graph holds them.

    GraphModule        a `get_attr` node names a parameter or buffer of the module
    ExportedProgram    a placeholder is listed in the signature; its tensor lies in `state_dict` or `constants`

`constants_of` returns one interface to both: read a node's value, replace it, add a new stored tensor. In an
ExportedProgram a new tensor becomes a buffer whose placeholder stands with those of the other parameters and buffers,
so the user's inputs stay what they are. After an edit call `finish`.
"""

from __future__ import annotations

import abc
import functools
import itertools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, fx, nn
from torch._guards import detect_fake_mode
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument

from qbench.errors import PassError
from qbench.graph.aliasing import written_nodes, written_off_grid
from qbench.graph.dialect import overload

# The kinds of input that may stand before a buffer.
_BEFORE_BUFFERS = (InputKind.TOKEN, InputKind.PARAMETER, InputKind.BUFFER)


def constants_of(program: ExportedProgram | fx.GraphModule) -> Constants:
    """The stored tensors of a program or of a GraphModule.

    Raises:
        PassError: it is something else.
    """
    if isinstance(program, ExportedProgram):
        return ProgramConstants(program)
    if isinstance(program, fx.GraphModule):
        return ModuleConstants(program)
    raise PassError(
        f"expected a torch.export.ExportedProgram or a torch.fx.GraphModule, got {type(program).__name__}: "
        "program = qbench.convert(model, example_inputs), or program.module()"
    )


class Constants(abc.ABC):
    """Stored tensors of one graph.

    Attributes:
        graph_module: The module that is read and edited.
    """

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.graph_module = graph_module

    @property
    def graph(self) -> fx.Graph:
        """The graph that is read and edited."""
        return self.graph_module.graph

    @functools.cached_property
    def written(self) -> frozenset[fx.Node]:
        """Nodes that an in-place operator may change, as the graph was when this was first asked."""
        return written_nodes(self.graph)

    @functools.cached_property
    def written_off_grid(self) -> frozenset[fx.Node]:
        """Nodes that an in-place operator may move off their grid, as the graph was when this was first asked."""
        return written_off_grid(self.graph)

    def get(self, node: fx.Node) -> Tensor | None:
        """Value of `node` if it is the same in every run, detached; else None.

        That is a stored tensor that no operator writes to, or a pure operator on such values (a clone of a lifted
        constant, a sum of two parameters).
        """
        if self.key(node) is None:
            return self._evaluate(node)
        stored = None if node in self.written else self._stored(node)
        return stored.detach() if isinstance(stored, Tensor) else None

    @abc.abstractmethod
    def key(self, node: fx.Node) -> str | None:
        """Name under which the graph stores the tensor of `node`, `"conv.bias"`; None for all other nodes."""

    @abc.abstractmethod
    def nodes(self, key: str) -> list[fx.Node]:
        """The nodes that stand for the stored tensor `key`."""

    @abc.abstractmethod
    def replace(self, node: fx.Node, tensor: Tensor) -> None:
        """Store another tensor under the key of `node`; every reader of that key sees it."""

    @abc.abstractmethod
    def add(self, name: str, tensor: Tensor, before: fx.Node) -> fx.Node:
        """Store a new tensor as a buffer and return its node, which `before` and what follows can read.

        Args:
            name: Key that it gets; with a number behind it if that is taken.
            tensor: Its value.
            before: A node of the graph.
        """

    @abc.abstractmethod
    def drop_unused(self, keys: Iterable[str] | None = None) -> list[str]:
        """Forget the stored tensors that no node reads: those of `keys`, or all. Returns the keys that went."""

    @abc.abstractmethod
    def _stored(self, node: fx.Node) -> object: ...

    def readers(self, node: fx.Node) -> list[fx.Node]:
        """Every node that reads the stored tensor of `node`; one that reads it twice is there twice."""
        key = self.key(node)
        same = [node] if key is None else self.nodes(key)
        return [reader for other in same for reader in other.users for _ in range(_times_read(reader, other))]

    def fake(self, tensor: Tensor) -> Tensor | None:
        """What the graph's nodes keep in `meta["val"]` of such a tensor; None if they keep nothing."""
        values = [node.meta["val"] for node in self.graph.nodes if isinstance(node.meta.get("val"), Tensor)]
        mode = detect_fake_mode(values)
        return None if mode is None else mode.from_tensor(tensor, static_shapes=True)

    def finish(self) -> None:
        """Check the edited graph and compile it."""
        self.graph.lint()
        self.graph_module.recompile()

    def _describe(self, node: fx.Node, tensor: Tensor) -> None:
        node.meta.pop("tensor_meta", None)
        value = self.fake(tensor)
        if value is not None:
            node.meta["val"] = value

    def _evaluate(self, node: fx.Node) -> Tensor | None:
        found = overload(node.target) if node in self._fixed else None
        if found is None:
            return None
        values = {source: self.get(source) for source in node.all_input_nodes}
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: values[source])
        result = found(*args, **kwargs)
        return result.detach() if isinstance(result, Tensor) else None

    @functools.cached_property
    def _fixed(self) -> frozenset[fx.Node]:
        """Nodes that compute the same in every run, as the graph was when this was first asked.

        Found in one sweep: asking node by node would walk a branching graph once for every path through it.
        """
        fixed: set[fx.Node] = set()
        for node in self.graph.nodes:
            if node in self.written:
                continue
            if self.key(node) is not None:
                if isinstance(self._stored(node), Tensor):
                    fixed.add(node)
            elif _is_pure(node) and node.all_input_nodes and fixed.issuperset(node.all_input_nodes):
                fixed.add(node)
        return frozenset(fixed)


def _is_pure(node: fx.Node) -> bool:
    found = overload(node.target) if node.op == "call_function" else None
    if found is None or torch.Tag.nondeterministic_seeded in found.tags:
        return False
    return not found._schema.is_mutable or found is torch.ops.aten.detach_.default


class ModuleConstants(Constants):
    """Stored tensors of a GraphModule: its `get_attr` nodes."""

    def key(self, node: fx.Node) -> str | None:
        """See `Constants.key`."""
        return str(node.target) if node.op == "get_attr" else None

    def nodes(self, key: str) -> list[fx.Node]:
        """See `Constants.nodes`."""
        return list(self.graph.find_nodes(op="get_attr", target=key))

    def replace(self, node: fx.Node, tensor: Tensor) -> None:
        """See `Constants.replace`."""
        key = _stored_key(self, node)
        owner, name = self._owner(key)
        if name in owner._parameters:
            owner._parameters[name] = nn.Parameter(tensor, requires_grad=False)
        elif name in owner._buffers:
            owner._buffers[name] = tensor
        else:
            setattr(owner, name, tensor)
        for same in self.nodes(key):
            self._describe(same, tensor)

    def add(self, name: str, tensor: Tensor, before: fx.Node) -> fx.Node:
        """See `Constants.add`."""
        key = _free_name(name, lambda taken: hasattr(self.graph_module, taken))
        self.graph_module.register_buffer(key, tensor)
        with self.graph.inserting_before(before):
            node = self.graph.get_attr(key)
        self._describe(node, tensor)
        return node

    def drop_unused(self, keys: Iterable[str] | None = None) -> list[str]:
        """See `Constants.drop_unused`."""
        unused = []
        wanted = {str(node.target) for node in self.graph.find_nodes(op="get_attr")} if keys is None else set(keys)
        for key in sorted(wanted):
            nodes = self.nodes(key)
            if any(node.users for node in nodes):
                continue
            for node in nodes:
                self.graph.erase_node(node)
            owner, name = self._owner(key)
            delattr(owner, name)
            unused.append(key)
        return unused

    def _stored(self, node: fx.Node) -> object:
        owner, name = self._owner(str(node.target))
        return getattr(owner, name, None)

    def _owner(self, key: str) -> tuple[nn.Module, str]:
        path, _, name = key.rpartition(".")
        return self.graph_module.get_submodule(path), name


class ProgramConstants(Constants):
    """Stored tensors of an ExportedProgram: parameters, buffers and lifted constants of its signature.

    Attributes:
        program: The program.
    """

    def __init__(self, program: ExportedProgram) -> None:
        super().__init__(program.graph_module)
        self.program = program
        self._index()

    def _index(self) -> None:
        kinds = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
        specs = self.program.graph_signature.input_specs
        self._specs = {spec.arg.name: spec for spec in specs if spec.kind in kinds and spec.target is not None}

    def key(self, node: fx.Node) -> str | None:
        """See `Constants.key`."""
        spec = self._specs.get(node.name) if node.op == "placeholder" else None
        return None if spec is None else spec.target

    def nodes(self, key: str) -> list[fx.Node]:
        """See `Constants.nodes`."""
        return [node for node in self.graph.find_nodes(op="placeholder") if self.key(node) == key]

    def replace(self, node: fx.Node, tensor: Tensor) -> None:
        """See `Constants.replace`."""
        key = _stored_key(self, node)
        if self._specs[node.name].kind is InputKind.PARAMETER:
            tensor = nn.Parameter(tensor, requires_grad=False)
        self._place(node)[key] = tensor
        for same in self.nodes(key):
            self._describe(same, tensor)

    def add(self, name: str, tensor: Tensor, before: fx.Node) -> fx.Node:
        """See `Constants.add`."""
        del before  # every node of a program can read every placeholder
        taken = {spec.target for spec in self.program.graph_signature.input_specs if spec.target is not None}
        taken |= {*self.program.state_dict, *self.program.constants}
        key = _free_name(name, lambda candidate: candidate in taken)
        specs = self.program.graph_signature.input_specs
        position = max((i + 1 for i, spec in enumerate(specs) if spec.kind in _BEFORE_BUFFERS), default=0)
        node = self._insert_placeholder(f"b_{key.replace('.', '_')}", position)
        argument = TensorArgument(name=node.name)
        specs.insert(position, InputSpec(InputKind.BUFFER, argument, key, persistent=True))
        self.program.state_dict[key] = tensor
        self._index()
        self._describe(node, tensor)
        return node

    def drop_unused(self, keys: Iterable[str] | None = None) -> list[str]:
        """See `Constants.drop_unused`. A buffer that the program writes back to stays."""
        wanted = {spec.target for spec in self._specs.values()} if keys is None else set(keys)
        wanted -= set(self.program.graph_signature.buffers_to_mutate.values())
        unused = [key for key in sorted(filter(None, wanted)) if not any(node.users for node in self.nodes(key))]
        for key in unused:
            for node in self.nodes(key):
                self._place(node).pop(key, None)
                self.program.graph_signature.input_specs.remove(self._specs[node.name])
                self.graph.erase_node(node)
            self._index()
        return unused

    def finish(self) -> None:
        """Check the edited program and compile its graph module."""
        super().finish()
        self.program.validate()

    def _insert_placeholder(self, name: str, position: int) -> fx.Node:
        placeholders = self.graph.find_nodes(op="placeholder")
        if position < len(placeholders):
            where = self.graph.inserting_before(placeholders[position])
        elif placeholders:
            where = self.graph.inserting_after(placeholders[-1])
        else:
            where = self.graph.inserting_before(next(iter(self.graph.nodes)))
        with where:
            node = self.graph.placeholder(name)
        # fx numbers a name that is taken but leaves the target as it was asked for; the verifier compares names.
        node.target = node.name
        return node

    def _stored(self, node: fx.Node) -> object:
        key = _stored_key(self, node)
        if key in self.program.graph_signature.buffers_to_mutate.values():
            return None
        return self._place(node).get(key)

    def _place(self, node: fx.Node) -> dict[str, object]:
        """The dictionary of the program that holds the tensor of `node`."""
        spec = self._specs[node.name]
        in_constants = spec.kind is InputKind.CONSTANT_TENSOR or spec.persistent is False
        if in_constants or (spec.target not in self.program.state_dict and spec.target in self.program.constants):
            return self.program.constants
        return self.program.state_dict


def _times_read(reader: fx.Node, source: fx.Node) -> int:
    found: list[fx.Node] = []
    fx.map_arg((reader.args, reader.kwargs), found.append)
    return found.count(source)


def _stored_key(constants: Constants, node: fx.Node) -> str:
    key = constants.key(node)
    if key is None:
        raise PassError(f"{node.name} ({node.op}) is not a stored tensor of the graph; Constants.add stores a new one")
    return key


def _free_name(name: str, is_taken: Callable[[str], bool]) -> str:
    candidates = (name if number == 0 else f"{name}_{number}" for number in itertools.count())
    return next(candidate for candidate in candidates if not is_taken(candidate))

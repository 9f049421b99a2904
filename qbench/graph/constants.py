"""The stored tensors of a graph, whichever way the graph holds them.

    GraphModule        a `get_attr` node names a parameter or buffer of the module
    ExportedProgram    a placeholder is listed in the signature; its tensor lies in `state_dict` or `constants`

`constants_of` returns one interface to both: read a node's value, replace it, add a new stored tensor. In an
ExportedProgram a new tensor becomes a buffer whose placeholder stands with those of the other parameters and buffers,
so the user's inputs stay what they are. After an edit call `finish`.

Nothing here walks the graph once per call: a graph of ten thousand layers asks as many questions. `add` and `replace`
keep the tables that answer them up to date; `drop_unused` makes them anew, so ask it once for many keys.
"""

from __future__ import annotations

import abc
import functools
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, InputSpec, TensorArgument

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
        self._index()

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

    def nodes(self, key: str) -> list[fx.Node]:
        """The nodes that stand for the stored tensor `key`: those that were there at first, and those of `add`."""
        return [node for node in self._nodes.get(key, ()) if not node._erased]

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

    def _index(self) -> None:
        """Fill `_nodes`: the nodes of each key."""
        self._nodes: dict[str, list[fx.Node]] = {}
        for node in self._placeholders():
            self._register(node)

    @abc.abstractmethod
    def _placeholders(self) -> Iterable[fx.Node]:
        """The nodes that may stand for a stored tensor."""

    def _register(self, node: fx.Node) -> None:
        key = self.key(node)
        if key is not None:
            self._nodes.setdefault(key, []).append(node)

    def readers(self, node: fx.Node) -> list[fx.Node]:
        """Every node that reads the stored tensor of `node`; one that reads it twice is there twice."""
        key = self.key(node)
        same = [node] if key is None else self.nodes(key)
        return [reader for other in same for reader in other.users for _ in range(_times_read(reader, other))]

    def fake(self, tensor: Tensor) -> Tensor | None:
        """What the graph's nodes keep in `meta["val"]` of such a tensor; None if they keep nothing."""
        if self._fake_mode is None:
            return None
        # FakeTensorMode.from_tensor does the same and more, at many times the cost.
        meta = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        fake = FakeTensor(self._fake_mode, meta, tensor.device)
        return nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake

    @functools.cached_property
    def _fake_mode(self) -> FakeTensorMode | None:
        values = [node.meta["val"] for node in self.graph.nodes if isinstance(node.meta.get("val"), Tensor)]
        return detect_fake_mode(values)

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
        if node not in self._fixed:
            return None
        computed, waiting = {node}, [node]
        while waiting:
            sources = set(waiting.pop().all_input_nodes) - computed
            computed |= sources
            waiting += [source for source in sources if self.key(source) is None]
        values: dict[fx.Node, Any] = {}
        for each in sorted(computed):
            stored = self.key(each) is not None
            values[each] = self.get(each) if stored else _call(each, values)
        result = values[node]
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


def _call(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    found = overload(node.target)
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: values[source])
    return None if found is None else found(*args, **kwargs)


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
        self._register(node)
        self._describe(node, tensor)
        return node

    def drop_unused(self, keys: Iterable[str] | None = None) -> list[str]:
        """See `Constants.drop_unused`."""
        self._index()  # others may have put in get_attr nodes
        unused = []
        for key in sorted(self._nodes if keys is None else set(keys)):
            nodes = self.nodes(key)
            if any(node.users for node in nodes):
                continue
            for node in nodes:
                self.graph.erase_node(node)
            owner, name = self._owner(key)
            delattr(owner, name)
            unused.append(key)
        return unused

    def _placeholders(self) -> Iterable[fx.Node]:
        return self.graph.find_nodes(op="get_attr")

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
        self.program = program
        super().__init__(program.graph_module)

    def _index(self) -> None:
        kinds = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
        signature = self.program.graph_signature
        specs = signature.input_specs
        self._specs = {spec.arg.name: spec for spec in specs if spec.kind in kinds and spec.target is not None}
        self._taken = {spec.target for spec in specs} | {*self.program.state_dict, *self.program.constants}
        self._mutated = frozenset(signature.buffers_to_mutate.values())
        # New buffers stand at this position of the signature, in front of this node.
        self._position = max((i + 1 for i, spec in enumerate(specs) if spec.kind in _BEFORE_BUFFERS), default=0)
        self._behind = next(itertools.islice(self.graph.nodes, self._position, None))
        super()._index()

    def _placeholders(self) -> Iterable[fx.Node]:
        return self.graph.find_nodes(op="placeholder")

    def key(self, node: fx.Node) -> str | None:
        """See `Constants.key`."""
        spec = self._specs.get(node.name) if node.op == "placeholder" else None
        return None if spec is None else spec.target

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
        key = _free_name(name, self._taken.__contains__)
        node = self._insert_placeholder(f"b_{key.replace('.', '_')}")
        spec = InputSpec(InputKind.BUFFER, TensorArgument(name=node.name), key, persistent=True)
        self.program.graph_signature.input_specs.insert(self._position, spec)
        self.program.state_dict[key] = tensor
        self._position += 1
        self._taken.add(key)
        self._specs[node.name] = spec
        self._register(node)
        self._describe(node, tensor)
        return node

    def drop_unused(self, keys: Iterable[str] | None = None) -> list[str]:
        """See `Constants.drop_unused`. A buffer that the program writes back to stays."""
        wanted = (set(self._nodes) if keys is None else set(keys)) - self._mutated
        unused = [key for key in sorted(wanted) if not any(node.users for node in self.nodes(key))]
        gone = [node for key in unused for node in self.nodes(key)]
        names = {node.name for node in gone}
        for node in gone:
            self._place(node).pop(_stored_key(self, node), None)
            self.graph.erase_node(node)
        specs = self.program.graph_signature.input_specs
        specs[:] = [spec for spec in specs if spec.arg.name not in names]
        self._index()
        return unused

    @functools.cached_property
    def written_back(self) -> frozenset[str]:
        """Names of the values that the program writes back to its buffers and inputs."""
        signature = self.program.graph_signature
        return frozenset({*signature.buffers_to_mutate, *signature.user_inputs_to_mutate})

    def rename_output(self, old: str, new: str) -> None:
        """Let the signature name another node where it lists `old` among the outputs."""
        arguments = [argument for argument in self._outputs.pop(old, []) if argument.name == old]
        for argument in arguments:
            argument.name = new
        self._outputs.setdefault(new, []).extend(arguments)

    @functools.cached_property
    def _outputs(self) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {}
        for spec in self.program.graph_signature.output_specs:
            if not isinstance(spec.arg, ConstantArgument):
                found.setdefault(spec.arg.name, []).append(spec.arg)
        return found

    def finish(self) -> None:
        """Check the edited program and compile its graph module."""
        super().finish()
        self.program.validate()

    def _insert_placeholder(self, name: str) -> fx.Node:
        if self._behind._erased:
            self._behind = next(itertools.islice(self.graph.nodes, self._position, None))
        with self.graph.inserting_before(self._behind):
            node = self.graph.placeholder(name)
        # fx numbers a name that is taken but leaves the target as it was asked for; the verifier compares names.
        node.target = node.name
        return node

    def _stored(self, node: fx.Node) -> object:
        key = _stored_key(self, node)
        if key in self._mutated:
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

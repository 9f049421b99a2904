"""float → fused: chains of modules become wrappers, functional operations become modules.

Each module's own `forward` is traced alone, with all its submodules as leaves. Where only modules of their own are
fused, the wrapper takes the place of the first and `Identity` that of the others: the class, its methods and its
control flow stay. Only where a functional operation or a reused activation is replaced does that one `forward` become
a graph. A `forward` that cannot be traced, or that differs between training and eval, is left as it is; its submodules
are treated all the same.
"""

from __future__ import annotations

import copy
import dataclasses
import operator
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from difflib import get_close_matches
from typing import Any, cast

import torch
from torch import fx, nn

from qbench import mappings
from qbench.errors import FusionError
from qbench.modes import evaluating
from qbench.nn import ops
from qbench.nn.attention import ExplicitAttention
from qbench.nn.frozen import known_types
from qbench.nn.intrinsic import Fused
from qbench.nn.intrinsic.fused import matches_part
from qbench.nn.norm_act import NormAct, split_norm_acts
from qbench.nn.qat.body import QatModule
from qbench.torch_ao import adopt
from qbench.tracing import FusedGraph, InMode, Traced, trace

# Where the reasons of a fused model are kept, for the report that `prepare_qat` makes.
NOTES = "_qbench_fusion_notes"
_MODES_DIFFER = "its forward differs between training and eval, so functional operations were left as they are"


def fuse(model: nn.Module, *, example_inputs: tuple[Any, ...] | None = None) -> nn.Module:
    """A copy of `model` in which every chain of a known pattern is a wrapper and every operation a module.

    Operations are the functions that have a QAT form: add, sub, mul, cat, mean, average pools, activations.

    Float outputs do not change, bit for bit in eval, and the parameters keep their values.

    Args:
        model: Any float model; it is not changed.
        example_inputs: One tuple of inputs; if given, both models are run on it in eval and their outputs compared.

    Raises:
        FusionError: a BatchNorm cannot be folded into the layer before it, or an output would change.
    """
    if not isinstance(model, nn.Module):
        raise FusionError(f"fuse: got {type(model).__name__}, expected a torch.nn.Module")
    # What it leaves is not noted here: prepare_qat looks again, with examples of its own.
    fused, _ = adopt(copy.deepcopy(model), () if example_inputs is None else (example_inputs,))
    notes: dict[str, str] = dict(split_norm_acts(fused))
    places = Counter(id(module) for _, module in fused.named_modules(remove_duplicate=False))
    fused = _fuse_tree(fused, "", places, notes, {})
    object.__setattr__(fused, NOTES, notes)
    if example_inputs is not None:
        _compare_outputs(model, fused, example_inputs)
    return fused


def fuse_modules(
    model: nn.Module, modules_to_fuse: Sequence[str] | Sequence[Sequence[str]], *, inplace: bool = False
) -> nn.Module:
    """Fuse chains that are named by hand, for models with Python control flow.

    Args:
        model: A float model.
        modules_to_fuse: Paths of one chain, `["conv", "bn", "relu"]`, or a list of such lists.
        inplace: Change `model` itself.

    Returns:
        The model, with the wrapper in place of the first module of each chain and `Identity` in place of the others.

    Raises:
        FusionError: a path does not exist, no pattern has this chain, or a BatchNorm cannot be folded.
    """
    model = model if inplace else copy.deepcopy(model)
    one = bool(modules_to_fuse) and isinstance(modules_to_fuse[0], str)
    chains: Any = [modules_to_fuse] if one else modules_to_fuse
    for chain in chains:
        names = [str(name) for name in chain]
        parts = tuple(_submodule(model, name) for name in names)
        _install(model, names, _wrap(mappings.wrapper_of(parts), parts, names[0]))
    return model


def _fuse_tree(
    module: nn.Module, path: str, places: Counter[int], notes: dict[str, str], done: dict[int, nn.Module]
) -> nn.Module:
    if id(module) in done:
        return done[id(module)]
    # Not named_children, which leaves out the second name of a child.
    for name, child in list(module._modules.items()):
        if child is None:
            continue
        # setattr keeps the position in the module's order.
        setattr(module, name, _fuse_tree(child, f"{path}.{name}" if path else name, places, notes, done))
    result = _fuse_one(module, path, places, notes) if _has_own_forward(module) else module
    done[id(module)] = result
    return result


_LAYERS = (nn.modules.conv._ConvNd, nn.Linear, nn.modules.batchnorm._BatchNorm)


def _has_own_forward(module: nn.Module) -> bool:
    if isinstance(module, (Fused, QatModule, ops.Operation, fx.GraphModule, NormAct, ExplicitAttention)):
        return False  # a NormAct's two parts belong to the forward that calls it
    if any(kind in mappings.default_mapping() for kind in known_types(module)):
        return False  # it is quantized as a whole
    if isinstance(module, _LAYERS):
        return False  # a layer that computes its weight, say: a mapping knows it by its type
    if isinstance(module, nn.Sequential):
        return True
    own = type(module).__module__
    return not own.startswith(("torch.nn.", "torch.ao.")) and type(module).forward is not nn.Module.forward


def _fuse_one(module: nn.Module, path: str, places: Counter[int], notes: dict[str, str]) -> nn.Module:
    try:
        traced = trace(module)
    except Exception as error:
        # Any exception of the user's own code may come out of tracing; the module is left as it is, and that is noted.
        reason = next(iter(str(error).splitlines()), "")
        notes[path] = f"its forward cannot be traced ({type(error).__name__}: {reason})"
        return module
    graph = traced.graph
    calls = Counter(id(_target(module, node)) for node in graph.nodes if node.op == "call_module")
    editor = _Editor(module, traced, path)

    def usable(node: fx.Node) -> bool:
        """Whether a chain may go on with this node: leaving out a call needs a graph, which has one mode."""
        return traced.serves_both_modes or (node.op == "call_module" and is_own(_target(module, node)))

    def is_own(part: nn.Module) -> bool:
        return calls[id(part)] == 1 and places[id(part)] == 1

    for chain in list(_chains(module, graph, usable)):
        parts = [part for _, part in chain.links]
        if not all(map(is_own, parts[:-1] or parts)):
            notes[path] = f"{chain.names()} is called or registered more than once, so it was not fused"
            continue
        if chain.last_is_module and is_own(parts[-1]):
            editor.install(chain)
        elif not any(True for _ in parts[-1].parameters()):
            editor.absorb(chain)
    if traced.serves_both_modes:
        editor.replace_operations()
        editor.read_what_is_written()
    elif any(_operation(module, node) or _called_module(node) for node in graph.nodes):
        notes[path] = _MODES_DIFFER
    return editor.finish()


@dataclasses.dataclass(frozen=True)
class _Chain:
    """Nodes and modules of one match."""

    wrapper: type[Fused]
    links: tuple[tuple[fx.Node, nn.Module], ...]

    @property
    def last_is_module(self) -> bool:
        return self.links[-1][0].op == "call_module"

    def names(self) -> str:
        return ", ".join(str(node.target) if node.op == "call_module" else node.name for node, _ in self.links)


def _target(module: nn.Module, node: fx.Node) -> nn.Module:
    return module.get_submodule(str(node.target))


def _chains(module: nn.Module, graph: fx.Graph, usable: Callable[[fx.Node], bool]) -> Iterator[_Chain]:
    taken: set[fx.Node] = set()
    for node in graph.nodes:
        if node in taken or node.op != "call_module":
            continue
        for wrapper in mappings.wrappers():
            links = _match(module, node, wrapper, usable)
            if links:
                taken.update(link for link, _ in links)
                yield _Chain(wrapper, links)
                break


def _match(
    module: nn.Module, node: fx.Node, wrapper: type[Fused], usable: Callable[[fx.Node], bool]
) -> tuple[tuple[fx.Node, nn.Module], ...]:
    links: list[tuple[fx.Node, nn.Module]] = []
    current: fx.Node | None = node
    for position, wanted in enumerate(wrapper.part_types):
        fits = current is not None and (not position or usable(current))
        part = _as_module(module, current) if current is not None and fits else None
        if current is None or part is None or not matches_part(part, wanted):
            return ()
        if position and (current.op == "call_module") and len(current.args) != 1:
            return ()
        links.append((current, part))
        current = next(iter(current.users)) if len(current.users) == 1 else None
    return tuple(links)


def _as_module(module: nn.Module, node: fx.Node) -> nn.Module | None:
    """The module that a node calls; for the call of an activation function, a module that computes the same."""
    if node.op == "call_module":
        return _target(module, node)
    return _called_module(node)


def _called_module(node: fx.Node) -> nn.Module | None:
    """A module that computes what the call of a function or method of one tensor does."""
    kind = mappings.MODULE_CALLS.get(node.target) if node.op in ("call_function", "call_method") else None
    if kind is None or not node.args or node.all_input_nodes != [node.args[0]]:
        return None
    try:
        return kind(*node.args[1:], **node.kwargs)
    except (TypeError, ValueError):  # an argument that the module does not have, such as dtype= or out=
        return None


class _Editor:
    """Applies the replacements to one module; makes a graph of its forward only if one of them needs it."""

    def __init__(self, module: nn.Module, traced: Traced, path: str) -> None:
        self.module, self.graph, self.path = module, traced.graph, path
        self.by_mode = traced.by_mode
        self.needs_graph = False

    def install(self, chain: _Chain) -> None:
        """The wrapper in place of the first module, Identity in place of the others."""
        names = [str(node.target) for node, _ in chain.links]
        parts = tuple(part for _, part in chain.links)
        _install(self.module, names, _wrap(chain.wrapper, parts, f"{self.path}.{names[0]}".lstrip(".")))

    def absorb(self, chain: _Chain) -> None:
        """As `install`, but the last part is a call or a module with other uses: it leaves the graph."""
        names = [str(node.target) for node, _ in chain.links[:-1]]
        parts = (*(part for _, part in chain.links[:-1]), copy.deepcopy(chain.links[-1][1]))
        _install(self.module, names, _wrap(chain.wrapper, parts, f"{self.path}.{names[0]}".lstrip(".")))
        last = chain.links[-1][0]
        last.replace_all_uses_with(chain.links[-2][0])
        self.graph.erase_node(last)
        self.needs_graph = True

    def replace_operations(self) -> None:
        for node in list(self.graph.nodes):
            made = _operation(self.module, node)
            if made is None:
                continue
            replacement, inputs, last = made
            name = node.name.strip("_")
            if node.target in (operator.iadd, operator.isub, operator.imul, operator.itruediv):
                name = name.removeprefix("i")  # x += y is named like x + y
            name = self._free_name(name)
            self.module.add_module(name, replacement.train(self.module.training))
            with self.graph.inserting_before(node):
                call = self.graph.call_module(name, inputs)
            last.replace_all_uses_with(call)
            self.graph.erase_node(last)
            if last is not node:
                self.graph.erase_node(node)
            self.needs_graph = True

    def read_what_is_written(self) -> None:
        """Let readers of a tensor that a module wrote to before read the module: its QAT form does not write."""
        order = {node: i for i, node in enumerate(self.graph.nodes)}
        known = mappings.default_mapping()
        for node in self.graph.nodes:
            part = _target(self.module, node) if node.op == "call_module" else None
            if type(part) not in known or not getattr(part, "inplace", False) or len(node.args) != 1:
                continue
            for reader in list(node.args[0].users):
                if order.get(reader, -1) > order[node]:
                    reader.replace_input_with(node.args[0], node)
                    self.needs_graph = True

    def finish(self) -> nn.Module:
        if not self.needs_graph:
            return self.module
        for node in list(self.graph.nodes):
            # A BatchNorm that moved into a wrapper.
            if node.op == "call_module" and type(_target(self.module, node)) is nn.Identity and len(node.args) == 1:
                node.replace_all_uses_with(node.args[0])
                self.graph.erase_node(node)
            elif node in self.by_mode:
                self._follow_mode(node)
        self.graph.lint()
        return FusedGraph(self.module, self.graph, type(self.module).__name__)

    def _follow_mode(self, node: fx.Node) -> None:
        """Put a module in place of a call whose arguments depend on the mode, as a graph has one form for both."""
        name = self._free_name(node.name.strip("_"))
        follower = InMode(cast("Callable[..., Any]", node.target), self.by_mode[node])
        self.module.add_module(name, follower.train(self.module.training))
        with self.graph.inserting_before(node):
            call = self.graph.call_module(name, node.args, node.kwargs)
        node.replace_all_uses_with(call)
        self.graph.erase_node(node)

    def _free_name(self, wanted: str) -> str:
        name, number = wanted, 0
        while hasattr(self.module, name):
            number += 1
            name = f"{wanted}_{number}"
        return name


def _operation(module: nn.Module, node: fx.Node) -> tuple[nn.Module, tuple[Any, ...], fx.Node] | None:
    """The module for a functional operation, its inputs, and the last node that it replaces (a ReLU after an add)."""
    if node.op not in ("call_function", "call_method") or not node.users:
        return None
    target, args, kwargs = node.target, node.args, node.kwargs
    called = _called_module(node)
    if called is not None:
        usable = type(called) in mappings.default_mapping() and _mutation_is_unseen(module, node)
        return (called, tuple(node.all_input_nodes), node) if usable else None
    if target in mappings.LIST_OPS:
        return _concatenation(node)
    if target in mappings.CALLS_WITH_VALUES:
        return _call_with_values(node)
    if target in mappings.NEGATIONS and len(args) == 1 and not kwargs and _is_tensor(args[0]):
        return ops.Mul(), (args[0], -1), node
    if target not in mappings.TENSOR_OPS or len(args) != 2 or kwargs:
        return None
    if not any(map(_is_tensor, args)) or not all(map(_is_operand, args)) or not _mutation_is_unseen(module, node):
        return None
    made = mappings.TENSOR_OPS[target]()
    user = next(iter(node.users)) if len(node.users) == 1 else None
    if isinstance(made, ops.Add) and user is not None and isinstance(_as_module(module, user), nn.ReLU):
        return ops.AddReLU(), args, user
    return made, args, node


def _is_operand(value: Any) -> bool:
    """A traced value or a number; truth values are neither."""
    return isinstance(value, fx.Node) or (isinstance(value, (int, float)) and not isinstance(value, bool))


def _concatenation(node: fx.Node) -> tuple[nn.Module, tuple[Any, ...], fx.Node] | None:
    options = {**dict(zip(("tensors", "dim"), node.args, strict=False)), **node.kwargs}
    tensors, dim = options.pop("tensors"), options.pop("dim", options.pop("axis", 0))
    if options or not isinstance(dim, int):
        return None
    if isinstance(tensors, fx.Node):  # a list that the forward was given, as in DenseNet
        return mappings.LIST_OPS[node.target](dim), (tensors,), node
    if not isinstance(tensors, (list, tuple)) or len(tensors) < 2:
        return None
    inputs = tuple(tensor for tensor in tensors if isinstance(tensor, fx.Node))
    return (mappings.LIST_OPS[node.target](dim), inputs, node) if len(inputs) == len(tensors) else None


def _call_with_values(node: fx.Node) -> tuple[nn.Module, tuple[Any, ...], fx.Node] | None:
    options = dict(node.kwargs)
    data, *rest = node.args or (options.pop("input", None),)
    try:
        made, values = mappings.CALLS_WITH_VALUES[node.target](*rest, **options)
    except TypeError:  # an argument that the module does not have
        return None
    settings = torch.utils._pytree.tree_leaves(list(vars(made).values()))
    # What the module keeps must be known now.
    if not _is_tensor(data) or any(isinstance(value, fx.Node) for value in settings):
        return None
    return None if _qat_type_of(made).keeps_grid(made) else (made, (data, *values), node)


def _qat_type_of(module: nn.Module) -> type[QatModule]:
    return mappings.default_mapping()[type(module)]


def _mutation_is_unseen(module: nn.Module, node: fx.Node) -> bool:
    """Whether nobody sees that an in-place operation wrote to its left operand: no reader after it, no caller.

    Views of the operand, and whatever it is a view of, are the same memory.
    """
    if not _writes(node):
        return True
    order = {other: i for i, other in enumerate(node.graph.nodes)}
    memory: dict[fx.Node, frozenset[fx.Node]] = {}
    for other in node.graph.nodes:
        sources = other.all_input_nodes if _may_alias(module, other) else []
        memory[other] = frozenset({other}).union(*(memory[source] for source in sources))
    written = memory[node.args[0]]  # type: ignore[index]
    return all(
        other.op not in ("placeholder", "get_attr") and all(order[user] <= order[node] for user in other.users)
        for other, places in memory.items()
        if order[other] < order[node] and places & written
    )


def _writes(node: fx.Node) -> bool:
    """Whether a call writes to its first tensor."""
    return node.target in mappings.IN_PLACE_CALLS or getattr(_called_module(node), "inplace", False)


def _may_alias(module: nn.Module, node: fx.Node) -> bool:
    """Whether a node's result may share memory with its inputs; a module with parameters puts out a new tensor."""
    if node.op == "call_module":
        part = _target(module, node)
        computes = isinstance(part, ops.Operation) and not isinstance(part, InMode)  # a new tensor, too
        return not computes and not any(True for _ in part.parameters())
    if _writes(node):
        return True
    makes_new = node.target in mappings.TENSOR_OPS or node.target in mappings.LIST_OPS
    return node.op in ("call_function", "call_method") and not makes_new


_SIZE_CALLS = ("size", "dim", "numel", "nelement", "shape", "ndim", "ndimension", "stride", "item")
_ARITHMETIC = frozenset({value for value in vars(operator).values() if callable(value)} | {int, float, len, round})


def _is_tensor(value: Any) -> bool:
    """Whether a graph value is a tensor as far as can be told: sizes, and numbers computed from sizes, are not."""
    if not isinstance(value, fx.Node):
        return False
    if value.op == "call_method" and value.target in _SIZE_CALLS:
        return False
    if value.op == "call_function" and value.target is getattr:
        return value.args[1] not in (*_SIZE_CALLS, "device", "dtype")
    if value.op == "call_function" and (value.target in _ARITHMETIC):
        inputs = [arg for arg in value.args if isinstance(arg, fx.Node)]
        return any(_is_tensor(arg) for arg in inputs)
    return True


def _wrap(wrapper: type[Fused], parts: tuple[nn.Module, ...], path: str) -> Fused:
    try:
        made = wrapper(*parts)
    except FusionError as error:
        raise FusionError(f"{path}: {error}") from None
    if "qconfig" in vars(parts[0]):
        made.qconfig = parts[0].qconfig  # what was said of the layer holds for the wrapper that takes its place
    return made


def _install(model: nn.Module, names: Sequence[str], wrapper: Fused) -> None:
    for hook_holder in wrapper:
        hook_holder.train(wrapper.training)
    for position, name in enumerate(names):
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, nn.Identity().train(wrapper.training) if position else wrapper)


def _submodule(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        paths = [path for path, _ in model.named_modules() if path]
        near = [path for path in paths if path.split(".")[-1] == name.split(".")[-1]] or get_close_matches(name, paths)
        raise FusionError(
            f"fuse_modules: the model has no module {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")
        ) from None


def _compare_outputs(before: nn.Module, after: nn.Module, inputs: tuple[Any, ...]) -> None:
    first, second = (_eval_outputs(model, inputs) for model in (before, after))
    if len(first) != len(second) or not all(torch.equal(a, b) for a, b in zip(first, second, strict=True)):
        raise FusionError(
            "fuse changed the output of the model on example_inputs; please report this model. fuse_modules with the "
            "chains that you know to be right works"
        )


def _eval_outputs(model: nn.Module, inputs: tuple[Any, ...]) -> list[torch.Tensor]:
    with evaluating(model):
        out = model(*inputs)
    leaves = torch.utils._pytree.tree_leaves(out)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]

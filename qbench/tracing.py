"""One forward as a graph, in both modes, and modules whose forward is such a graph.

A graph has one form, a forward may have two: it is traced in training and in eval. Where the two differ in constants
only (`F.dropout(x, p, self.training)`), the calls that hold them become modules that follow the mode.
"""

from __future__ import annotations

import copy
import dataclasses
import operator
from collections.abc import Callable, Mapping
from typing import Any

from torch import fx, nn

from qbench.modes import modes_kept
from qbench.nn.norm_act import NormAct
from qbench.nn.ops import Operation

#: Position or name of an argument -> (its value in eval, its value in training).
ByMode = Mapping[int | str, tuple[Any, Any]]


class FusedGraph(fx.GraphModule):
    """A module whose forward became a graph; it keeps every submodule, parameter and attribute, called or not."""

    def __init__(self, root: nn.Module, graph: fx.Graph, class_name: str) -> None:
        for node in graph.nodes:
            # Annotations of the user's forward: as strings, they cannot be pickled with the graph.
            node.type = None
            # Where the root is a graph, torch.export would believe this path, which ends at the leaf of the trace.
            node.meta.pop("nn_module_stack", None)
        super().__init__(root, graph, class_name)
        _copy_contents(root, self)

    def __deepcopy__(self, memo: dict[int, Any]) -> FusedGraph:
        carrier = nn.Module()
        memo[id(self)] = carrier  # a submodule that refers back to its parent is not supported by fx either
        carrier.__dict__.update({k: copy.deepcopy(v, memo) for k, v in self.__dict__.items() if k != "_graph"})
        graph = fx.Graph()
        graph._codegen = copy.deepcopy(self.graph._codegen, memo)
        output = graph.graph_copy(self.graph, val_map={}, return_output_node=True)
        if output is not None:
            graph.output(output[0])  # type: ignore[index]
        copied = FusedGraph(carrier, graph, type(self).__name__)
        memo[id(self)] = copied
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        function, args = super().__reduce__()[:2]
        return _restore_graph, (function, args, _contents(self), type(self).__name__)

    def __str__(self) -> str:
        return nn.Module.__repr__(self)


def _restore_graph(function: Any, args: tuple[Any, ...], contents: dict[str, Any], class_name: str) -> FusedGraph:
    carrier = nn.Module()
    carrier.__dict__.update(contents)
    return FusedGraph(carrier, function(*args).graph, class_name)


# What a GraphModule makes for itself.
_GRAPH_STATE = frozenset(
    {"_graph", "_code", "graph", "meta", "_tracer_cls", "_tracer_extras", "_lineno_map", "_prologue_start", "shape_env"}
)


def _contents(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in module.__dict__.items() if name not in _GRAPH_STATE}


def _copy_contents(source: nn.Module, target: nn.Module) -> None:
    target.__dict__.update(_contents(source))


class InMode(Operation):
    """A call with arguments that depend on the mode.

    Args:
        call: The function.
        by_mode: Position or name of an argument -> (value in eval, value in training).
    """

    def __init__(self, call: Callable[..., Any], by_mode: ByMode) -> None:
        super().__init__()
        self.call, self.by_mode = call, dict(by_mode)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The call, with the values of the present mode in place of those that were traced."""
        now = {key: values[self.training] for key, values in self.by_mode.items()}
        named = {key: now.get(key, value) for key, value in kwargs.items()}
        return self.call(*[now.get(i, value) for i, value in enumerate(args)], **named)

    def extra_repr(self) -> str:
        """The function, and what depends on the mode."""
        return f"{getattr(self.call, '__name__', self.call)}, {self.by_mode}"


class _Proxy(fx.Proxy):
    """A traced value for which `x += y` stays a write: fx would record `x + y`, which other readers of x do not see."""

    def __iadd__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})

    def __isub__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.isub, (self, other), {})

    def __imul__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.imul, (self, other), {})

    def __itruediv__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.itruediv, (self, other), {})


class _LocalTracer(fx.Tracer):
    """Traces one forward: every submodule is a leaf, but for a pair that stands for one."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not isinstance(m, NormAct)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)


@dataclasses.dataclass(frozen=True)
class Traced:
    """A module's own forward, its submodules as leaves.

    Attributes:
        graph: The forward in the module's present mode.
        by_mode: The calls whose constants differ between the modes.
        serves_both_modes: Whether that is all that differs.
    """

    graph: fx.Graph
    by_mode: Mapping[fx.Node, ByMode]
    serves_both_modes: bool


def trace(module: nn.Module) -> Traced:
    """Trace the forward in both modes; raises whatever the forward raises on a traced value."""
    graphs = {}
    mode = module.training
    with modes_kept([module]):
        for training in (mode, not mode):
            module.training = training
            graphs[training] = _LocalTracer().trace(module)
    by_mode: dict[fx.Node, ByMode] = {}
    pairs = list(zip(graphs[mode].nodes, graphs[not mode].nodes, strict=False))
    same = len(graphs[True].nodes) == len(graphs[False].nodes)
    for node, other in pairs:
        differing = _differing_constants(node, other)
        if differing is None:
            same = False
        elif differing:
            by_mode[node] = {key: values if not mode else values[::-1] for key, values in differing.items()}
    return Traced(graphs[mode], by_mode, same)


def _differing_constants(node: fx.Node, other: fx.Node) -> dict[int | str, tuple[Any, Any]] | None:
    """Arguments in which two nodes differ, with both values; None where more than constants of a function differ."""
    if (node.op, str(node.target), len(node.args)) != (other.op, str(other.target), len(other.args)):
        return None
    given, others = ({**dict(enumerate(n.args)), **n.kwargs} for n in (node, other))
    if given.keys() != others.keys():
        return None
    # Nodes print as their names, which count up in the same way as long as the graphs are the same.
    differing = {key: (given[key], others[key]) for key in given if str(given[key]) != str(others[key])}
    constant = all(isinstance(v, (bool, int, float, str, type(None))) for pair in differing.values() for v in pair)
    return differing if not differing or (constant and node.op == "call_function") else None

"""Which nodes an in-place operator may change behind the back of their other readers.

A program in training IR keeps `relu_`, `add_` and the like. `y = relu_(x)` changes `x` for whoever reads it, and every
view of `x` too. So before a rewrite lets two readers share a tensor, it asks whether anyone writes to it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import fx

from qbench.graph.dialect import overload, packet
from qbench.graph.scale_preserving import is_scale_preserving


def written_nodes(graph: fx.Graph, *, harmless: Callable[[object], bool] = lambda target: False) -> frozenset[fx.Node]:
    """Nodes whose storage some operator writes to, directly or through a view.

    Args:
        graph: The graph.
        harmless: Operators (targets) whose writing does not count.
    """
    storage: dict[fx.Node, frozenset[fx.Node]] = {}
    written: set[fx.Node] = set()
    for node in graph.nodes:
        viewed = _viewed(node)
        storage[node] = frozenset().union(*(storage[source] for source in viewed)) if viewed else frozenset({node})
        if not harmless(node.target):
            for source in _written(node):
                written |= storage[source]
    return frozenset(node for node, places in storage.items() if places & written)


def written_off_grid(graph: fx.Graph) -> frozenset[fx.Node]:
    """Nodes that an in-place operator may move off their grid: `add_` does, `relu_` does not."""
    return written_nodes(graph, harmless=is_scale_preserving)


def _viewed(node: fx.Node) -> list[fx.Node]:
    """Nodes whose storage the result of `node` may share."""
    if node.target is operator.getitem:
        return node.all_input_nodes
    found = overload(node.target) if node.op == "call_function" else None
    if found is None:
        return []
    # Composite operators do not all declare it (dropout in eval hands out its input), so these count as views.
    if packet(found) is not None and is_scale_preserving(packet(found)):
        return node.all_input_nodes[:1]
    if all(result.alias_info is None for result in found._schema.returns):
        return []
    return [source for name, source in _tensor_arguments(node) if _declared(found, name).alias_info is not None]


def _written(node: fx.Node) -> list[fx.Node]:
    found = overload(node.target) if node.op == "call_function" else None
    # detach_ takes a tensor out of autograd: no value changes.
    if found is None or not found._schema.is_mutable or found is torch.ops.aten.detach_.default:
        return []
    return [
        source
        for name, source in _tensor_arguments(node)
        if (alias := _declared(found, name).alias_info) is not None and alias.is_write
    ]


def _declared(found: torch._ops.OpOverload, name: str) -> torch._C.Argument:
    return next(declared for declared in found._schema.arguments if declared.name == name)


def _tensor_arguments(node: fx.Node) -> list[tuple[str, fx.Node]]:
    """Pairs of a schema argument's name and a node given for it (several for a list)."""
    found = overload(node.target)
    if found is None:
        return []
    names = [declared.name for declared in found._schema.arguments]
    given = [*zip(names, node.args, strict=False), *node.kwargs.items()]
    pairs: list[tuple[str, fx.Node]] = []
    for name, value in given:
        nodes: list[fx.Node] = []
        fx.map_arg(value, nodes.append)
        pairs += [(name, source) for source in nodes]
    return pairs

"""Putting operators into a graph, with what a program's nodes carry: fake value, module path, stack trace."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode
from torch._ops import OpOverload

from qbench.graph.dialect import like, overload

# What tells where a node comes from; a node put in beside another one comes from the same place.
_ORIGIN = ("nn_module_stack", "stack_trace", "source_fn_stack", "torch_fn")


def insert_call(
    before: fx.Node,
    operator: OpOverload[Any, Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    neighbour: fx.Node | None = None,
    origin: fx.Node | None = None,
    value: Tensor | None = None,
) -> fx.Node:
    """Insert a call of `operator` before a node and return its node.

    Args:
        before: Where.
        operator: An aten or quantized_decomposed overload.
        args: Its arguments, nodes and literals.
        kwargs: Its keyword arguments.
        neighbour: A node of the dialect to write, `before` by default.
        origin: A node of the module that the new one is said to come from, `before` by default.
        value: Its fake value where the caller knows it, which saves the time of computing it.
    """
    target = like(operator, (neighbour or before).target)
    origin = origin or before
    with before.graph.inserting_before(before):
        node = before.graph.call_function(target, tuple(args), dict(kwargs or {}))
    node.meta.update({key: origin.meta[key] for key in _ORIGIN if key in origin.meta})
    if value is None:
        refresh(node)
    else:
        node.meta["val"] = value
    return node


def refresh(node: fx.Node) -> None:
    """Recompute `meta["val"]` of a node from those of its arguments; where one of them has none, there is none."""
    found = overload(node.target)
    values = {source: source.meta.get("val") for source in node.all_input_nodes}
    node.meta.pop("val", None)
    node.meta.pop("tensor_meta", None)
    if found is None or any(value is None for value in values.values()):
        return
    mode = detect_fake_mode(list(values.values()))
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: values[source])
    with mode or contextlib.nullcontext(), torch.no_grad():
        node.meta["val"] = found(*args, **kwargs)


def set_argument(node: fx.Node, name: str, value: Any) -> None:
    """Give the argument `name` of an operator call, wherever the call had it."""
    found = overload(node.target)
    names = [declared.name for declared in found._schema.arguments] if found is not None else []
    position = names.index(name)
    if name in node.kwargs or position > len(node.args):
        node.update_kwarg(name, value)
    elif position == len(node.args):
        node.args = (*node.args, value)
    else:
        node.update_arg(position, value)


def shape_of(node: fx.Node) -> torch.Size | None:
    """Shape of what a node computes, where the graph keeps it."""
    value = node.meta.get("val")
    return value.shape if isinstance(value, Tensor) else None


def module_path(node: fx.Node) -> str:
    """Path of the innermost module that a node was traced in, `"layer1.0.conv1"`; empty where that is not kept."""
    stack = node.meta.get("nn_module_stack") or {}
    return str(list(stack.values())[-1][0]) if stack else ""

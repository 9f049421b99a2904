"""Operators by name, whatever dialect a graph is in.

A program holds `torch._ops.OpOverload`s (aten, quantized_decomposed). ExecuTorch's edge dialect wraps each in an
`EdgeOpOverload`. Code that recognises operators compares the overload underneath; code that emits one emits the dialect
that the graph is in, because a lowered graph refuses the other.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx
from torch._ops import OpOverload, OpOverloadPacket

from qbench.errors import PassError, require


def overload(target: object) -> OpOverload[Any, Any] | None:
    """The operator overload that `target` is or wraps (edge dialect); None for functions, methods and modules."""
    if isinstance(target, OpOverload):
        return target
    inner = getattr(target, "_op", None)
    # An OpOverload has an `_op` too (its kernel), so only the wrapper's is looked at.
    return inner if isinstance(inner, OpOverload) else None


def packet(target: object) -> OpOverloadPacket[Any, Any] | None:
    """The packet of `overload(target)`, or `target` itself where it is a packet."""
    if isinstance(target, OpOverloadPacket):
        return target
    found = overload(target)
    return None if found is None else found.overloadpacket


def is_edge(target: object) -> bool:
    """Whether `target` is an operator of ExecuTorch's edge dialect."""
    return not isinstance(target, OpOverload) and overload(target) is not None


def like(operator: OpOverload[Any, Any], neighbour: object) -> Any:
    """`operator` in the dialect of `neighbour`: itself, or its edge wrapper.

    Raises:
        MissingDependencyError: `neighbour` is of the edge dialect and ExecuTorch is not installed.
    """
    if not is_edge(neighbour):
        return operator
    edge = require("executorch.exir.dialects._ops", extra="executorch", purpose="write operators of its edge dialect")
    namespace, name = operator._schema.name.split("::")
    return getattr(getattr(getattr(edge.ops.edge, namespace), name), operator._overloadname)


def argument(target: object, args: Sequence[Any], kwargs: Mapping[str, Any], name: str) -> Any:
    """The argument `name` of a call of an operator, its schema's default where the call leaves it out.

    Raises:
        PassError: `target` is not an operator or has no argument of that name.
    """
    found = overload(target)
    declared = {} if found is None else _arguments(found)
    if name not in declared:
        raise PassError(f"{target} has no argument {name!r}; it has {list(declared)}")
    position, default = declared[name]
    if name in kwargs:
        return kwargs[name]
    return args[position] if position is not None and position < len(args) else default


@functools.cache
def _arguments(operator: OpOverload[Any, Any]) -> dict[str, tuple[int | None, Any]]:
    """Position (None: by keyword only) and default of each argument; a schema is slow to read, and read often."""
    return {
        declared.name: (None if declared.kwarg_only else position, declared.default_value)
        for position, declared in enumerate(operator._schema.arguments)
    }


def node_argument(node: fx.Node, name: str) -> Any:
    """The argument `name` of a node that calls an operator (see `argument`)."""
    return argument(node.target, node.args, node.kwargs, name)


def has_argument(target: object, name: str) -> bool:
    """Whether `target` is an operator whose schema has an argument `name`."""
    found = overload(target)
    return found is not None and name in _arguments(found)

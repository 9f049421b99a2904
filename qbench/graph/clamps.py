"""Clamps between an operator and its quantize operator, as bounds of real values.

    Q(clamp(x, a, b)) = clip(Q(x), Q(a), Q(b))        Q does not decrease

so a clamp may stand on either side of a quantize operator, and a chain of clamps is one.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from qbench.graph.dialect import argument, packet

aten = torch.ops.aten

Bounds = tuple[float, float]
UNBOUNDED: Bounds = (-math.inf, math.inf)

_BOUND_NAMES: dict[Any, tuple[str | None, str | None]] = {
    aten.hardtanh: ("min_val", "max_val"),
    aten.hardtanh_: ("min_val", "max_val"),
    aten.clamp: ("min", "max"),
    aten.clamp_: ("min", "max"),
    aten.clamp_min: ("min", None),
    aten.clamp_max: (None, "max"),
}
_RELUS = (aten.relu, aten.relu_)
_RELU6S = (aten.relu6, aten.relu6_)

#: Every operator that `clamp_bounds` knows.
CLAMPS = (*_RELUS, *_RELU6S, *_BOUND_NAMES)


def clamp_bounds(node: fx.Node) -> Bounds | None:
    """The real bounds of a ReLU, ReLU6, hardtanh or clamp with literal bounds; None for every other node."""
    operation = packet(node.target)
    if operation in _RELUS:
        return 0.0, math.inf
    if operation in _RELU6S:
        return 0.0, 6.0
    names = _BOUND_NAMES.get(operation)
    if names is None:
        return None
    low, high = (name and argument(node.target, node.args, node.kwargs, name) for name in names)
    if isinstance(low, fx.Node) or isinstance(high, fx.Node):
        return None
    return (-math.inf if low is None else float(low)), (math.inf if high is None else float(high))


def then(inner: Bounds, outer: Bounds) -> Bounds:
    """Bounds of `clamp(clamp(x, *inner), *outer)`: the outer clamp has the last word on the inner one's bounds."""
    low, high = (min(max(bound, outer[0]), outer[1]) for bound in inner)
    return low, high


def clamps_before(node: fx.Node) -> tuple[fx.Node, Bounds]:
    """Follow the clamps that end in `node`, each read by nothing else.

    Returns:
        What the first clamp reads (the producer), and the bounds `[low, high]` of all clamps together.
    """
    bounds = UNBOUNDED
    source = node.args[0]
    while isinstance(source, fx.Node) and len(source.users) == 1 and (here := clamp_bounds(source)) is not None:
        bounds = then(here, bounds)
        source = source.args[0]
    if not isinstance(source, fx.Node):  # pragma: no cover - a program computes from tensors
        raise TypeError(f"{node.format_node()} does not compute from a tensor")
    return source, bounds

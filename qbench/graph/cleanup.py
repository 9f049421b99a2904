"""Removing q and dq nodes that change nothing, and what nobody reads. No value of the program changes.

    q(x), q(x)           with the same arguments            one q
    dq(c), dq(c)         with the same arguments            one dq
    q(dq(c))             on one grid, c inside its limits   c

The last is true only where `rne((c − z)·s · (1/s)) + z = c` in float32 for every code, which is tried for every code of
the grid rather than believed: it fails for scales near the ends of float32.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from qbench.graph.constants import Constants, ProgramConstants, constants_of
from qbench.graph.recognise import Dequantize, is_dequantize, is_quantize, read_dequantize, read_quantize, same_grid
from qbench.numerics.qparams import QParams, dequantize, quantize

# All codes of wider grids are not tried, so their pairs stay.
_LARGEST_TRIED = 2**16


def remove_redundant_qdq(program: ExportedProgram | fx.GraphModule) -> int:
    """Remove q and dq nodes that change nothing, dead code and stored tensors that nobody reads, in place.

    Args:
        program: A Q/DQ program, or a GraphModule of one.

    Returns:
        How many q and dq nodes went. The program is valid afterwards, and a second call returns 0.
    """
    constants = constants_of(program)
    before = _count(constants.graph)
    shared = True
    while shared:
        shared = _cancel_pairs(constants) + _share_equals(constants) > 0
        constants.graph.eliminate_dead_code()
    constants.drop_unused()
    constants.finish()
    return before - _count(constants.graph)


def _count(graph: fx.Graph) -> int:
    return sum(is_quantize(node) or is_dequantize(node) for node in graph.nodes)


def _share_equals(constants: Constants) -> int:
    """Let the readers of a q or dq node read an earlier one with the same arguments; how many were merged."""
    merged = 0
    first_of: dict[Any, fx.Node] = {}
    for node in list(constants.graph.nodes):
        if not (is_quantize(node) or is_dequantize(node)) or _is_touched(node, constants):
            continue
        key = (node.target, node.args, tuple(sorted(node.kwargs.items())))
        first = first_of.setdefault(key, node)
        if first is not node:
            merged += read_instead(node, first, constants)
    return merged


def _cancel_pairs(constants: Constants) -> int:
    """Let the readers of q(dq(c)) read c; how many were cancelled."""
    cancelled = 0
    for node in list(constants.graph.nodes):
        codes = _cancelled(node, constants)
        if codes is not None:
            cancelled += read_instead(node, codes, constants)
    return cancelled


def _cancelled(node: fx.Node, constants: Constants) -> fx.Node | None:
    """The node of c if `node` is q(dq(c)) and equal to it, else None."""
    if not node.users or not is_quantize(node) or not is_dequantize(node.args[0]):
        return None
    quantizer, source = read_quantize(node, constants), read_dequantize(node.args[0], constants)
    if quantizer is None or source is None or quantizer.dtype != source.dtype:
        return None
    if _is_touched(node, constants) or _is_touched(source.node, constants):
        return None
    if not same_grid(quantizer.qparams, source.qparams) or not _inside_limits(source, constants):
        return None
    return source.source if _is_identity(source) else None


def _is_touched(node: fx.Node, constants: Constants) -> bool:
    """Whether an in-place operator writes to the node or to what it reads, so that it cannot stand for another."""
    return any(place in constants.written for place in (node, *node.all_input_nodes))


def _inside_limits(source: Dequantize, constants: Constants) -> bool:
    """Whether the codes that a dq reads lie inside its limits: by their dtype, their q node, or their values."""
    low, high = source.qparams.qmin, source.qparams.qmax
    limits = torch.iinfo(source.dtype)
    if low <= limits.min and limits.max <= high:
        return True
    made_by = read_quantize(source.source, constants)
    if made_by is not None:
        return low <= made_by.qparams.qmin and made_by.qparams.qmax <= high
    codes = constants.get(source.source)
    return codes is not None and bool(((codes >= low) & (codes <= high)).all())


def _is_identity(source: Dequantize) -> bool:
    """Whether quantizing the dequantized codes gives them back, for every code of the grid."""
    qparams = source.qparams
    if qparams.qmax - qparams.qmin >= _LARGEST_TRIED:
        return False
    pairs = zip(qparams.scale.flatten().tolist(), qparams.zero_point.flatten().tolist(), strict=True)
    return all(_recovers_codes(scale, zero_point, qparams.qmin, qparams.qmax) for scale, zero_point in pairs)


@functools.lru_cache(maxsize=4096)
def _recovers_codes(scale: float, zero_point: int, qmin: int, qmax: int) -> bool:
    qparams = QParams(torch.tensor(scale), torch.tensor(zero_point, dtype=torch.int32), qmin, qmax)
    codes = torch.arange(qmin, qmax + 1)
    return torch.equal(quantize(dequantize(codes, qparams), qparams).long(), codes)


def read_instead(node: fx.Node, other: fx.Node, constants: Constants) -> int:
    """Let every reader of `node` read `other`; 1 if that was done, 0 if the program's signature forbids it."""
    if isinstance(constants, ProgramConstants):
        # A value that is written back to an input or a buffer is listed by its name, and no two may share one.
        if node.name in constants.written_back:
            return 0
        constants.rename_output(node.name, other.name)
    node.replace_all_uses_with(other)
    return 1

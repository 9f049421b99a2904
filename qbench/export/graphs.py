"""Rewrites of a Q/DQ graph that both exports need. None changes a value, but for float rounding inside a tanh GELU.

Q(x) = clamp(rne(x / s) + z, qmin, qmax)        D(c) = (c − z)·s

on the grid     Q(D(c)) = c                      so a q–dq pair may stand wherever values lie on its grid
order           Q(max(x, a)) = max(Q(x), Q(a))   so a clamp may stand on either side of its quantize op
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload
from torch.export import ExportedProgram

from qbench.errors import ExportError
from qbench.graph.dialect import node_argument, packet
from qbench.graph.edit import insert_call, refresh
from qbench.graph.qdq import quantized_decomposed
from qbench.graph.scale_preserving import grid_source

aten = torch.ops.aten

#: Convolutions and matrix products: what has an integer kernel with a bias.
GEMMS = frozenset(
    {
        aten.conv1d,
        aten.conv2d,
        aten.conv3d,
        aten.conv_transpose1d,
        aten.conv_transpose2d,
        aten.conv_transpose3d,
        aten.convolution,
        aten.linear,
    }
)


def is_quantize(node: object) -> bool:
    """Whether the node is a per-tensor quantize op with literal scale and zero point."""
    return isinstance(node, fx.Node) and node.target is quantized_decomposed().quantize_per_tensor.default


def is_dequantize(node: object) -> bool:
    """Whether the node is a per-tensor dequantize op with literal scale and zero point."""
    return isinstance(node, fx.Node) and node.target is quantized_decomposed().dequantize_per_tensor.default


def is_activation_dequantize(node: object) -> bool:
    """Whether the node dequantizes codes that the program computed (not a stored weight)."""
    return is_dequantize(node) and node.args[0].op == "call_function"  # type: ignore[attr-defined]


def check_grids(program: ExportedProgram, runtime: str) -> None:
    """Refuse a program with a grid that no 8-bit runtime has.

    Args:
        program: A Q/DQ program.
        runtime: Its name, for the message.

    Raises:
        ExportError: the first node whose scale, zero point, range or dtype is at fault, and why.
    """
    for node in program.graph.nodes:
        reason = _fault_of_grid(node) if is_quantize(node) or is_dequantize(node) else ""
        if reason:
            raise ExportError(
                f"node {node.name} cannot be deployed on {runtime}: {reason}; qbench.convert gives grids that can, if "
                "the quantizers have seen data and have 8 bits or fewer"
            )


def _fault_of_grid(node: fx.Node) -> str:
    grid: tuple[Any, ...] = node.args[1:6]
    scale, zero_point, low, high, dtype = grid
    stored = torch.tensor(scale, dtype=torch.float32)
    if not stored > 0 or not (torch.isfinite(stored) and torch.isfinite(1 / stored)):
        return f"its scale is {scale}, expected a positive float32 whose inverse is finite"
    if is_quantize(node) and dtype not in (torch.int8, torch.uint8):
        return f"its codes are {dtype}, expected torch.int8 or torch.uint8"
    least, most = full_range(dtype)
    if not least <= low <= zero_point <= high <= most:
        return f"its zero point {zero_point}, its range [{low}, {high}] and {dtype} do not lie in each other"
    return ""


def insert_after(anchor: fx.Node, target: Any, args: Sequence[Any]) -> fx.Node:
    """Insert a call after `anchor`, with the fake value and the module path that a program's nodes carry."""
    return insert_call(anchor.next, target, args, neighbour=anchor, origin=anchor)


def requantize_after(node: fx.Node, dequantize: fx.Node) -> fx.Node:
    """Insert a q–dq pair with the parameters of `dequantize` after `node`; returns the new dequantize node."""
    codes = insert_after(node, quantized_decomposed().quantize_per_tensor.default, (node, *dequantize.args[1:]))
    return insert_after(codes, dequantize.target, (codes, *dequantize.args[1:]))


def replace_everywhere(program: ExportedProgram, old: fx.Node, new: fx.Node) -> None:
    """Let every reader of `old` but `new` itself read `new`, the program's outputs included."""
    readers = [reader for reader in old.users if reader is not new]
    for reader in readers:
        reader.replace_input_with(old, new)
    if any(reader.op == "output" for reader in readers):
        program.graph_signature.replace_all_uses(old.name, new.name)


def full_range(dtype: torch.dtype) -> tuple[int, int]:
    """The smallest and the largest code of a dtype."""
    return torch.iinfo(dtype).min, torch.iinfo(dtype).max


def close_views(program: ExportedProgram) -> int:
    """Put a q–dq pair behind every scale-preserving op, so that each op reads a dequantize node directly.

    `dq → view → conv` becomes `dq → view → q → dq → conv`; runtimes match only the second. Returns how many were put.
    """
    closed = 0
    for node in list(program.graph.nodes):
        dequantize = grid_source(node)
        if dequantize is None or not is_activation_dequantize(dequantize):
            continue
        if not isinstance(node.meta["val"], torch.Tensor):
            continue  # A split: each of its parts, a getitem, is closed.
        readers = [
            reader
            for reader in node.users
            if reader.op != "output" and not (is_quantize(reader) and reader.args[1:] == dequantize.args[1:])
        ]
        if readers:
            real = requantize_after(node, dequantize)
            for reader in readers:
                reader.replace_input_with(node, real)
            closed += 1
    return closed


def infer_sizes(program: ExportedProgram) -> int:
    """Let reshapes infer their only unknown size (the batch): `flatten(x, 1)` becomes `reshape(x, [-1, 512])`.

    Without it the size is computed by nodes of its own, which XNNPACK does not take. Returns how many were rewritten.
    """
    rewritten = 0
    for node in program.graph.nodes:
        if packet(node.target) not in (aten.flatten, aten.view, aten.reshape, aten.unflatten):
            continue
        shape = node.meta["val"].shape
        if sum(not isinstance(size, int) for size in shape) != 1 or 0 in shape:
            continue
        node.target = aten.reshape.default
        node.args = (node.args[0], [size if isinstance(size, int) else -1 for size in shape])
        node.kwargs = {}
        rewritten += 1
    return rewritten


def keep_mean_dims(program: ExportedProgram) -> int:
    """Make `mean(x, spatial dims) → q → dq` keep its dims and reshape after the dq: the form of a global pool.

    A reshape, because XNNPACK does not take a squeeze of several dims and would be left and entered again.

    Returns:
        How many were rewritten; means over other dims are left as they are.
    """
    rewritten = 0
    for node in list(program.graph.nodes):
        if node.target is not aten.mean.dim or not _is_spatial_mean(node) or len(node.users) != 1:
            continue
        quantize, channels = next(iter(node.users)), node.meta["val"].shape[1]
        if not is_quantize(quantize) or not all(is_dequantize(reader) for reader in quantize.users):
            continue
        if not isinstance(channels, int):
            continue  # A reshape infers one size, and that is the batch.
        node.args = (node.args[0], node.args[1], True)
        for changed in (node, quantize, *quantize.users):
            refresh(changed)
        for dequantize in list(quantize.users):
            flat = insert_after(dequantize, aten.reshape.default, (dequantize, [-1, channels]))
            replace_everywhere(program, dequantize, flat)
        rewritten += 1
    return rewritten


def _is_spatial_mean(node: fx.Node) -> bool:
    rank = node.args[0].meta["val"].dim()  # type: ignore[union-attr]
    dims = node.args[1] if len(node.args) > 1 else None
    keep = node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False)
    if keep or not isinstance(dims, (list, tuple)) or rank < 3:
        return False
    return sorted(dim % rank for dim in dims) == list(range(2, rank))


def spell_out_tanh_gelu(program: ExportedProgram) -> int:
    """Write `gelu(x, approximate="tanh")` as `x/2 · (1 + tanh(√(2/π)·(x + 0.044715·x³)))`; returns how many were.

    XNNPACK would compute the other GELU, up to 5e-4 away; ONNX's Gelu (opset 20) takes other float steps than these.
    """
    written = 0
    for node in list(program.graph.nodes):
        if packet(node.target) is not aten.gelu or node_argument(node, "approximate") != "tanh":
            continue

        def call(operator: OpOverload[Any, Any], *args: object, before: fx.Node = node) -> fx.Node:
            return insert_call(before, operator, args)

        x = node.args[0]
        cube = call(aten.mul.Tensor, call(aten.mul.Tensor, x, x), x)
        inner = call(aten.add.Tensor, x, call(aten.mul.Tensor, cube, 0.044715))
        tanh = call(aten.tanh.default, call(aten.mul.Tensor, inner, math.sqrt(2.0 / math.pi)))
        half = call(aten.mul.Tensor, x, 0.5)
        replace_everywhere(program, node, call(aten.mul.Tensor, half, call(aten.add.Tensor, tanh, 1.0)))
        written += 1
    return written


def shift_codes(program: ExportedProgram, dtype: torch.dtype) -> int:
    """Store 8-bit codes between quantize and dequantize ops as `dtype`: int8 codes are uint8 codes − 128.

    Codes that something else reads (an output, say) keep theirs. Returns how many quantize ops changed.
    """
    other, shift = {torch.uint8: (torch.int8, 128), torch.int8: (torch.uint8, -128)}[dtype]
    changed = 0
    for node in list(program.graph.nodes):
        if not is_quantize(node) or node.args[5] is not other or not any(map(is_dequantize, node.users)):
            continue
        _give_own_codes(program, node)
        for shifted in (node, *node.users):
            source, scale, zero_point, low, high, _ = shifted.args
            shifted.args = (source, scale, zero_point + shift, low + shift, high + shift, dtype)
            refresh(shifted)
        changed += 1
    return changed


def _give_own_codes(program: ExportedProgram, quantize: fx.Node) -> None:
    """Let readers of codes that are no dequantize ops read codes of their own: `q → dq → q`, which are the same."""
    readers = [reader for reader in quantize.users if not is_dequantize(reader)]
    if not readers:
        return
    parameters = quantize.args[1:]
    real = insert_after(quantize, quantized_decomposed().dequantize_per_tensor.default, (quantize, *parameters))
    codes = insert_after(real, quantize.target, (real, *parameters))
    for reader in readers:
        reader.replace_input_with(quantize, codes)
    if any(reader.op == "output" for reader in readers):
        program.graph_signature.replace_all_uses(quantize.name, codes.name)


def finish(program: ExportedProgram) -> ExportedProgram:
    """Drop what nothing reads, check the graph and recompile it."""
    program.graph.eliminate_dead_code()
    program.graph.lint()
    program.graph_module.recompile()
    return program


def bias_of(node: fx.Node) -> fx.Node | None:
    """The bias of a convolution or linear; None for other nodes and where there is none."""
    if node.op != "call_function" or packet(node.target) not in GEMMS:
        return None
    bias = node_argument(node, "bias")
    return bias if isinstance(bias, fx.Node) else None

"""The form of a Q/DQ program that XNNPACK takes as quantized. No rewrite changes a value.

codes       XNNPACK's activations are int8: uint8 codes are shifted by −128, and so is the zero point
clamp       it fuses ReLU with every arithmetic op, hardtanh with convolutions and linears only. Any other clamp:
            Q(clamp(x, a, b)) = Q(clamp(D(Q(x)), a, b)), so the op gets a quantize op of its own before the clamp
narrow      it saturates to int8, whatever range a quantize op names: fewer bits are a clamp to that range's reals
branches    ops that share a dequantize op are put into one group, and a group that something leaves and enters again
            (a residual block) splits the delegate: each reader gets a dequantize op of its own
splits      it takes slices of fixed sizes, not splits: a split would end the delegate and begin another behind it
weights     a weight range of [−8, 7] would be read as packed 4-bit codes; the codes are stored in int8
products    of matrices, as `xnnpack_products` says
"""

from __future__ import annotations

import math
import operator
from typing import cast

import torch
from torch import fx
from torch.export import ExportedProgram

from qbench.export import graphs
from qbench.export.xnnpack_limits import close_views_of_inputs, share_cat_grids
from qbench.export.xnnpack_products import linear_for_stored, stack_matrices, write_out_addmm
from qbench.graph.clamps import clamps_before
from qbench.graph.dialect import packet
from qbench.graph.qdq import quantized_decomposed

aten = torch.ops.aten

_RELU = (0.0, math.inf)
_SPLITS = frozenset({aten.split, aten.split_with_sizes, aten.chunk})


def to_xnnpack_form(program: ExportedProgram) -> ExportedProgram:
    """Rewrite a program in place, with the rewrites of this file and of its siblings in order; returns it."""
    graphs.infer_sizes(program)
    graphs.keep_mean_dims(program)
    slice_splits(program)
    write_out_addmm(program)
    linear_for_stored(program)
    stack_matrices(program)
    graphs.close_views(program)
    close_views_of_inputs(program)
    graphs.shift_codes(program, torch.int8)
    clamp_before_quantize(program)
    share_cat_grids(program)
    graphs.spell_out_tanh_gelu(program)
    widen_weight_ranges(program)
    separate_outputs(program)
    separate_dequantizes(program)
    return graphs.finish(program)


def slice_splits(program: ExportedProgram) -> int:
    """Turn the parts of splits along an axis of known size into slices; returns how many parts were."""
    sliced = 0
    for node in list(program.graph.nodes):
        if node.target is not operator.getitem or packet(node.args[0].target) not in _SPLITS:
            continue
        split, index = node.args
        source, dim = split.args[0], split.args[2] if len(split.args) > 2 else split.kwargs.get("dim", 0)
        sizes = [part.shape[dim] for part in split.meta["val"]]
        if not all(isinstance(size, int) for size in sizes):
            continue
        start, size = sum(sizes[:index]), sizes[index]
        graphs.replace_everywhere(
            program, node, graphs.insert_after(split, aten.slice.Tensor, (source, dim, start, start + size))
        )
        sliced += 1
    program.graph.eliminate_dead_code()
    return sliced


def clamp_before_quantize(program: ExportedProgram) -> int:
    """Turn clamps and narrow ranges into what XNNPACK fuses; returns how many quantize ops were rewritten."""
    rewritten = 0
    for node in list(program.graph.nodes):
        if not graphs.is_quantize(node):
            continue
        source, bounds = clamps_before(node)
        extremes = graphs.full_range(node.args[5])
        narrow = node.args[3:5] != extremes
        fuses = source.target is not None and packet(source.target) in graphs.GEMMS
        if not narrow and (source is node.args[0] or bounds == _RELU):
            continue
        low, high = _bounds_on_grid(node, bounds)
        anchor = source if fuses else _requantize(node, source)
        clamp = graphs.insert_after(anchor, aten.hardtanh.default, (anchor, low, high))
        node.args = (clamp, *node.args[1:3], *extremes, node.args[5])
        for reader in list(filter(graphs.is_dequantize, node.users)):
            reader.args = (node, *node.args[1:])
        rewritten += 1
    return rewritten


def _bounds_on_grid(quantize: fx.Node, bounds: tuple[float, float]) -> tuple[float, float]:
    """The bounds as reals on the grid of `quantize`, inside its range: the same codes, and finite."""
    scale, zero_point = cast("tuple[float, int]", quantize.args[1:3])
    codes = [int(quantize.target(torch.tensor(bound), *quantize.args[1:])) for bound in bounds]  # type: ignore[operator]
    return (codes[0] - zero_point) * scale, (codes[1] - zero_point) * scale


def _requantize(quantize: fx.Node, source: fx.Node) -> fx.Node:
    """Codes of the full range between an op and its clamp, then reals again; the dequantize node is returned."""
    parameters = (*quantize.args[1:3], *graphs.full_range(quantize.args[5]), quantize.args[5])  # type: ignore[arg-type]
    codes = graphs.insert_after(source, quantize.target, (source, *parameters))
    return graphs.insert_after(codes, quantized_decomposed().dequantize_per_tensor.default, (codes, *parameters))


def widen_weight_ranges(program: ExportedProgram) -> int:
    """Let dequantize ops of stored int8 codes name the range of int8; returns how many changed."""
    ops = quantized_decomposed()
    ranges = {ops.dequantize_per_channel.default: 4, ops.dequantize_per_tensor.default: 3}
    changed = 0
    for node in program.graph.nodes:
        start = ranges.get(node.target)
        if start is None or node.args[start + 2] is not torch.int8 or node.args[start : start + 2] != (-8, 7):
            continue
        node.args = (*node.args[:start], *graphs.full_range(torch.int8), *node.args[start + 2 :])
        changed += 1
    return changed


def separate_outputs(program: ExportedProgram) -> int:
    """Give an output that dequantizes codes which other ops read too a q–dq pair of its own; returns how many got one.

    Without it, XNNPACK's change of memory format mixes the two readers up: ExecuTorch 1.5.1 fails to run the file, or
    gives wrong values for that output.
    """
    separated = 0
    for node in list(program.graph.nodes):
        if not graphs.is_activation_dequantize(node) or not any(reader.op == "output" for reader in node.users):
            continue
        if len(node.users) == 1 and len(node.args[0].users) == 1:
            continue
        real = graphs.requantize_after(node, node)
        output = next(reader for reader in node.users if reader.op == "output")
        output.replace_input_with(node, real)
        program.graph_signature.replace_all_uses(node.name, real.name)
        separated += 1
    return separated


def separate_dequantizes(program: ExportedProgram) -> int:
    """Give each reader of dequantized codes a dequantize op of its own; returns how many were added."""
    added = 0
    for node in list(program.graph.nodes):
        if not graphs.is_activation_dequantize(node):
            continue
        for reader in list(node.users)[1:]:
            if reader.op != "output":
                reader.replace_input_with(node, graphs.insert_after(node, node.target, node.args))
                added += 1
    return added

"""The form of a Q/DQ program that ONNX Runtime fuses to integer kernels. No rewrite changes a value.

codes       uint8 codes are int8 codes + 128, and so is the zero point: D stays. (Codes that two ops read stay int8
            in ONNX Runtime's own conversion, and its convolutions with int8 activations stay in float on x64.) An
            input of int8 codes stays one and is quantized again: Q(D(c)) = c
clamp       Q(clamp(x, a, b)) = clip(Q(x), Q(a), Q(b)): the op is followed by its quantize op directly, and a clip
            of codes remains only where the quantize op does not already saturate there
narrow      QuantizeLinear saturates to its 8-bit type: fewer bits need the same clip
gelu        approximate="tanh" is written out as opset 19 does it: the Gelu of later opsets takes other float steps
linear      only Gemm on matrices has an integer kernel with a bias: (…, in) → (rows, in) → Gemm → (…, out)
"""

from __future__ import annotations

import torch
from torch import fx
from torch.export import ExportedProgram

from qbench.export import graphs
from qbench.graph.clamps import clamp_bounds, clamps_before
from qbench.graph.edit import refresh

aten = torch.ops.aten


def to_onnx_form(program: ExportedProgram) -> ExportedProgram:
    """Rewrite a program in place, with every rewrite of this file in its order; returns it."""
    graphs.infer_sizes(program)
    graphs.keep_mean_dims(program)
    graphs.spell_out_tanh_gelu(program)
    flatten_linears(program)
    graphs.close_views(program)
    requantize_inputs(program)
    graphs.shift_codes(program, torch.uint8)
    clip_codes(program)
    return graphs.finish(program)


def requantize_inputs(program: ExportedProgram) -> int:
    """Give inputs that are int8 codes a q–dq pair, which becomes one of uint8; returns how many got one."""
    inputs = set(program.graph_signature.user_inputs)
    requantized = 0
    for node in list(program.graph.nodes):
        if not graphs.is_dequantize(node) or node.args[5] is not torch.int8 or node.args[0].name not in inputs:
            continue
        real = graphs.requantize_after(node, node)
        for reader in [reader for reader in node.users if reader is not real.args[0]]:
            reader.replace_input_with(node, real)
        requantized += 1
    return requantized


def flatten_linears(program: ExportedProgram) -> int:
    """Let every linear of more (or less) than two dims work on a matrix; returns how many were rewritten."""
    rewritten = 0
    for node in list(program.graph.nodes):
        if node.target is not aten.linear.default or node.args[0].meta["val"].dim() == 2:
            continue
        lead, channels = list(node.meta["val"].shape[:-1]), node.meta["val"].shape[-1]
        if sum(not isinstance(size, int) for size in lead) > 1:
            continue  # Two unknown sizes: a view can infer only one of them. The report shows what stays in float.
        rows = graphs.insert_after(
            node.args[0], aten.reshape.default, (node.args[0], [-1, node.args[0].meta["val"].shape[-1]])
        )
        node.replace_input_with(node.args[0], rows)
        for tail in _tails(node):
            shape = [size if isinstance(size, int) else -1 for size in lead] + [channels]
            graphs.replace_everywhere(program, tail, graphs.insert_after(tail, aten.reshape.default, (tail, shape)))
        rewritten += 1
    return rewritten


def _tails(node: fx.Node) -> list[fx.Node]:
    """The dequantize nodes of `node → clamps → q → dq`, else the last node of that chain; fake values refreshed."""
    refresh(node)
    while len(node.users) == 1 and clamp_bounds(reader := next(iter(node.users))) is not None:
        node = reader
        refresh(node)
    if len(node.users) != 1 or not graphs.is_quantize(reader := next(iter(node.users))):
        return [node]
    if not all(graphs.is_dequantize(user) for user in reader.users):
        return [node]
    for changed in (reader, *reader.users):
        refresh(changed)
    return list(reader.users)


def clip_codes(program: ExportedProgram) -> int:
    """Move the clamps before each quantize op, and its own narrow range, behind it; returns how many clips remain."""
    clips = 0
    for node in list(program.graph.nodes):
        if not graphs.is_quantize(node):
            continue
        source, bounds = clamps_before(node)
        low, high = (_code(bound, node) for bound in bounds)
        scale, zero_point, _, _, dtype = node.args[1:]
        extremes = graphs.full_range(dtype)
        node.args = (source, scale, zero_point, *extremes, dtype)
        if (low, high) != extremes:
            readers = list(node.users)
            clip = graphs.insert_after(node, aten.clamp.default, (node, low, high))
            for reader in readers:
                reader.replace_input_with(node, clip)
            if any(reader.op == "output" for reader in readers):
                program.graph_signature.replace_all_uses(node.name, clip.name)
            clips += 1
    return clips


def _code(bound: float, quantize: fx.Node) -> int:
    """The code of a real bound, by the very op that quantizes."""
    return int(quantize.target(torch.tensor(bound), *quantize.args[1:]))  # type: ignore[operator]

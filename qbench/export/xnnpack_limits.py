"""What XNNPACK would refuse when a file is loaded, or compute otherwise than the program says, rewritten before.

layer       codes before and behind it, no zero point in its weight, and s_in·s_w / s_out < 256; or it stays in float:
            its weight is stored as reals
transposed  one scale per output channel only without groups, else it stays in float
cat         one grid at all ends: inputs on another grid are quantized to that of the output first
views       of codes that are an input of the program, with another grid behind them: a q–dq pair ends the view
conv3d      is refused: neither the delegate nor ExecuTorch's own kernels compute it

Values are those of the program, up to float rounding in what stays in float.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from qbench.errors import ExportError
from qbench.export import graphs
from qbench.graph.clamps import clamp_bounds
from qbench.graph.constants import ProgramConstants
from qbench.graph.dialect import packet
from qbench.graph.edit import module_path
from qbench.graph.layers import Layer, output_scales, read_layer, weight_scales
from qbench.graph.qdq import quantized_decomposed
from qbench.graph.recognise import find_grid
from qbench.graph.scale_preserving import grid_source
from qbench.numerics.arithmetic.xnnpack import ARITHMETIC

aten = torch.ops.aten

#: XNNPACK takes no layer whose s_in·s_w / s_out reaches this.
LARGEST_RATIO = ARITHMETIC.limits["requantize"].high


@dataclass(frozen=True)
class KeptInFloat:
    """An operator between quantize and dequantize ops that the file computes in float.

    Attributes:
        op: Its name, `"aten.conv2d"`.
        name: The path of its module and its name in the program.
        reason: Why XNNPACK cannot take it on codes.
    """

    op: str
    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.op} {self.name}: {self.reason}"


def check_dimensions(program: ExportedProgram) -> None:
    """Refuse convolutions of three dimensions: the file would be written, and fail at its first batch.

    Raises:
        ExportError: there is one; neither XNNPACK nor ExecuTorch's own kernels compute it.
    """
    convolutions = graphs.GEMMS - {aten.linear}
    for node in program.graph.nodes:
        if packet(node.target) in convolutions and node.meta["val"].dim() == 5:
            raise ExportError(
                f"ExecuTorch has no convolution of three dimensions ({module_path(node) or node.name}): use "
                "to_onnx(program, path) for ONNX Runtime"
            )


def keep_layers_in_float(program: ExportedProgram) -> tuple[KeptInFloat, ...]:
    """Store the weights of layers that XNNPACK cannot take on codes as reals; returns those layers."""
    constants = ProgramConstants(program)
    kept = []
    for node in list(program.graph.nodes):
        layer = read_layer(node, constants)
        reason = layer and _refusal(layer, constants)
        if layer is None or not reason:
            continue
        weight = constants.get(layer.weight)
        if weight is None:  # pragma: no cover - its scales were read from constants
            continue
        stored = constants.add(f"{layer.weight.name}_reals", weight.clone(), before=node)
        _reader_of_weight(layer).replace_input_with(layer.weight, stored)
        path = module_path(node)
        op = str(packet(node.target)).replace("::", ".")
        kept.append(KeptInFloat(op, f"{path}/{node.name}" if path else node.name, reason))
    if kept:
        graphs.finish(program)
        constants.drop_unused()
    return tuple(kept)


def _reader_of_weight(layer: Layer) -> fx.Node:
    """The product, where the layer is a sum of a product and a bias."""
    node = layer.node
    while layer.weight not in node.all_input_nodes:
        node = cast("fx.Node", node.args[0])
    return node


def _refusal(layer: Layer, constants: ProgramConstants) -> str | None:
    found = weight_scales(layer, constants)
    if found is None:
        return None  # Its weight is in float already.
    if not graphs.is_dequantize(layer.input):
        return "its input is in float"
    grid = find_grid(layer.weight, constants)
    if grid is not None and bool(grid.qparams.zero_point.any()):
        return "its weight has a zero point, and XNNPACK takes a weight without"
    if layer.transposed and layer.groups > 1 and found.ndim:
        return f"it has {layer.groups} groups, and XNNPACK takes a transposed convolution per channel without groups"
    quantize = _quantize_behind(_reader_of_weight(layer))
    scales = output_scales(layer, found)
    if quantize is None:
        return "its result is read in float"
    if scales is None:
        return "the scales of its weight differ within an output channel"
    largest = _largest_ratio(layer.input.args[1], scales, quantize.args[1])
    if largest < LARGEST_RATIO:
        return None
    return f"s_in·s_w / s_out is {largest:.6g}, and XNNPACK takes less than {LARGEST_RATIO:g}"


def _largest_ratio(s_in: object, scales: Tensor, s_out: object) -> float:
    """As XNNPACK computes it: every step in float32."""
    products = torch.tensor(s_in, dtype=torch.float32) * scales.to(torch.float32)
    return float((products / torch.tensor(s_out, dtype=torch.float32)).max())


def _quantize_behind(node: fx.Node) -> fx.Node | None:
    """The quantize op that reads a node, directly or through clamps, where nothing else does."""
    while len(node.users) == 1:
        [node] = node.users
        if graphs.is_quantize(node):
            return node
        if clamp_bounds(node) is None:
            return None
    return None


def share_cat_grids(program: ExportedProgram) -> int:
    """Quantize the inputs of a `cat` to the grid of its output where they lie on another; returns how many were."""
    changed = 0
    program.graph.eliminate_dead_code()  # A clamp that was moved would still be a reader.
    for node in list(program.graph.nodes):
        if packet(node.target) is not aten.cat or len(node.users) != 1:
            continue
        [quantize], sources = node.users, cast("list[fx.Node]", node.args[0])
        if not graphs.is_quantize(quantize) or not all(map(graphs.is_dequantize, sources)):
            continue  # It stays in float.
        for source in dict.fromkeys(sources):
            if source.args[1:] != quantize.args[1:]:
                node.replace_input_with(source, _on_grid(source, quantize))
                changed += 1
    return changed


def _on_grid(source: fx.Node, quantize: fx.Node) -> fx.Node:
    """A q–dq pair with the parameters of `quantize` after `source`; the dequantize node is returned."""
    parameters = quantize.args[1:]
    codes = graphs.insert_after(source, quantize.target, (source, *parameters))
    return graphs.insert_after(codes, quantized_decomposed().dequantize_per_tensor.default, (codes, *parameters))


def close_views_of_inputs(program: ExportedProgram) -> int:
    """End a view or a max pool of the program's input codes on their own grid; returns how many were ended."""
    constants, closed = ProgramConstants(program), 0
    for node in list(program.graph.nodes):
        source = grid_source(node)
        if source is None or not graphs.is_dequantize(source) or not isinstance(node.meta["val"], Tensor):
            continue
        codes = cast("fx.Node", source.args[0])
        if codes.op != "placeholder" or constants.key(codes) is not None:
            continue
        for reader in list(node.users):
            if graphs.is_quantize(reader) and reader.args[1:] != source.args[1:]:
                reader.replace_input_with(node, graphs.requantize_after(node, source))
                closed += 1
    return closed

"""Matrix products in the form that XNNPACK and ExecuTorch compute right. No rewrite changes a value on the grid.

addmm       β·b + α·(x @ y) is written out, unless it is a layer: y and b stored, α = β = 1
stored      x (…, k) @ w (k, n)  =  linear(x, wᵀ), which the delegate takes on codes; the codes of wᵀ are stored
activations x (m, k) @ y (k, n)  =  (x[None] @ y[None])[0]: the delegate multiplies stacks, in float32

Without them ExecuTorch 1.5.1 gives wrong values. Its partitioner marks the dequantize and quantize ops around a product
before it knows whether XNNPACK takes it: if not, the product is computed outside of the delegate, from reals that the
delegate was told not to compute. `check_handed_over` refuses what would still be so.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from qbench.errors import ExportError
from qbench.export import graphs
from qbench.graph.constants import ProgramConstants
from qbench.graph.dialect import node_argument, packet
from qbench.graph.edit import insert_call, module_path, refresh, shape_of
from qbench.graph.layers import Layer, output_scales, read_layer, weight_scales
from qbench.graph.qdq import quantized_decomposed
from qbench.graph.recognise import find_grid

aten = torch.ops.aten

_PRODUCTS = frozenset({aten.matmul, aten.mm})


def write_out_addmm(program: ExportedProgram) -> int:
    """Turn each `addmm` that is no layer into a product and a sum; returns how many were."""
    constants, written = ProgramConstants(program), 0
    for node in list(program.graph.nodes):
        if packet(node.target) is not aten.addmm:
            continue
        bias, first, second = (node_argument(node, name) for name in ("self", "mat1", "mat2"))
        if read_layer(node, constants) is not None and None not in (constants.get(bias), constants.get(second)):
            continue
        product = insert_call(node, aten.mm.default, (first, second))
        terms = (_times(product, node_argument(node, "alpha"), node), _times(bias, node_argument(node, "beta"), node))
        graphs.replace_everywhere(program, node, insert_call(node, aten.add.Tensor, terms))
        program.graph.erase_node(node)
        written += 1
    return written


def _times(value: fx.Node, factor: float, before: fx.Node) -> fx.Node:
    return value if factor == 1 else insert_call(before, aten.mul.Tensor, (value, factor))


def linear_for_stored(program: ExportedProgram) -> int:
    """Turn products of an activation by a stored matrix of codes into linears; returns how many were.

    A matrix with a zero point, or with scales along its rows, stays: `keep_layers_in_float` stores it as reals.
    """
    constants, turned = ProgramConstants(program), 0
    for node in list(program.graph.nodes):
        layer = read_layer(node, constants) if packet(node.target) in _PRODUCTS else None
        if layer is None or len(shape_of(layer.weight) or ()) != 2:
            continue
        weight = _transposed(layer, constants)
        if weight is not None:
            node.target, node.args = aten.linear.default, (layer.input, weight)
            turned += 1
    program.graph.eliminate_dead_code()
    constants.drop_unused()
    return turned


def _transposed(layer: Layer, constants: ProgramConstants) -> fx.Node | None:
    """A node that dequantizes stored codes (n, k) to what `layer.weight` (k, n) is, transposed."""
    weight, grid, scales = constants.get(layer.weight), find_grid(layer.weight, constants), None
    if grid is not None and not bool(grid.qparams.zero_point.any()) and grid.dtype is torch.int8:
        scales = weight_scales(layer, constants)
    along_outputs = None if scales is None else output_scales(layer, scales)
    if weight is None or along_outputs is None:
        return None
    codes = torch.round(weight.to(torch.float64) / along_outputs.to(torch.float64)).t()  # (n, k), exact: |code| ≤ 128
    ops, name = quantized_decomposed(), layer.node.name
    stored = constants.add(f"{name}_weight", codes.to(torch.int8).contiguous(), before=layer.node)
    code_range = (*graphs.full_range(torch.int8), torch.int8)
    if along_outputs.ndim == 0:
        return insert_call(
            layer.node, ops.dequantize_per_tensor.default, (stored, float(along_outputs), 0, *code_range)
        )
    zeros = torch.zeros(len(along_outputs), dtype=torch.int64, device=along_outputs.device)
    added = [
        constants.add(f"{name}_weight_{what}", tensor, before=layer.node)
        for what, tensor in (("scales", along_outputs.clone()), ("zero_points", zeros))
    ]
    return insert_call(layer.node, ops.dequantize_per_channel.default, (stored, *added, 0, *code_range))


def stack_matrices(program: ExportedProgram) -> int:
    """Multiply two matrices, the second of which is not stored, as stacks of one; returns how many were."""
    constants, stacked = ProgramConstants(program), 0
    for node in list(program.graph.nodes):
        if packet(node.target) not in _PRODUCTS or constants.get(node.args[1]) is not None:
            continue
        if any(len(shape_of(factor) or ()) != 2 for factor in node.args):
            continue
        shape = node.meta["val"].shape
        node.target = aten.bmm.default
        node.args = tuple(_viewed(factor, (1, *factor.meta["val"].shape), node) for factor in node.args)
        refresh(node)
        graphs.replace_everywhere(program, node, _viewed(node, shape, node.next))
        stacked += 1
    return stacked


def _viewed(node: fx.Node, shape: Sequence[int], before: fx.Node) -> fx.Node:
    """(m, n) -> (1, m, n) or back: a reshape, which XNNPACK takes, and which infers one size at most."""
    sizes = [size if isinstance(size, int) else -1 for size in shape]
    if sizes.count(-1) > 1:
        move = aten.unsqueeze.default if len(shape) == 3 else aten.squeeze.dim
        return insert_call(before, move, (node, 0), origin=node)
    return insert_call(before, aten.reshape.default, (node, sizes), origin=node)


def check_handed_over(lowered: ExportedProgram) -> None:
    """Refuse a lowered program in which a delegate hands codes over where reals are read, or the other way round.

    Raises:
        ExportError: there is such an operator; the file would be written, and give wrong values.
    """
    for call in lowered.graph.nodes:
        if str(call.target) != "executorch_call_delegate":
            continue
        for node in _misread(call, getattr(lowered.graph_module, call.args[0].target).original_module):
            raise ExportError(
                f"ExecuTorch would compute {packet(node.target)} ({module_path(node) or node.name}) outside of XNNPACK "
                "from values that the delegate does not write (a fault of its partitioner), and the file would give "
                "wrong values: leave this operator out of quantization (Override(…, exclude=True)), or use "
                "to_onnx(program, path) for ONNX Runtime"
            )


def _misread(call: fx.Node, delegate: ExportedProgram) -> Iterator[fx.Node]:
    """The operators outside of a delegate beside its dequantize and quantize ops that are marked as part of an op."""
    from executorch.backends.xnnpack.utils.quant_utils import is_dequant, is_quant, is_tagged_as_implicit_q_dq

    given = dict(zip(delegate.graph_signature.user_inputs, call.args[1:], strict=True))
    results: Any = next(node for node in delegate.graph.nodes if node.op == "output").args[0]
    for node in delegate.graph.nodes:
        if not is_tagged_as_implicit_q_dq(node):
            continue
        if is_dequant(node) and node in results:
            index = results.index(node)
            yield from (reader for part in call.users if part.args[1] == index for reader in part.users)
        elif is_quant(node) and node.args[0].name in given:
            yield given[node.args[0].name]

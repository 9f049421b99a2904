"""From a Q/DQ program to an ExecuTorch file whose integer part runs in XNNPACK.

    program ──copy──▶ `xnnpack_form` ──to_edge_transform_and_lower(XnnpackPartitioner)──▶ .pte

Biases stay float, on their grid: XNNPACK quantizes them itself, by `rne(b·f32(1/f32(s_in·s_w)))`, and so finds the
codes of training; a convolution whose bias is already int32 it would refuse. The report is read from the lowered
program: what XNNPACK took, whether as quantized, and what was left to ExecuTorch's own (float) kernels.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from qbench.errors import ExportError, require
from qbench.export import graphs
from qbench.export.files import check_destination, write_bytes
from qbench.export.program import check_program, copy_program, quiet
from qbench.export.xnnpack_form import to_xnnpack_form
from qbench.export.xnnpack_limits import KeptInFloat, check_dimensions, keep_layers_in_float
from qbench.export.xnnpack_products import check_handed_over
from qbench.graph.dialect import overload
from qbench.graph.recognise import is_dequantize

_EXTRA = "executorch"
_PURPOSE = "write ExecuTorch files"
_QDQ = "quantized_decomposed::"


@dataclass(frozen=True)
class LoweredNode:
    """An operator of the lowered program.

    Attributes:
        op: Its name, `"aten.convolution"`.
        name: The path of the module that it came from and its name in the graph, `"layer1.0.conv1/aten_convolution"`.
        quantized: Whether XNNPACK takes it, with the dequantize ops before and the quantize op behind it, as one op on
            codes. An activation is what the operator before it is.
    """

    op: str
    name: str
    quantized: bool

    def __str__(self) -> str:
        return f"{self.op} {self.name}"


@dataclass(frozen=True)
class ExecutorchReport:
    """What `to_executorch` wrote.

    Attributes:
        path: The file.
        delegates: How many XNNPACK delegates it holds.
        delegated: The operators inside them, without quantize and dequantize ops.
        not_delegated: The operators outside, quantize and dequantize ops included.
        kept_in_float: The layers that stand between quantized ops and that XNNPACK would refuse on codes, with the
            reason; named as in the program that was given.
    """

    path: Path
    delegates: int
    delegated: tuple[LoweredNode, ...]
    not_delegated: tuple[LoweredNode, ...]
    kept_in_float: tuple[KeptInFloat, ...] = ()

    @property
    def delegated_ops(self) -> dict[str, int]:
        """How many operators of each kind XNNPACK took."""
        return dict(Counter(node.op for node in self.delegated))

    @property
    def float_nodes(self) -> tuple[LoweredNode, ...]:
        """Operators that compute in float, inside and outside the delegates (what only moves values is not listed)."""
        return tuple(
            node
            for node in (*self.delegated, *self.not_delegated)
            if not node.quantized and node.op not in _MOVES and not node.op.startswith("quantized_decomposed")
        )

    def __str__(self) -> str:
        kernels = ", ".join(f"{count} {op}" for op, count in sorted(self.delegated_ops.items())) or "nothing"
        outside = ", ".join(map(str, self.not_delegated)) or "nothing"
        kept = "".join(f"; kept in float: {layer}" for layer in self.kept_in_float)
        return f"{self.path}: {self.delegates} XNNPACK delegates with {kernels}; outside: {outside}{kept}"


#: Operators that compute no value.
_MOVES = frozenset(
    {
        "aten.alias_copy",
        "aten.clone",
        "aten.expand_copy",
        "aten.permute_copy",
        "aten.select_copy",
        "aten.slice_copy",
        "aten.squeeze_copy",
        "aten.sym_size",
        "aten.unsqueeze_copy",
        "aten.view_copy",
        "dim_order_ops._clone_dim_order",
        "dim_order_ops._to_dim_order_copy",
    }
)
_ACTIVATIONS = frozenset({"aten.relu", "aten.hardtanh", "aten.clamp"})


def to_executorch(program: ExportedProgram, path: str | os.PathLike[str]) -> ExecutorchReport:
    """Write a Q/DQ program as a .pte file for ExecuTorch's XNNPACK delegate.

    The caller's program is left as it is; sizes that are dynamic in it (with an upper bound) are dynamic in the file.

    Args:
        program: What `convert` returned, with float biases on their grid (not one that `quantize_bias` changed).
        path: The file to write; it appears when it is complete.

    Raises:
        MissingDependencyError: executorch is not installed.
        ExportError: not a Q/DQ program; its biases are int32; a convolution has three dimensions; the path cannot be
            written; an op cannot be lowered, or would be computed from values that the delegate does not write.
    """
    check_program(program, call="to_executorch(program, path)")
    target = check_destination(path)
    _check_float_bias(program)
    check_dimensions(program)
    with quiet():
        for module in ("executorch.exir", "executorch.backends.xnnpack.partition.xnnpack_partitioner"):
            require(module, extra=_EXTRA, purpose=_PURPOSE)
        form = to_xnnpack_form(copy_program(program))
        kept = keep_layers_in_float(form)
        lowered = _lower(form)
        check_handed_over(lowered.exported_program())
        report = _report(target, lowered.exported_program(), kept)
        data = _serialize(lowered, report)
    write_bytes(target, data)
    return report


def _check_float_bias(program: ExportedProgram) -> None:
    for node in program.graph.nodes:
        bias = graphs.bias_of(node)
        if bias is not None and is_dequantize(bias):
            raise ExportError(
                f"the bias of {node.name} is stored in int32 and XNNPACK takes float biases only: give the program "
                "that convert returned to to_executorch, and run passes.quantize_bias on another copy"
            )


def _lower(program: ExportedProgram) -> Any:
    """The program lowered to edge dialect and XNNPACK, as an `EdgeProgramManager`."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    try:
        with _one_kernel_for_every_batch():
            return to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    except Exception as error:  # ExecuTorch raises whatever its passes raise.
        raise ExportError(f"ExecuTorch could not lower the program to XNNPACK: {error}") from error


@contextlib.contextmanager
def _one_kernel_for_every_batch() -> Iterator[None]:
    """Keep a dynamic batch dynamic while fake convolutions run.

    PyTorch's choice of a kernel asks whether the batch is below 16 (for NNPACK, and for oneDNN with one thread), and
    the answer for the example's batch would bound every batch by 15. What is switched off is not asked about.
    """
    with torch.backends.mkldnn.flags(enabled=False), torch.backends.nnpack.flags(enabled=False):
        yield


def _serialize(lowered: Any, report: ExecutorchReport) -> bytes:
    try:
        with _one_kernel_for_every_batch():
            return bytes(lowered.to_executorch().buffer)
    except Exception as error:  # ExecuTorch raises whatever its passes raise.
        named = [str(node) for node in report.not_delegated]
        outside = ", ".join(named[:5]) + (f" and {len(named) - 5} more" if len(named) > 5 else "") or "nothing"
        raise ExportError(f"ExecuTorch has no kernel for what XNNPACK left ({outside}): {error}") from error


def _report(path: Path, program: ExportedProgram, kept: tuple[KeptInFloat, ...]) -> ExecutorchReport:
    delegates = []
    outside = []
    for node in program.graph.nodes:
        if node.op == "get_attr" and hasattr(module := getattr(program.graph_module, node.target), "backend_id"):
            delegates.append(module.original_module.graph)
        elif node.op == "call_function" and overload(node.target) is not None and not _calls_delegate(node):
            outside.append(node)
    inside = [node for graph in delegates for node in graph.nodes if overload(node.target) is not None]
    return ExecutorchReport(
        path=path,
        delegates=len(delegates),
        delegated=tuple(_describe(node) for node in inside if not _is_qdq(node)),
        not_delegated=tuple(_describe(node) for node in outside),
        kept_in_float=kept,
    )


def _calls_delegate(node: fx.Node) -> bool:
    return str(node.target) == "executorch_call_delegate"


def _describe(node: fx.Node) -> LoweredNode:
    path = next(reversed((node.meta.get("nn_module_stack") or {"": ("", None)}).values()))[0]
    name = f"{path}/{node.name}" if path else node.name
    return LoweredNode(op=_op_name(node), name=name, quantized=_is_quantized(node))


def _op_name(node: fx.Node) -> str:
    found = overload(node.target)
    return str(node.target) if found is None else found._schema.name.replace("::", ".")


def _is_qdq(node: object) -> bool:
    found = overload(node.target) if isinstance(node, fx.Node) else None
    return found is not None and found._schema.name.startswith(_QDQ)


def _is_quantized(node: fx.Node) -> bool:
    """Whether XNNPACK takes the node with its quantize ops as one integer op (it tags those that it takes so)."""
    from executorch.backends.xnnpack.utils.quant_utils import is_tagged_as_implicit_q_dq

    source = node.args[0] if node.args else None
    if (
        _op_name(node) in _ACTIVATIONS
        and isinstance(source, fx.Node)
        and source.op == "call_function"
        and not _is_qdq(source)
    ):
        return _is_quantized(source)
    inputs = [source for source in node.all_input_nodes if source.op != "placeholder"]
    if not inputs or not all(_is_qdq(source) and is_tagged_as_implicit_q_dq(source) for source in inputs):
        return False
    while len(node.users) == 1 and _op_name(reader := next(iter(node.users))) in _ACTIVATIONS:
        node = reader
    return bool(node.users) and all(_is_qdq(reader) and is_tagged_as_implicit_q_dq(reader) for reader in node.users)

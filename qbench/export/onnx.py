"""From a Q/DQ program to an ONNX file (QuantizeLinear and DequantizeLinear) that ONNX Runtime fuses to integer kernels.

    program ──copy──▶ int32 bias (`passes.quantize_bias`) ──▶ `onnx_form` ──torch.onnx──▶ `onnx_graph`
    ──▶ loaded once by ONNX Runtime ──▶ path

The file's values are those of the program. What ONNX Runtime makes of the file is read back from the graph that it
optimized, so the report says what runs in integers and what does not.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch.export import ExportedProgram

from qbench.errors import ExportError, require
from qbench.export import onnx_graph
from qbench.export.files import atomic_path, check_destination
from qbench.export.graphs import check_grids
from qbench.export.onnx_form import to_onnx_form
from qbench.export.program import check_program, copy_program, output_names, quiet
from qbench.passes import BiasReport, quantize_bias

_EXTRA = "onnx"
_PURPOSE = "write ONNX files"
_FIRST_OPSET = 19

_TRANSLATED_NODE = re.compile(r"translating node %(\w+)")

#: Ops that move values and compute none: in float or not, they cannot differ.
_MOVES = frozenset(
    {"Flatten", "Identity", "ReorderInput", "ReorderOutput", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}
)


@dataclass(frozen=True)
class FloatNode:
    """A node that ONNX Runtime computes in float.

    Attributes:
        op: Its type in the optimized graph, `"Conv"`.
        name: Its name, which starts with the path of the module that it came from, `"layer1.0.conv1/Conv"`; the name of
            its output where ONNX Runtime gave it none.
    """

    op: str
    name: str

    def __str__(self) -> str:
        return f"{self.op} {self.name}"


@dataclass(frozen=True)
class OrtGraph:
    """What ONNX Runtime made of a file on this machine.

    Attributes:
        nodes: How many nodes of each type the optimized graph holds.
        float_nodes: Those that compute in float, in order (QuantizeLinear and DequantizeLinear do not count).
    """

    nodes: dict[str, int]
    float_nodes: tuple[FloatNode, ...]


@dataclass(frozen=True)
class OnnxReport:
    """What `to_onnx` wrote.

    Attributes:
        path: The file.
        opset: Its opset of the default domain.
        nodes: How many nodes of each type the file holds.
        runtime: What ONNX Runtime makes of it.
        bias: The report of the int32 bias pass.
    """

    path: Path
    opset: int
    nodes: dict[str, int]
    runtime: OrtGraph
    bias: BiasReport = field(repr=False)

    @property
    def float_nodes(self) -> tuple[FloatNode, ...]:
        """The nodes that ONNX Runtime computes in float."""
        return self.runtime.float_nodes

    def __str__(self) -> str:
        integers = {op: n for op, n in sorted(self.runtime.nodes.items()) if op.startswith(("QLinear", "QGemm"))}
        kernels = ", ".join(f"{count} {op}" for op, count in integers.items()) or "no integer kernel"
        left = ", ".join(map(str, self.float_nodes)) or "nothing"
        return f"{self.path} (opset {self.opset}): {kernels}; in float: {left}"


def to_onnx(
    program: ExportedProgram,
    path: str | os.PathLike[str],
    *,
    opset: int = _FIRST_OPSET,
    weight_codes: Literal["uint8", "int8"] = "uint8",
) -> OnnxReport:
    """Write a Q/DQ program as an ONNX file with int32 biases.

    Inputs and outputs keep their order; inputs keep their names, outputs are named by `program.output_names`. Sizes
    that are dynamic in the program are dynamic in the file. The caller's program is left as it is.

    Args:
        program: What `convert` returned, float biases on their grid (or int32 ones: the pass then finds nothing to do).
        path: The file to write; it appears when it is complete and ONNX Runtime has loaded it.
        opset: The ONNX opset, at least 19.
        weight_codes: How weight codes are stored; the reals are the same. With `"uint8"` every ONNX Runtime session is
            exact. With `"int8"` a session on an x64 CPU without VNNI needs `session.x64quantprecision = 1`, as
            `open_session` sets it, or it saturates sums of two products at 16 bits; on CPUs with VNNI it is faster.

    Raises:
        MissingDependencyError: onnx, onnxscript or onnxruntime is not installed.
        ExportError: not a Q/DQ program; a grid is no 8-bit one, or an op has no ONNX form (the message names the
            node); the path cannot be written; ONNX Runtime does not load the file.
    """
    check_program(program, call="to_onnx(program, path)")
    check_grids(program, "ONNX Runtime")
    target = check_destination(path)
    if opset < _FIRST_OPSET:
        raise ExportError(
            f"opset {opset} is too old for the quantized file; use to_onnx(program, path, opset={_FIRST_OPSET})"
        )
    if weight_codes not in ("uint8", "int8"):
        raise ExportError(f"weight_codes={weight_codes!r} is unknown; use weight_codes='uint8' or weight_codes='int8'")
    for module in ("onnx", "onnxscript", "onnxruntime"):
        require(module, extra=_EXTRA, purpose=_PURPOSE)
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    rewritten = copy_program(program)
    bias_report = quantize_bias(rewritten)
    model = _translate(to_onnx_form(rewritten), opset)
    onnx_graph.name_outputs(model, output_names(program))
    onnx_graph.choose_averages(model)
    onnx_graph.keep_pairs_apart(model)
    onnx_graph.store_weights(model, weight_codes)
    RemoveUnusedNodesPass()(model)
    onnx_graph.name_nodes(model)
    with atomic_path(target) as aside:
        _save(model, aside)
        runtime = inspect_onnx(aside)
    return OnnxReport(
        path=target,
        opset=int(model.opset_imports[""]),
        nodes=dict(Counter(node.op_type for node in model.graph)),
        runtime=runtime,
        bias=bias_report,
    )


def _translate(program: ExportedProgram, opset: int) -> Any:
    """The program as an `onnx_ir.Model`."""
    try:
        with quiet():
            exported = torch.onnx.export(program, dynamo=True, opset_version=opset, verbose=False)
    except Exception as error:  # The exporter raises whatever its translations raise.
        raise ExportError(f"torch.onnx cannot translate the program to opset {opset}: {_first_cause(error)}") from error
    if exported is None:  # pragma: no cover - only when a file name is given
        raise ExportError("torch.onnx returned no model")
    return exported.model


def _first_cause(error: BaseException) -> str:
    """The node that the exporter names on the way, and what went wrong first."""
    node = ""
    while True:
        found = _TRANSLATED_NODE.search(str(error))
        node = f"node {found[1]}: " if found else node
        cause = error.__cause__ or error.__context__
        if cause is None:
            return f"{node}{error}"
        error = cause


def _save(model: Any, path: Path) -> None:
    import onnx_ir

    try:
        onnx_ir.save(model, path)
    except (ValueError, RuntimeError) as error:
        raise ExportError(f"the ONNX model cannot be stored in one file (protobuf ends at 2 GiB): {error}") from error


def open_session(path: str | os.PathLike[str], *, threads: int = 1, save_optimized: Path | None = None) -> Any:
    """An `onnxruntime.InferenceSession` on the CPU whose integer kernels are exact.

    On x64 CPUs without VNNI the kernels for uint8 activations with int8 weights add pairs of products in 16 bits and
    saturate there (one convolution was 68 codes off). `session.x64quantprecision` makes ONNX Runtime take exact
    kernels on such CPUs, and changes nothing on others.

    Raises:
        MissingDependencyError: onnxruntime is not installed.
        ExportError: ONNX Runtime does not load the file.
    """
    ort = require("onnxruntime", extra=_EXTRA, purpose="run ONNX files")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.x64quantprecision", "1")
    if save_optimized is not None:
        options.optimized_model_filepath = str(save_optimized)
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors share no public base class.
        raise ExportError(f"ONNX Runtime {ort.__version__} does not load {path}: {error}") from error


def inspect_onnx(path: str | os.PathLike[str]) -> OrtGraph:
    """Let ONNX Runtime optimize a file for this machine's CPU and count what it made.

    Raises:
        MissingDependencyError: onnx or onnxruntime is not installed.
        ExportError: ONNX Runtime does not load the file.
    """
    onnx = require("onnx", extra=_EXTRA, purpose="read ONNX files")
    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        open_session(path, save_optimized=optimized)
        graph = onnx.load(optimized).graph
    return OrtGraph(nodes=dict(Counter(node.op_type for node in graph.node)), float_nodes=_float_nodes(graph))


def _float_nodes(graph: Any) -> tuple[FloatNode, ...]:
    """The nodes that read a float tensor; types follow from the ops, because ONNX cannot infer those of ORT's own."""
    import onnx

    floats = {value.name for value in graph.input if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT}
    floats |= {tensor.name for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT}
    found = []
    for node in graph.node:
        # The first input of QLinearConcat is its output scale; that of every other op is what it computes from.
        reads_float = bool(node.input) and node.input[0] in floats and not node.op_type.startswith("QLinear")
        if (reads_float and node.op_type != "QuantizeLinear") or _returns_float(node):
            floats |= set(node.output)
        if reads_float and node.op_type != "QuantizeLinear" and node.op_type not in _MOVES:
            found.append(FloatNode(node.op_type, node.name or node.output[0]))
    return tuple(found)


def _returns_float(node: Any) -> bool:
    """Whether an op that reads codes gives reals: a QGemm does without an output scale (its 8th input)."""
    if node.op_type == "QGemm":
        return len(node.input) < 8 or not node.input[7]
    return node.op_type in ("DequantizeLinear", "MatMulIntegerToFloat")

from __future__ import annotations

from pathlib import Path

import hand_programs as hand
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import ExportedProgram

from qbench.errors import ExportError, MissingDependencyError
from qbench.export import onnx as onnx_export
from qbench.export import to_onnx
from qbench.export.onnx import OnnxReport, inspect_onnx, open_session
from qbench.export.runtimes import run_onnx
from qbench.passes import quantize_bias

onnx = pytest.importorskip("onnx")


def tensors(path: Path) -> dict[str, np.ndarray]:
    return {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}


@pytest.mark.parametrize("codes", ["uint8", "int8"])
def test_single_layers_give_the_codes_of_integer_arithmetic(tmp_path: Path, codes: str) -> None:
    model, inputs = hand.single_layers()
    report = to_onnx(hand.export(model, *inputs), tmp_path / "layers.onnx", weight_codes=codes)
    assert report.runtime.nodes["QLinearConv"] == 3 and report.runtime.nodes["QGemm"] == 1
    assert report.float_nodes == ()
    [outputs] = run_onnx(report.path, [[x.numpy() for x in inputs]], 1)
    for (name, expected), got in zip(model.emulate(*[x.numpy() for x in inputs]).items(), outputs, strict=True):
        found = hand.output_codes(got, *getattr(model, name).out)
        assert found.size >= 100_000 and len(np.unique(found)) >= 50, name
        assert np.mean((found == -128) | (found == 127)) < (0.7 if name == "depthwise" else 0.05), name
        assert np.count_nonzero(found != expected) == 0, name


def test_a_plain_session_is_exact_with_the_default_codes(tmp_path: Path) -> None:
    """Without any session option, on every CPU: int8 weights saturate at 16 bits where there is no VNNI."""
    ort = pytest.importorskip("onnxruntime")
    model, inputs = hand.single_layers()
    report = to_onnx(hand.export(model, *inputs), tmp_path / "layers.onnx")
    session = ort.InferenceSession(str(report.path), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    outputs = session.run(None, dict(zip(names, [x.numpy() for x in inputs], strict=True)))
    expected = model.emulate(*[x.numpy() for x in inputs])
    assert np.count_nonzero(hand.output_codes(outputs[0], *model.conv.out) != expected["conv"]) == 0


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[ExportedProgram, str, OnnxReport]:
    """The small ResNet, its graph before the export, and the report of its file."""
    program = hand.residual()
    before = str(program.graph)
    return program, before, to_onnx(program, tmp_path_factory.mktemp("onnx") / "net.onnx")


def test_a_residual_network_is_fused_whole(written: tuple[ExportedProgram, str, OnnxReport]) -> None:
    program, before, report = written
    assert str(program.graph) == before, "the caller's program changed"
    assert report.opset == 19 and report.path.name == "net.onnx"
    ops = {"Conv": 6, "Add": 2, "MaxPool": 1, "GlobalAveragePool": 1, "Gemm": 1}
    assert {op: report.nodes[op] for op in ops} == ops
    kernels = {"QLinearConv": 6, "QLinearAdd": 2, "QLinearGlobalAveragePool": 1, "QGemm": 1}
    assert {op: report.runtime.nodes.get(op) for op in kernels} == kernels
    assert report.runtime.nodes["QuantizeLinear"] == report.runtime.nodes["DequantizeLinear"] == 1
    assert report.float_nodes == ()
    assert "6 QLinearConv" in str(report) and "in float: nothing" in str(report)
    assert len(report.bias.quantized) == 7


def test_names_sizes_and_biases_in_the_file(written: tuple[ExportedProgram, str, OnnxReport]) -> None:
    report = written[2]
    graph = onnx.load(report.path).graph
    onnx.checker.check_model(str(report.path))
    assert [value.name for value in graph.input] == ["image"] and [value.name for value in graph.output] == ["output"]
    assert not graph.input[0].type.tensor_type.shape.dim[0].HasField("dim_value")
    names = [node.name for node in graph.node]
    assert len(set(names)) == len(names) and "blocks.0.1/Conv" in names and "classifier/Gemm" in names
    biases = [array for array in tensors(report.path).values() if array.dtype == np.int32 and array.any()]
    assert sorted(array.size for array in biases) == [10, *[16] * 6]
    for count in (1, 3, 17):
        x = torch.randn(count, 3, 32, 32)
        assert run_onnx(report.path, [[x.numpy()]], 1)[0][0].shape == (count, 10)


@pytest.mark.parametrize("opset", [19, 21])
def test_a_bias_that_is_int32_already_gives_the_same_codes(tmp_path: Path, opset: int) -> None:
    program = hand.export(Unfusable(), torch.randn(1, 4, 8, 8))
    before = to_onnx(program, tmp_path / "float.onnx", opset=opset)
    quantize_bias(program)
    after = to_onnx(program, tmp_path / "int.onnx", opset=opset)
    assert after.opset == opset and after.runtime == before.runtime
    biases = [sorted(a.tobytes() for a in tensors(r.path).values() if a.dtype == np.int32) for r in (before, after)]
    assert biases[0] == biases[1] and any(biases[0])


class Unfusable(nn.Module):
    """An activation and a softmax in float, after a convolution that is fused."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = hand.Layer((8, 4, 3, 3), 0.02, (0.03, 5), padding=1)
        self.head = nn.Hardswish()

    def forward(self, x: Tensor) -> Tensor:
        return F.log_softmax(self.head(self.conv(hand.qdq(x, 0.02, 3))), dim=1)


def test_what_stays_in_float_is_reported_by_name(tmp_path: Path) -> None:
    report = to_onnx(hand.export(Unfusable(), torch.randn(1, 4, 8, 8)), tmp_path / "a.onnx")
    assert report.runtime.nodes["QLinearConv"] == 1
    # ONNX Runtime takes HardSwish apart, and what it makes of it has no name of its own.
    assert [node.op for node in report.float_nodes] == ["HardSigmoid", "Mul", "LogSoftmax"]
    assert all(node.name for node in report.float_nodes)
    assert "in float: HardSigmoid" in str(report) and "LogSoftmax LogSoftmax" in str(report)
    assert inspect_onnx(report.path) == report.runtime


NOT_PROGRAMS = [
    (nn.Linear(2, 2), r"got a module \(Linear\): program = qbench.convert\(.*to_onnx\(program, path\)"),
    ("model.pt2", r"got str"),
    (hand.export(nn.ReLU(), torch.ones(1)), r"no quantize or dequantize op.*qbench.convert"),
]


@pytest.mark.parametrize(("program", "message"), NOT_PROGRAMS)
def test_what_is_not_a_qdq_program(tmp_path: Path, program: object, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        to_onnx(program, tmp_path / "a.onnx")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"opset": 17}, "opset 17 is too old.*opset=19"),
        ({"weight_codes": "int4"}, "weight_codes='int4' is unknown.*'uint8'"),
    ],
)
def test_wrong_options(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        to_onnx(hand.export(Unfusable(), torch.randn(1, 4, 8, 8)), tmp_path / "a.onnx", **options)


def test_a_folder_that_is_missing_is_found_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_export, "_translate", lambda *_: pytest.fail("the work began"))
    with pytest.raises(ExportError, match="does not exist"):
        to_onnx(hand.export(Unfusable(), torch.randn(1, 4, 8, 8)), tmp_path / "no" / "a.onnx")


def test_a_missing_extra_gives_the_pip_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = hand.export(Unfusable(), torch.randn(1, 4, 8, 8))
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'qbench\[onnx\]'"):
        to_onnx(program, tmp_path / "a.onnx")


def test_a_file_that_the_runtime_refuses_does_not_appear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_export, "_save", lambda model, path: path.write_bytes(b"not a model"))
    with pytest.raises(ExportError, match="does not load"):
        to_onnx(hand.export(Unfusable(), torch.randn(1, 4, 8, 8)), tmp_path / "a.onnx")
    assert list(tmp_path.iterdir()) == []


def test_wrong_inputs_and_files(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_text("text")
    with pytest.raises(ExportError, match=r"ONNX Runtime .* does not load"):
        open_session(tmp_path / "a.onnx")
    report = to_onnx(hand.export(Unfusable(), torch.randn(1, 4, 8, 8)), tmp_path / "b.onnx")
    with pytest.raises(ExportError, match=r"has the inputs \['x'\], and 2 were given"):
        run_onnx(report.path, [[np.zeros(1), np.zeros(1)]], 1)
    with pytest.raises(ExportError, match=r"does not run .* on float32\[1, 3, 8, 8\]"):
        run_onnx(report.path, [[np.zeros((1, 3, 8, 8), np.float32)]], 1)

"""What ONNX Runtime makes of each operation: an integer kernel, or one function in float between a dq and a q."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import hand_programs as hand
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import evaluate, images, leaves, prepared
from torch import Tensor, nn

import qbench
from qbench.errors import ExportError
from qbench.export import to_onnx
from qbench.export.onnx import OnnxReport, open_session
from qbench.export.taps import tap_program
from qbench.graph.qdq import quantized_decomposed

onnx = pytest.importorskip("onnx")

# Operation → the nodes that really run between the convolutions and the output.
OPS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], list[str]]] = {
    "add": (lambda x, y: x + y, ["QLinearAdd"]),
    "mul": (lambda x, y: x * y, ["QLinearMul"]),
    "mul by a gate": (lambda x, y: x * y[:, :, :1, :1], ["QLinearMul", "Slice", "Slice"]),
    "sub": (lambda x, y: x - y, ["DequantizeLinear", "DequantizeLinear", "Sub", "QuantizeLinear"]),
    "cat": (lambda x, y: torch.cat([x, y], 1), ["QLinearConcat"]),
    "max pool": (lambda x, y: F.max_pool2d(x, 2), ["NhwcMaxPool"]),
    "shuffle": (lambda x, y: x.reshape(-1, 2, 4, 8, 8).transpose(1, 2).reshape(-1, 8, 8, 8), []),
    "average": (lambda x, y: F.avg_pool2d(x, 2), ["QLinearAveragePool"]),
    "adaptive average": (lambda x, y: F.adaptive_avg_pool2d(x, (2, 4)), ["QLinearAveragePool"]),
    "global average": (lambda x, y: F.adaptive_avg_pool2d(x, 1), ["QLinearGlobalAveragePool"]),
    "mean of the plane": (lambda x, y: x.mean((2, 3)), ["QLinearGlobalAveragePool"]),
    "mean of channels": (lambda x, y: x.mean(1), ["DequantizeLinear", "ReduceMean", "QuantizeLinear"]),
    "sigmoid": (lambda x, y: torch.sigmoid(y), ["QLinearSigmoid"]),
    "leaky relu": (lambda x, y: F.leaky_relu(x, 0.1), ["QLinearLeakyRelu"]),
    "hardswish": (lambda x, y: F.hardswish(x), ["DequantizeLinear", "HardSigmoid", "Mul", "QuantizeLinear"]),
    "hardsigmoid": (lambda x, y: F.hardsigmoid(x), ["DequantizeLinear", "HardSigmoid", "QuantizeLinear"]),
    "silu": (lambda x, y: F.silu(x), ["DequantizeLinear", "DequantizeLinear", "Sigmoid", "Mul", "QuantizeLinear"]),
    "tanh": (lambda x, y: torch.tanh(x), ["DequantizeLinear", "Tanh", "QuantizeLinear"]),
    "elu": (lambda x, y: F.elu(x), ["DequantizeLinear", "Elu", "QuantizeLinear"]),
    "gelu": (
        lambda x, y: F.gelu(x),
        ["DequantizeLinear", "DequantizeLinear", "Div", "Erf", "Add", "Mul", "Mul", "QuantizeLinear"],
    ),
    "relu6": (lambda x, y: F.relu6(x), ["DequantizeLinear", "QuantizeLinear", "Clip"]),
    "gelu, tanh": (
        lambda x, y: F.gelu(x, approximate="tanh"),
        [*["DequantizeLinear"] * 5, *["Mul"] * 6, "Add", "Add", "Tanh", "QuantizeLinear"],
    ),
    # Both exporters drop the product: q → dq → q → dq on two grids.
    "another grid": (lambda x, y: y * 1, ["DequantizeLinear", "QuantizeLinear", "Clip"]),
}
ONE_GRID = ("max pool", "shuffle")
INPUT, OUTPUT = (0.03, 5), (0.0213, -7)  # a ratio that makes no ties
LAYOUT = ("Transpose", "Reshape", "Squeeze", "Identity")


class EveryOp(nn.Module):
    """Two convolutions, and each operation on what they put out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.left = hand.Layer((8, 4, 3, 3), 0.02, INPUT, padding=1)
        self.right = hand.Layer((8, 4, 1, 1), 0.02, (0.025, -3))

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        image = hand.qdq(image, 0.02, 3)
        x, y = self.left(image), self.right(image)
        outputs = {name: call(x, y) for name, (call, _) in OPS.items()}
        return {name: out if name in ONE_GRID else hand.qdq(out, *OUTPUT) for name, out in outputs.items()}


class Found(NamedTuple):
    """The file of `EveryOp`, its optimized graph, and the codes of the runtime and of the program by operation."""

    report: OnnxReport
    file: Any
    optimized: Any
    codes: dict[str, tuple[np.ndarray, np.ndarray]]


def run(path: Path, x: Tensor) -> list[np.ndarray]:
    session = open_session(path)
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    folder = tmp_path_factory.mktemp("ops")
    x = images(4, 8, channels=4)
    program = hand.export(EveryOp(), x)
    report = to_onnx(program, folder / "ops.onnx")
    open_session(report.path, save_optimized=folder / "optimized.onnx")
    file, optimized = (onnx.load(folder / f"{name}.onnx").graph for name in ("ops", "optimized"))
    names = [value.name for value in file.output]
    got, expected = dict(zip(names, run(report.path, x), strict=True)), program.module()(x)
    grids = {name: INPUT if name in ONE_GRID else OUTPUT for name in OPS}
    codes = {name: tuple(hand.output_codes(np.asarray(y[name]), *grids[name]) for y in (got, expected)) for name in OPS}
    return Found(report, file, optimized, codes)


def nodes_behind(graph: Any, output: str) -> list[Any]:
    """The nodes between the convolutions and an output, in order; the output's own dequantize node is left out."""
    makers = {value: node for node in graph.node for value in node.output}
    wanted, seen = [output], {}
    while wanted:
        node = makers.get(wanted.pop())
        if node is not None and node.op_type not in ("QLinearConv", "Conv") and id(node) not in seen:
            seen[id(node)] = node
            wanted += node.input
    return [node for node in graph.node if id(node) in seen and output not in node.output]


@pytest.mark.parametrize("name", OPS)
def test_each_operation_is_an_integer_kernel_or_one_function_in_float(name: str, found: Found) -> None:
    _, expected = OPS[name]
    kinds = [node.op_type for node in nodes_behind(found.optimized, name)]
    assert sorted(kind for kind in kinds if kind not in LAYOUT) == sorted(expected)
    got, wanted = found.codes[name]
    assert got.shape == wanted.shape and len(np.unique(got)) >= 20
    # The program's float sums against integers: a step, now and then. Two grids made one would be 95 % off.
    assert abs(got - wanted).max() <= 1 and np.mean(got != wanted) < 0.02


def test_what_is_in_float_is_said(found: Found) -> None:
    in_float = {"Sub", "ReduceMean", "HardSigmoid", "Mul", "Sigmoid", "Tanh", "Elu", "Div", "Erf", "Add"}
    assert {node.op for node in found.report.float_nodes} == in_float
    assert found.report.runtime.nodes["QLinearConv"] == 2 and "Conv" not in found.report.runtime.nodes


def test_silu_reads_one_dequantize_node_in_the_file(found: Found) -> None:
    nodes = nodes_behind(found.file, "silu")
    [sigmoid], [mul] = ([node for node in nodes if node.op_type == kind] for kind in ("Sigmoid", "Mul"))
    assert list(mul.input) == [sigmoid.input[0], sigmoid.output[0]]
    [reader] = [node for node in nodes if mul.output[0] in node.input]
    assert reader.op_type == "QuantizeLinear"


class Mobile(nn.Module):
    """What mobile networks are made of: hardswish, SiLU, a squeeze-and-excitation, a ReLU6 alone, a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.squeeze, self.excite = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.conv1(x), inplace=True)
        y = F.silu(self.conv2(x))
        y = y * F.hardsigmoid(self.excite(F.relu(self.squeeze(self.pool(y)))))
        y = torch.cat([F.relu6(y + x), y], 1)
        return self.fc(y.mean([2, 3]))


@pytest.fixture(scope="module")
def mobile(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, torch.export.ExportedProgram, OnnxReport]:
    torch.manual_seed(0)
    model = prepared(Mobile(), images(16))
    program = qbench.convert(model, (images(2),), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    return model, program, to_onnx(program, tmp_path_factory.mktemp("mobile") / "net.onnx")


def test_a_mobile_network_is_exact_in_torch_and_whole_in_the_runtime(mobile: Any) -> None:
    model, program, report = mobile
    x = images(9, seed=3)
    [in_eval], [of_program] = leaves(evaluate(model, x)), leaves(program.module()(x))
    assert torch.equal(in_eval, of_program)
    kernels = {"QLinearConv": 4, "QGemm": 1, "QLinearMul": 1, "QLinearAdd": 1, "QLinearConcat": 1}
    kernels["QLinearGlobalAveragePool"] = 2
    assert {op: report.runtime.nodes.get(op, 0) for op in kernels} == kernels
    assert sorted(node.op for node in report.float_nodes) == ["HardSigmoid"] * 2 + ["Mul"] * 2 + ["Sigmoid"]
    [got] = run(report.path, x)
    assert np.abs(got - of_program.numpy()).max() < 0.05 * np.abs(got).max()


def test_taps_change_neither_the_kernels_nor_the_output(mobile: Any, tmp_path: Path) -> None:
    _, program, report = mobile
    tapped = tap_program(program, torch.uint8)
    other = to_onnx(tapped.program, tmp_path / "tapped.onnx")
    counts = [{op: n for op, n in r.runtime.nodes.items() if op.startswith("Q") and op != "QuantizeLinear"}
              for r in (report, other)]
    assert counts[0] == counts[1]
    assert [node.op for node in report.float_nodes] == [node.op for node in other.float_nodes]
    x = images(9, seed=3)
    outputs = run(other.path, x)
    assert (outputs[0] == run(report.path, x)[0]).all()
    assert len(outputs) == 1 + len(tapped.taps) and all(codes.dtype == np.uint8 for codes in outputs[1:])
    for codes, expected in zip(outputs[1:], leaves(tapped.program.module()(x))[1:], strict=True):
        assert codes.shape == expected.shape and np.mean(codes != expected.numpy()) < 0.05


# What is not a program that ONNX Runtime can run, and what the refusal says.


def pair(scale: float, zero_point: int, low: int = -128, high: int = 127, dtype: torch.dtype = torch.int8) -> Any:
    """A q–dq pair on any grid."""

    def call(x: Tensor) -> Tensor:
        ops, grid = quantized_decomposed(), (scale, zero_point, low, high, dtype)
        return ops.dequantize_per_tensor.default(ops.quantize_per_tensor.default(x, *grid), *grid)

    return call


class Then(nn.Module):
    """A convolution and anything."""

    def __init__(self, call: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv = hand.Layer((8, 4, 3, 3), 0.02, INPUT, padding=1)
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.conv(hand.qdq(x, 0.02, 3)))


REFUSED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "scale 0": (pair(0.0, 0), r"node quantize_per_tensor_2 .*scale is 0.0"),
    "scale nan": (pair(float("nan"), 0), r"node quantize_per_tensor_2 .*scale is nan"),
    "scale inf": (pair(float("inf"), 0), r"node quantize_per_tensor_2 .*scale is inf"),
    "scale below 0": (pair(-0.1, 0), r"node quantize_per_tensor_2 .*scale is -0.1"),
    "scale of a denormal": (pair(1e-45, 0), r"node quantize_per_tensor_2 .*inverse is finite"),
    "zero point": (pair(0.1, 300), r"node quantize_per_tensor_2 .*zero point 300"),
    "range": (pair(0.1, 0, -200, 200), r"node quantize_per_tensor_2 .*\[-200, 200\] and torch.int8"),
    "16 bits": (pair(0.1, 0, -(2**15), 2**15 - 1, torch.int16), r"node quantize_per_tensor_2 .*torch.int16, expected"),
    "an op without a form": (
        lambda x: torch.masked_select(x, x > 0).sum(), r"opset 19: node masked_select: No ONNX function found"
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_the_name_of_the_node(name: str, tmp_path: Path) -> None:
    call, message = REFUSED[name]
    with pytest.raises(ExportError, match=message):
        to_onnx(hand.export(Then(call), images(2, 8, channels=4)), tmp_path / "a.onnx")
    assert list(tmp_path.iterdir()) == []


LEFT: dict[str, tuple[Callable[[Tensor], Tensor], list[str]]] = {
    "sort": (lambda x: torch.sort(x)[0], ["TopK"]),
    "float64": (lambda x: hand.qdq((x.double() * 3.0).float(), 0.05, 0), ["Cast", "Mul", "Cast"]),
}


@pytest.mark.parametrize("name", LEFT)
def test_other_ops_and_dtypes_stay_in_float_by_name(name: str, tmp_path: Path) -> None:
    call, expected = LEFT[name]
    x = images(2, 8, channels=4)
    program = hand.export(Then(call), x)
    report = to_onnx(program, tmp_path / "a.onnx")
    assert [node.op for node in report.float_nodes] == expected and all(node.name for node in report.float_nodes)
    assert report.runtime.nodes["QLinearConv"] == 1
    assert np.abs(run(report.path, x)[0] - program.module()(x).numpy()).max() <= 0.1


class FromCodes(nn.Module):
    """Takes codes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = hand.Layer((8, 4, 3, 3), 0.02, INPUT, padding=1)

    def forward(self, codes: Tensor) -> Tensor:
        return self.conv(quantized_decomposed().dequantize_per_tensor.default(codes, 0.02, 3, -128, 127, torch.int8))


def test_an_input_of_int8_codes_is_fused(tmp_path: Path) -> None:
    codes = torch.arange(-128, 128, dtype=torch.int8).reshape(1, 4, 8, 8)
    program = hand.export(FromCodes(), codes)
    report = to_onnx(program, tmp_path / "a.onnx")
    assert report.runtime.nodes["QLinearConv"] == 1 and report.float_nodes == ()
    [got], wanted = run(report.path, codes), program.module()(codes).numpy()
    got, expected = (hand.output_codes(y, *INPUT) for y in (got, wanted))
    assert abs(got - expected).max() <= 1 and np.mean(got != expected) < 0.02


def test_sizes_of_the_plane_may_be_dynamic(tmp_path: Path) -> None:
    dim = torch.export.Dim
    shapes = ({0: dim("batch", max=16), 2: dim("high", min=4, max=64), 3: dim("wide", min=4, max=64)},)
    program = hand.export(
        Then(lambda x: hand.qdq(F.adaptive_avg_pool2d(x, 1), 0.01, 0)), torch.randn(2, 4, 8, 8), dynamic_shapes=shapes
    )
    report = to_onnx(program, tmp_path / "a.onnx")
    assert report.float_nodes == () and report.runtime.nodes["QLinearGlobalAveragePool"] == 1
    x = torch.randn(3, 4, 21, 13)
    [got], wanted = run(report.path, x), program.module()(x).numpy()
    got, expected = (hand.output_codes(y, 0.01, 0) for y in (got, wanted))
    assert got.shape == expected.shape == (3, 8, 1, 1) and abs(got - expected).max() <= 1

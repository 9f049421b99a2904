"""Products of two activations in programs: what is fused, that ONNX Runtime runs QLinearMatMul, and has these codes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from qdq_programs import INPUT, OPS, OUTPUT, export, fake_quantize
from torch import Tensor, nn
from torch.nn import functional as F

import qbench
from qbench.passes import fuse_qdq

SECOND = (0.031, -11, -128, 127, torch.int8)
POSITIVE = (0.013, -128, -128, 127, torch.int8)
NARROW = (0.3, 1, -8, 7, torch.int8)
UNSIGNED = (0.02, 131, 0, 255, torch.uint8)
FUSED = "matmul_q8ta_q8ta_q8to"


class Product(nn.Module):
    """`q(call(dq(q(a)), dq(q(b))))`, or of one input alone."""

    def __init__(
        self,
        call: Callable[..., Tensor] = torch.matmul,
        first: tuple = INPUT,
        second: tuple = SECOND,
        out: tuple = OUTPUT,
    ) -> None:
        super().__init__()
        self.call, self.first, self.second, self.out = call, first, second, out

    def forward(self, *inputs: Tensor) -> Tensor:
        real = [fake_quantize(x, grid) for x, grid in zip(inputs, (self.first, self.second), strict=False)]
        return fake_quantize(self.call(*real), self.out)


class Stored(nn.Module):
    """A product with a stored factor on one grid."""

    def __init__(self, zero_point: int, stored_first: bool) -> None:
        super().__init__()
        self.zero_point, self.stored_first = zero_point, stored_first
        self.register_buffer("codes", torch.randint(-128, 128, (8, 8), dtype=torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        stored = OPS.dequantize_per_tensor.default(self.codes, 0.007, self.zero_point, -128, 127, torch.int8)
        real = fake_quantize(x)
        return fake_quantize(stored @ real if self.stored_first else real @ stored, OUTPUT)


THREE = ((3, 5, 8), (3, 8, 4))
# name: (model, input shapes)
CASES: dict[str, tuple[nn.Module, tuple[tuple[int, ...], ...]]] = {
    "two dims": (Product(), ((5, 8), (8, 4))),
    "three dims": (Product(), THREE),
    "four dims": (Product(), ((2, 3, 5, 8), (2, 3, 8, 4))),
    "leading dims that broadcast": (Product(), ((2, 1, 5, 8), (3, 8, 4))),
    "a stack by a matrix": (Product(), ((3, 5, 8), (8, 4))),
    "a matrix by a stack": (Product(), ((5, 8), (3, 8, 4))),
    "mm": (Product(torch.mm), ((5, 8), (8, 4))),
    "bmm": (Product(torch.bmm), THREE),
    "keys behind a transpose": (Product(lambda q, k: q @ k.transpose(-2, -1)), ((2, 3, 7, 8), (2, 3, 7, 8))),
    "heads split and turned": (
        Product(lambda q, k: q.unflatten(2, (4, 8)).transpose(1, 2) @ k.unflatten(2, (4, 8)).permute(0, 2, 3, 1)),
        ((2, 7, 32), (2, 9, 32)),
    ),
    "one tensor twice": (Product(lambda x: x @ x), ((3, 8, 8),)),
    "one tensor and its transpose": (Product(lambda x: x @ x.transpose(1, 2)), ((3, 5, 8),)),
    "a relu": (Product(lambda a, b: F.relu(a @ b), out=POSITIVE), THREE),
    "a relu6": (Product(lambda a, b: F.relu6(a @ b)), THREE),
    "few bits": (Product(out=NARROW), THREE),
    "unsigned codes": (Product(first=UNSIGNED, second=UNSIGNED, out=UNSIGNED), THREE),
    "a stored first factor": (Stored(0, True), ((3, 8, 5),)),
    "a stored second factor with a zero point": (Stored(9, False), ((3, 5, 8),)),
}  # fmt: skip

def make(case: str) -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(len(case))
    model, shapes = CASES[case]
    return model, [torch.randn(shape) * 2 for shape in shapes]


def operators(program: Any) -> list[str]:
    return [str(node.target).split(".")[1] for node in program.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("case", CASES)
def test_it_runs_as_qlinear_matmul_with_the_codes_of_the_integer_program(case: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from qbench.export import to_onnx
    from qbench.export.runtimes import run_onnx

    model, inputs = make(case)
    program = export(model, *inputs)
    written = to_onnx(program, tmp_path / "model.onnx")
    report = fuse_qdq(program, target="onnxruntime")
    assert report.integer and not report.missed and report.by_rule["matmul"] == 1, [str(miss) for miss in report.missed]
    assert FUSED in operators(program)
    assert written.runtime.nodes.get("QLinearMatMul") == 1 and not written.float_nodes, written
    ((theirs,),) = run_onnx(tmp_path / "model.onnx", [[x.numpy() for x in inputs]], 1)
    ours = program.module()(*inputs).numpy()
    assert int((ours != theirs).sum()) == 0
    assert np.unique(ours).size > 11
    assert float(np.abs(ours - model(*inputs).numpy()).max()) <= model_step(model) * 1.01
    assert not fuse_qdq(program, target="onnxruntime").fused


def model_step(model: nn.Module) -> float:
    return float(getattr(model, "out", OUTPUT)[0])


# name: (model, input shapes, words of the refusal)
REFUSED: dict[str, tuple[nn.Module, tuple[tuple[int, ...], ...], str]] = {
    "a vector": (Product(), ((5, 8), (8,)), "one of its factors is a vector"),
    "a factor in float": (Product(lambda a, b: a.exp() @ b), THREE, "its first factor is in float: aten::exp"),
    "a bare factor behind the product": (
        Product(lambda a, b: (a @ b) * 0.35), THREE, "its float value is read by aten::mul"
    ),
    "a bare factor before the product": (
        Product(lambda a, b: (a * 0.35) @ b), THREE, "its first factor is in float: aten::mul"
    ),
    "sums beyond int32": (
        Product(first=POSITIVE, second=POSITIVE), ((1, 33026), (33026, 1)), "33026 products can leave int32"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_stays_in_float_with_its_reason(case: str) -> None:
    model, shapes, reason = REFUSED[case]
    torch.manual_seed(0)
    inputs = [torch.randn(shape) for shape in shapes]
    program = export(model, *inputs)
    report = fuse_qdq(program, target="onnxruntime")
    assert FUSED not in operators(program)
    assert [entry for entry in report.left_float if reason in entry.reason], str(report)


def test_xnnpack_multiplies_in_float_and_that_is_said() -> None:
    model, inputs = make("three dims")
    program = export(model, *inputs)
    before = program.module()(*inputs)
    (left,) = fuse_qdq(program, target="xnnpack").left_float
    assert left.op == "aten.matmul.default" and "multiplies two activations in float32" in left.reason
    assert float((program.module()(*inputs) != before).float().mean()) < 0.02


@pytest.mark.slow
def test_executorch_delegates_the_product_in_float(tmp_path: Path) -> None:
    pytest.importorskip("executorch")
    from qbench.export import to_executorch
    from qbench.export.runtimes import run_executorch

    model, inputs = make("four dims")
    program = export(model, *inputs)
    report = to_executorch(program, tmp_path / "model.pte")
    assert report.delegated_ops["aten.bmm"] == 1
    assert [node.op for node in report.float_nodes] == ["aten.bmm"], report
    fuse_qdq(program, target="xnnpack")
    ((theirs,),) = run_executorch(tmp_path / "model.pte", [[x.numpy() for x in inputs]], 1)
    assert int((program.module()(*inputs).numpy() != theirs).sum()) == 0


def test_tosa_has_it() -> None:
    model, inputs = make("three dims")
    program = export(model, *inputs)
    assert fuse_qdq(program, target="tosa").integer and FUSED in operators(program)


def test_a_dynamic_batch_stays_dynamic() -> None:
    model, (a, b) = make("four dims")
    batch = {0: torch.export.Dim("batch", min=1, max=9)}
    program = torch.export.export(model.eval(), (a, b), dynamic_shapes=((batch, batch),), strict=False)
    assert fuse_qdq(program, target="onnxruntime").integer
    for size in (1, 2, 6):
        one, other = torch.randn(size, *a.shape[1:]), torch.randn(size, *b.shape[1:])
        wanted = export(model, one, other)
        fuse_qdq(wanted, target="onnxruntime")
        assert torch.equal(program.module()(one, other), wanted.module()(one, other))


class HandWritten(nn.Module):
    """An attention as people write it, with the factor of the queries or of the scores as an operation of its own."""

    def __init__(self, scale_queries: bool) -> None:
        super().__init__()
        self.scale_queries = scale_queries
        self.stem, self.qkv, self.head = nn.Linear(12, 32), nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        batch, positions, features = x.shape
        q, k, v = self.qkv(x).reshape(batch, positions, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q * 8**-0.5) @ k.transpose(-2, -1) if self.scale_queries else (q @ k.transpose(-2, -1)) / 8**0.5
        return self.head((scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, positions, features))


class Encoder(nn.Module):
    """`torch.nn.MultiheadAttention` behind a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.attention = nn.Linear(12, 32), nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.attention(x, x, x, need_weights=False)[0]


ATTENTIONS: dict[str, Callable[[], nn.Module]] = {
    "explicit": lambda: qbench.explicit_attention(Encoder()),
    "scaled queries": lambda: HandWritten(True),
    "divided scores": lambda: HandWritten(False),
}


def trained(model: nn.Module, x: Tensor) -> nn.Module:
    model = qbench.prepare_qat(qbench.fuse(model), qconfig=qbench.get_qconfig("onnxruntime"), example_inputs=(x,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        model.train()(x).square().mean().backward()
        optimizer.step()
    return model.eval()


def attention(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(4, 17, 12)
    return trained(ATTENTIONS[name](), x), x


@pytest.mark.parametrize("name", ATTENTIONS)
def test_of_an_attention_only_the_softmax_stays_in_float(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from qbench.export import to_onnx
    from qbench.export.runtimes import run_onnx

    model, x = attention(name)
    program = qbench.convert(model, (x,))
    written = to_onnx(program, tmp_path / "model.onnx")
    assert written.runtime.nodes["QLinearMatMul"] == 2
    assert not [node for node in written.float_nodes if "MatMul" in node.op]
    report = fuse_qdq(program)
    assert report.by_rule["matmul"] == 2
    assert [entry.op for entry in report.left_float] == ["aten.softmax.int"], str(report)
    ((theirs,),) = run_onnx(tmp_path / "model.onnx", [[x.numpy()]], 1)
    assert int((program.module()(x).numpy() != theirs).sum()) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ATTENTIONS)
def test_every_activation_of_an_attention_has_the_codes_of_onnx_runtime(name: str) -> None:
    pytest.importorskip("onnxruntime")
    model, x = attention(name)
    found = qbench.verify(model, qbench.convert(model, (x,)), (x,), runtimes=("onnxruntime",))
    assert found.exact == dict.fromkeys(found.exact, True) and "integer_vs_onnxruntime" in found.exact, found

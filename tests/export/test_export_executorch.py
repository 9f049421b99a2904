from __future__ import annotations

import importlib
from pathlib import Path

import hand_programs as hand
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qbench.errors import ExportError, MissingDependencyError
from qbench.export import to_executorch
from qbench.export.runtimes import run_executorch
from qbench.passes import quantize_bias

pytest.importorskip("executorch")


def test_single_layers_give_the_codes_of_integer_arithmetic(tmp_path: Path) -> None:
    model, inputs = hand.single_layers()
    report = to_executorch(hand.export(model, *inputs), tmp_path / "layers.pte")
    assert report.delegated_ops == {"aten.convolution": 3, "aten.linear": 1, "aten.relu": 2}
    assert all(node.quantized for node in report.delegated) and report.not_delegated == ()
    [outputs] = run_executorch(report.path, [[x.numpy() for x in inputs]], 1)
    for (name, expected), got in zip(model.emulate(*[x.numpy() for x in inputs]).items(), outputs, strict=True):
        found = hand.output_codes(got, *getattr(model, name).out)
        assert found.size >= 100_000 and len(np.unique(found)) >= 50, name
        assert np.mean((found == -128) | (found == 127)) < (0.7 if name == "depthwise" else 0.05), name
        assert np.count_nonzero(found != expected) == 0, name


def test_a_residual_network_is_one_delegate_and_takes_every_batch(tmp_path: Path) -> None:
    program = hand.residual()
    before = str(program.graph)
    report = to_executorch(program, tmp_path / "net.pte")
    assert str(program.graph) == before
    assert report.delegates == 1 and report.not_delegated == () and report.float_nodes == ()
    assert {op: report.delegated_ops[op] for op in ("aten.convolution", "aten.linear", "aten.add")} == {
        "aten.convolution": 6,
        "aten.linear": 1,
        "aten.add": 2,
    }
    assert "blocks.1.0/aten_convolution_default_3" in [node.name for node in report.delegated]
    assert "1 XNNPACK delegates with 2 aten.add, 6 aten.convolution" in str(report)
    batches = [torch.randn(count, 3, 32, 32) for count in (4, 64, 1)]
    for x, [got] in zip(batches, run_executorch(report.path, [[x.numpy()] for x in batches], 1), strict=True):
        assert got.shape == (len(x), 10)
        steps = np.abs(got - program.module()(x).detach().numpy()) / hand.f32(0.02)
        assert steps.max() < 6, "float rounding at ties grows through the layers, and no more"


class Split(nn.Module):
    """Two branches of a split that are joined again, as in ShuffleNet."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = hand.Layer((8, 8, 3, 3), 0.02, (0.02, 3), padding=1)

    def forward(self, x: Tensor) -> Tensor:
        first, second = hand.qdq(x, 0.02, 3).chunk(2, dim=1)
        return hand.qdq(torch.cat([first, self.conv(second)], 1), 0.02, 3)


@pytest.mark.parametrize(("batch", "delegates"), [(None, 1), (torch.export.Dim("batch", max=64), 2)])
def test_a_split_is_inside_the_delegate_unless_the_batch_is_dynamic(
    batch: object, delegates: int, tmp_path: Path
) -> None:
    """XNNPACK's slices have fixed sizes; with a dynamic batch ExecuTorch's own kernel moves the codes."""
    shapes = None if batch is None else ({0: batch},)
    program = hand.export(Split(), x := torch.randn(3, 16, 9, 9), dynamic_shapes=shapes)
    report = to_executorch(program, tmp_path / "net.pte")
    assert report.delegates == delegates
    assert {node.op for node in report.not_delegated} == (set() if batch is None else {"aten.slice_copy"})
    [[got]] = run_executorch(report.path, [[x.numpy()]], 1)
    expected = program.module()(x).detach().numpy()
    assert np.count_nonzero(got[:, :8] != expected[:, :8]) == 0, "the half that is only moved"
    assert np.abs(got - expected).max() < 0.03, "one step, where float rounding meets a tie"


class Narrow(nn.Module):
    """4-bit activations, ReLU6 behind a convolution and behind an add, and an op that XNNPACK does not take."""

    span = (-8, 7, torch.int8)

    def __init__(self) -> None:
        super().__init__()
        self.conv = hand.Layer((8, 8, 3, 3), 0.2, (0.25, -5), activation=F.relu6, span=self.span, padding=1)
        self.weights = hand.Layer(
            (8, 8, 3, 3), 0.2, (0.25, -2), span=self.span, levels=7, weight_range=(-8, 7), padding=1
        )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = hand.qdq(x, 0.2, 0, self.span)
        first, second = self.conv(x), self.weights(x)
        total = hand.qdq(F.hardtanh(first + second, -1.0, 1.0), 0.25, 0, self.span)
        return first, second, total, total.cumsum(1)


def test_narrow_ranges_are_kept_and_the_rest_is_reported(tmp_path: Path) -> None:
    """The first two outputs are read inside as well: without `separate_outputs`, XNNPACK gives other values."""
    model, x = Narrow(), torch.randn(4, 8, 16, 16)
    with torch.no_grad():
        report = to_executorch(hand.export(model, x), tmp_path / "narrow.pte")
        expected = model(x)
    assert [node.op for node in report.not_delegated] == ["aten.cumsum"]
    assert "outside: aten.cumsum aten_cumsum_default" in str(report)
    kernels = [node.op for node in report.delegated if node.quantized and node.op != "aten.hardtanh"]
    assert kernels == ["aten.convolution"] * 2 + ["aten.add"]
    assert {node.op for node in report.float_nodes} == {"aten.cumsum"}
    [outputs] = run_executorch(report.path, [[x.numpy()]], 1)
    for output, (got, want, (scale, zero_point)) in enumerate(
        zip(outputs, expected, [(0.25, -5), (0.25, -2), (0.25, 0)], strict=False)
    ):
        codes = hand.output_codes(got, scale, zero_point)
        assert codes.min() >= -8 and codes.max() <= 7 and len(np.unique(codes)) >= 5
        assert np.mean(codes != hand.output_codes(want.numpy(), scale, zero_point)) < 2e-3, output


def test_int32_biases_are_refused_with_the_way_out(tmp_path: Path) -> None:
    program = hand.residual()
    quantize_bias(program)
    with pytest.raises(ExportError, match=r"stored in int32.*that convert returned"):
        to_executorch(program, tmp_path / "a.pte")


def test_what_is_not_a_qdq_program(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"got a module \(Linear\).*to_executorch\(program, path\)"):
        to_executorch(nn.Linear(2, 2), tmp_path / "a.pte")  # type: ignore[arg-type]
    with pytest.raises(ExportError, match="does not exist"):
        to_executorch(hand.residual(), tmp_path / "no" / "a.pte")
    assert list(tmp_path.iterdir()) == []


def missing(name: str) -> None:
    raise ModuleNotFoundError(name, name=name.split(".")[0])


def test_a_missing_extra_gives_the_pip_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(MissingDependencyError, match=r"pip install 'qbench\[executorch\]'"):
        to_executorch(hand.residual(), tmp_path / "a.pte")

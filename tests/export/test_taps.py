"""Taps put out the codes of every activation, and change nothing of what a runtime makes of the program."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import SmallNet, TwoHeads, images, is_q, prepared, randomise_statistics
from torch import fx, nn
from torch.export import ExportedProgram

import qbench
from qbench.export import RUNTIMES
from qbench.export.taps import CODES, tap_program
from qbench.passes import fuse_qdq

pytestmark = pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec:FutureWarning")


class MeanNet(nn.Module):
    """A global pool written as a mean that drops its dims: the exports write it anew."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.relu(self.conv(x)).mean((2, 3)))


def program_of(net: nn.Module) -> ExportedProgram:
    torch.manual_seed(0)
    model = prepared(randomise_statistics(net), images(8))
    batch = torch.export.Dim("batch", min=1, max=16)
    return qbench.convert(model, (images(2),), dynamic_shapes=({0: batch},))


@pytest.fixture(scope="module", params=[SmallNet, MeanNet, TwoHeads], ids=lambda kind: kind.__name__)
def program(request: pytest.FixtureRequest) -> ExportedProgram:
    return program_of(request.param())


class Recorder(fx.Interpreter):
    """Runs a program and keeps what every quantize node gave."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.codes: list[torch.Tensor] = []

    def run_node(self, n: fx.Node) -> object:
        result = super().run_node(n)
        if is_q(n):
            self.codes.append(result)
        return result


def leaves(output: object) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]


def test_a_tap_is_what_its_quantize_node_computes(program: ExportedProgram) -> None:
    before = str(program.graph)
    tapped = tap_program(program)
    assert str(program.graph) == before
    x = images(3, seed=5)
    recorder = Recorder(program.module())
    expected = leaves(recorder.run(x))
    outputs = leaves(tapped.program.module()(x))
    names = [node.name for node in program.graph.nodes if is_q(node)]
    assert [tap.name for tap in tapped.taps] == names
    assert len({tap.label for tap in tapped.taps}) == len(names)
    assert len(outputs) == len(expected) + len(names) and len(recorder.codes) == len(names) >= 4
    for got, codes in zip(outputs, [*expected, *recorder.codes], strict=True):
        assert torch.equal(got, codes)
    assert [tap.per_image for tap in tapped.taps] == [codes[0].numel() for codes in recorder.codes]
    assert all(tap.inexact == "" for tap in tapped.taps) and set(tapped.inexact) == {""}


@pytest.mark.parametrize("name", RUNTIMES)
def test_a_runtime_takes_the_tapped_program_as_the_program(name: str, program: ExportedProgram, tmp_path: Path) -> None:
    """The same integer kernels, one delegate, the same outputs; and every tap is a code of the runtime's."""
    pytest.importorskip({"onnxruntime": "onnxruntime", "executorch": "executorch"}[name])
    runtime = RUNTIMES[name]
    tapped = tap_program(program, runtime.codes)
    reports = [runtime.export(p, tmp_path / f"{i}{runtime.suffix}") for i, p in enumerate((program, tapped.program))]
    if name == "onnxruntime":
        kernels = [{k: n for k, n in r.runtime.nodes.items() if k.startswith("Q")} for r in reports]
        assert kernels[0] == kernels[1] and kernels[0]["QLinearConv"] >= 1
    else:
        assert reports[0].delegates == reports[1].delegates == 1
        # The tap of a mean without its dims has a reshape of its own.
        computing = [{op: n for op, n in r.delegated_ops.items() if op != "aten.view_copy"} for r in reports]
        assert computing[0] == computing[1] and computing[0]["aten.convolution"] >= 1
    assert reports[0].float_nodes == reports[1].float_nodes == ()
    batch = [images(3, seed=5).numpy()]
    [shipped], [outputs] = (runtime.run(report.path, [batch], 1) for report in reports)
    assert all((a == b).all() for a, b in zip(shipped, outputs, strict=False))
    codes = leaves(tap_program(program).program.module()(images(3, seed=5)))[len(shipped) :]
    for tap, got, expected in zip(tapped.taps, outputs[len(shipped) :], codes, strict=True):
        assert got.dtype.name == str(runtime.codes).removeprefix("torch.") and tap.zero == (128 if tap.zero else 0)
        assert got.shape == expected.shape
        # A step at most, and seldom: the program's floats against the runtime's integers.
        assert abs(got.astype(int) - tap.zero - expected.numpy()).max() <= 1, tap.label


@pytest.mark.parametrize("target", ["onnxruntime", "xnnpack"])
def test_taps_of_an_integer_program_are_named_as_those_of_the_program(program: ExportedProgram, target: str) -> None:
    integer = qbench.export.program.copy_program(program)
    fuse_qdq(integer, target=target)
    assert any(CODES in node.meta for node in integer.graph.nodes)
    tapped, reference = tap_program(integer), tap_program(program)
    names = [tap.name for tap in reference.taps]
    fused = [tap.name for tap in tapped.taps]
    assert fused == [name for name in names if name in fused]
    x = images(3, seed=5)
    outputs = dict(zip(fused, leaves(tapped.program.module()(x))[-len(fused) :], strict=True))
    codes = dict(zip(names, leaves(reference.program.module()(x))[-len(names) :], strict=True))
    assert len(outputs) >= 3
    for name, got in outputs.items():
        assert got.shape == codes[name].shape and int((got.int() - codes[name].int()).abs().max()) <= 1, name


def test_a_tap_says_what_it_depends_on() -> None:
    program = program_of(SmallNet())
    conv2 = next(node for node in program.graph.nodes if node.name == "conv2d_1")
    tapped = tap_program(program, left_float={conv2.name: "conv2 is computed in float"})
    told = {tap.label: tap.inexact for tap in tapped.taps}
    assert told["conv1"] == "" and told["conv2"] == told["add"] == told["fc"] == "conv2 is computed in float"
    assert tapped.inexact == ("conv2 is computed in float",)


def test_a_tapped_integer_program_runs_in_a_process_that_loaded_it(tmp_path: Path) -> None:
    program = program_of(SmallNet())
    fuse_qdq(program, target="onnxruntime")
    tapped = tap_program(program)
    torch.export.save(tapped.program, tmp_path / "integer.pt2")
    torch.save(images(3), tmp_path / "x.pt")
    code = (
        "import sys, torch, qbench\n"
        "module = qbench.load_program(sys.argv[1] + '/integer.pt2').module()\n"
        "torch.save(module(torch.load(sys.argv[1] + '/x.pt')), sys.argv[1] + '/y.pt')\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    expected = leaves(tapped.program.module()(images(3)))
    for got, value in zip(leaves(torch.load(tmp_path / "y.pt")), expected, strict=True):
        assert torch.equal(got, value)

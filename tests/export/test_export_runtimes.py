"""Files are read back by processes that know nothing of the model."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import hand_programs as hand
import numpy as np
import pytest
import torch
from torch import Tensor

from qbench.errors import ExportError
from qbench.export import RUNTIMES, run_file, run_program
from qbench.export.processes import FileRunner, load_batch, save_batch
from qbench.export.runtimes import cpu_features, get_runtime

EXTRAS = {"onnxruntime": "onnx", "executorch": "executorch"}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The small ResNet as a saved program, reloaded, and as a file of each runtime that is installed."""
    folder = tmp_path_factory.mktemp("files")
    torch.export.save(hand.residual(), folder / "net.pt2")
    program = torch.export.load(folder / "net.pt2")
    written = {"program": folder / "net.pt2"}
    for runtime in RUNTIMES.values():
        pytest.importorskip(EXTRAS[runtime.name])
        written[runtime.name] = runtime.export(program, folder / f"net{runtime.suffix}").path
    return written


@pytest.fixture
def batches() -> list[tuple[Tensor]]:
    return [(torch.randn(count, 3, 32, 32),) for count in (4, 7, 7)]


def test_inputs_are_taken_batch_by_batch(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    taken, run, ran = [], FileRunner.run, []

    def noted(runner: FileRunner, batch: list[np.ndarray], file: int = 0) -> list[np.ndarray]:
        ran.append(len(taken))
        return run(runner, batch, file)

    monkeypatch.setattr(FileRunner, "run", noted)
    outputs = run_program(files["program"], ((taken.append(index) or torch.ones(2, 3, 32, 32),) for index in range(3)))
    assert len(outputs) == 3 and ran == [1, 2, 3], "no batch is read before the one before it ran"


@pytest.mark.parametrize("name", RUNTIMES)
def test_a_fresh_process_gives_what_this_one_gives(name: str, files: dict[str, Path], batches: list) -> None:
    outputs = run_file(name, files[name], batches)
    here = RUNTIMES[name].run(files[name], [[x.numpy() for x in batch] for batch in batches], 1)
    assert len(outputs) == 3 and [len(batch) for batch in outputs] == [1, 1, 1]
    for [got], [expected], [x] in zip(outputs, here, batches, strict=True):
        assert got.dtype == np.float32 and got.shape == (len(x), 10) and len(np.unique(got)) >= 5
        assert np.array_equal(got, expected)
    assert outputs.runtime == name and outputs.version == RUNTIMES[name].version() and outputs.cpu == cpu_features()
    assert outputs.version in repr(outputs)


def test_a_reloaded_program_gives_every_value(files: dict[str, Path], batches: list) -> None:
    outputs = run_program(files["program"], batches, threads=torch.get_num_threads())
    module = hand.residual().module()
    for [got], batch in zip(outputs, batches, strict=True):
        assert np.array_equal(got, module(*batch).detach().numpy())
    assert outputs.version == torch.__version__


def test_the_process_does_not_depend_on_the_folder_it_starts_in(
    files: dict[str, Path], batches: list, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    relative = os.path.relpath(files["onnxruntime"], tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    (tmp_path / "onnxruntime.py").write_text("raise SystemExit('the wrong module')")
    assert len(run_file("onnxruntime", relative, batches[:1])) == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("onnxruntime", b"not a model", r"failed in its process \(exit status 1\):\nExportError: ONNX Runtime"),
        ("program", b"not an archive", r"exit status 1.*\nExportError: .* is not a program"),
    ],
)
def test_what_the_process_said_is_in_the_error(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(ExportError, match=message):
        if name == "program":
            run_program(tmp_path / "a", [])
        else:
            run_file(name, tmp_path / "a", [])


def test_a_process_that_dies_is_an_error(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(ExportError, match=r"exit status 1\):\n\(it said nothing\)"):
        run_program(files["program"], [])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda path: run_file("tflite", path, []), r"no runtime 'tflite'; use one of 'onnxruntime', 'executorch'"),
        (lambda path: get_runtime("program"), "no runtime 'program'"),
        (lambda path: run_file("onnxruntime", path / "no.onnx", []), "there is no file"),
        (lambda path: run_program(__file__, [], threads=0), "threads=0"),
        (lambda path: run_program(__file__, [torch.ones(2)]), r"write \[\(x,\), …\]"),
    ],
)
def test_wrong_calls(tmp_path: Path, call, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        call(tmp_path)


@pytest.mark.parametrize("batch", [[], [np.arange(3), np.ones((2, 0), np.float32)], [np.int64(4)] * 12])
def test_a_batch_survives_its_file(tmp_path: Path, batch: list) -> None:
    save_batch(tmp_path / "a.npz", [np.asarray(array) for array in batch])
    loaded = load_batch(tmp_path / "a.npz")
    assert len(loaded) == len(batch)
    for a, b in zip(loaded, batch, strict=True):
        assert a.dtype == np.asarray(b).dtype and np.array_equal(a, b)


def test_one_process_runs_several_files_batch_by_batch(files: dict[str, Path], batches: list) -> None:
    with FileRunner("onnxruntime", [files["onnxruntime"]] * 2) as runner:
        assert runner.settings == (("session.x64quantprecision=1",),) * 2
        assert runner.seconds == [0.0, 0.0]
        first, second = runner.run(batches[0], file=1), runner.run(batches[0])
        assert np.array_equal(first[0], second[0]) and min(runner.seconds) > 0
        folder = runner._folder
    assert not folder.exists()


def test_a_batch_that_the_file_does_not_take_says_so(files: dict[str, Path], batches: list) -> None:
    with FileRunner("program", [files["program"]]) as runner:
        runner.run(batches[0])
        with pytest.raises(ExportError, match=r"exit status 1\):\n(.*\n)*.*float32\[1, 3, 16, 16\]"):
            runner.run((torch.ones(1, 3, 16, 16),))


def test_exact_settings_are_read_from_the_session(files: dict[str, Path]) -> None:
    session = RUNTIMES["onnxruntime"].open(files["onnxruntime"], 1)
    assert session.settings == RUNTIMES["onnxruntime"].exact_settings

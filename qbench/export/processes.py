"""Running files in a fresh process: a figure about a file counts only if what read it knows nothing of the model.

    parent                                   python -m qbench.export.worker FOLDER
    job.json          ─────────────────────▶ opens every file
                      ◀───────────────────── {"version", "cpu", "settings"}
    inputs.npz, line  ─────────────────────▶ runs one file on one batch
                      ◀───────────────────── outputs.npz, {"seconds"}

One batch is under way at a time, so neither side holds more than one, however many there are.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, overload

import numpy as np
import torch

from qbench.errors import ExportError
from qbench.export.runtimes import Batch, get_runtime

_STDERR_LINES = 20


class RunOutputs(Sequence[Batch]):
    """What a file gave: `outputs[batch][output]` is an array. Compares and iterates like the list that it holds.

    Attributes:
        runtime: What ran it: the name of a runtime, or `"program"`.
        version: The version of the library that ran it.
        threads: The number of threads that it was given.
        cpu: The CPU's features that decide which integer kernels run (empty where they are not known).
    """

    def __init__(self, outputs: list[Batch], *, runtime: str, version: str, threads: int, cpu: tuple[str, ...]) -> None:
        self.outputs = outputs
        self.runtime = runtime
        self.version = version
        self.threads = threads
        self.cpu = cpu

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> list[Batch]: ...
    def __getitem__(self, index: int | slice) -> Batch | list[Batch]:
        """The outputs of a batch, or of several."""
        return self.outputs[index]

    def __len__(self) -> int:
        """The number of batches."""
        return len(self.outputs)

    def __repr__(self) -> str:
        """What ran it, on what."""
        cpu = ", ".join(self.cpu) or "unknown CPU"
        return f"RunOutputs({len(self)} batches by {self.runtime} {self.version}, {self.threads} threads, {cpu})"


class FileRunner:
    """A fresh process that holds open files of one kind; a context manager, at whose end the process ends.

    Args:
        kind: Name of a runtime, or `"program"` for what `torch.export.save` wrote.
        files: The files.
        threads: How many threads the runtime may use.

    Attributes:
        version: The version of the library that runs them.
        cpu: The CPU's features that decide which integer kernels run (empty where they are not known).
        settings: For each file, the settings that decide the same, as the runtime says them.
        seconds: For each file, for how long it has run.

    Raises:
        ExportError: no such file; the process failed (with the end of what it said).
    """

    version: str
    cpu: tuple[str, ...]
    settings: tuple[tuple[str, ...], ...]

    def __init__(self, kind: str, files: Sequence[str | os.PathLike[str]], *, threads: int = 1) -> None:
        self.kind, self.threads = kind, threads
        self.files = [Path(file).absolute() for file in files]
        for file in self.files:
            if not file.is_file():
                raise ExportError(f"there is no file {file}; export the program to it first")
        if threads < 1:
            raise ExportError(f"threads={threads} is not possible; use threads=1 or more")
        self.seconds = [0.0 for _ in self.files]
        self._folder = Path(tempfile.mkdtemp(prefix="qbench-"))
        try:
            self._process = self._start()
            hello = self._reply(f"{kind} on {', '.join(map(str, self.files))}")
        except BaseException:
            self._end()
            raise
        self.version, self.cpu = hello["version"], tuple(hello["cpu"])
        self.settings = tuple(tuple(settings) for settings in hello["settings"])

    def __enter__(self) -> FileRunner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def run(self, batch: Sequence[Any], file: int = 0) -> Batch:
        """Outputs of one batch: a tuple of tensors or arrays, in the order of the program's inputs.

        Raises:
            ExportError: the batch is no tuple; the process failed, on inputs that the file does not take, say.
        """
        save_batch(self._folder / "inputs.npz", _arrays(batch))
        with contextlib.suppress(BrokenPipeError):  # The process is gone; reading its reply says why.
            self._stdin.write(f"{file}\n")
            self._stdin.flush()
        self.seconds[file] += self._reply(f"{self.kind} on {self.files[file]}")["seconds"]
        return load_batch(self._folder / "outputs.npz")

    @property
    def _stdin(self) -> IO[str]:
        return self._process.stdin  # type: ignore[return-value]

    def _start(self) -> subprocess.Popen[str]:
        job = {"kind": self.kind, "files": list(map(str, self.files)), "threads": self.threads}
        (self._folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        root = str(Path(__file__).resolve().parents[2])
        given = [os.path.abspath(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([root, *given]),
            "OMP_NUM_THREADS": str(self.threads),
        }
        # Threads that wait by spinning take the cores from those that work: on a busy machine, several times slower.
        environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        # Into a file: a pipe that nobody reads fills up, and then the process waits for ever.
        with (self._folder / "stderr").open("w", encoding="utf-8") as stderr:
            return subprocess.Popen(
                [sys.executable, "-m", "qbench.export.worker", str(self._folder)],
                env=environment,
                cwd=self._folder,  # Python looks for modules in the current folder first; the user's may hold anything.
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                errors="replace",
            )

    def _reply(self, what: str) -> dict[str, Any]:
        line = self._process.stdout.readline()  # type: ignore[union-attr]
        if line.endswith("\n"):
            found: dict[str, Any] = json.loads(line)
            return found
        status = self._process.wait()
        said = (self._folder / "stderr").read_text(encoding="utf-8", errors="replace")
        tail = "\n".join(said.strip().splitlines()[-_STDERR_LINES:]) or "(it said nothing)"
        raise ExportError(f"running {what} failed in its process (exit status {status}):\n{tail}")

    def _end(self) -> None:
        process = getattr(self, "_process", None)
        if process is not None:
            process.kill()  # It holds nothing that is worth a farewell.
            process.wait()
            for stream in (process.stdin, process.stdout):
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def run_file(
    runtime: str, path: str | os.PathLike[str], batches: Iterable[Sequence[Any]], *, threads: int = 1
) -> RunOutputs:
    """Run a file on batches of inputs in a fresh process.

    Args:
        runtime: A name of `RUNTIMES`.
        path: The file.
        batches: One tuple of tensors or arrays per batch, in the order of the program's inputs.
        threads: How many threads the runtime may use.

    Returns:
        `outputs[batch][output]`, arrays on the host. Inputs are taken one batch at a time; `FileRunner` hands out
        outputs one batch at a time too.

    Raises:
        ExportError: unknown runtime; no such file; the process failed (with the end of what it said).
    """
    return _run(get_runtime(runtime).name, path, batches, threads)


def run_program(path: str | os.PathLike[str], batches: Iterable[Sequence[Any]], *, threads: int = 1) -> RunOutputs:
    """Reload a program that `torch.export.save` wrote, in a fresh process, and run it; as `run_file`.

    `threads` is the process's number of torch threads: float results depend on it.
    """
    return _run("program", path, batches, threads)


def _run(kind: str, path: str | os.PathLike[str], batches: Iterable[Sequence[Any]], threads: int) -> RunOutputs:
    arrays = map(_arrays, batches)
    first = list(itertools.islice(arrays, 1))  # Refused before a process is started.
    with FileRunner(kind, [path], threads=threads) as runner:
        outputs = [runner.run(batch) for batch in itertools.chain(first, arrays)]
        return RunOutputs(outputs, runtime=kind, version=runner.version, threads=threads, cpu=runner.cpu)


def _arrays(batch: Sequence[Any]) -> Batch:
    if isinstance(batch, (torch.Tensor, np.ndarray)):
        raise ExportError("a batch is a tuple of inputs, and a single tensor was given; write [(x,), …] for one input")
    return [value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value) for value in batch]


def save_batch(path: Path, batch: Batch) -> None:
    """Write the arrays of a batch, in their order, into an .npz file."""
    arrays: dict[str, Any] = {str(index): array for index, array in enumerate(batch)}
    np.savez(path, **arrays)


def load_batch(path: Path) -> Batch:
    """Read what `save_batch` wrote."""
    with np.load(path) as archive:
        return [archive[str(index)] for index in range(len(archive.files))]

"""The runtimes that run exported files, each one entry of `RUNTIMES`, and running them in a fresh process.

A figure about a file counts only if the file was read back by a process that knows nothing of the model, so `run_file`
and `run_program` start one (`python -m qbench.export.worker`) and hand inputs and outputs over in `.npz` files. The
functions of the entries run in the process that calls them.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch.utils import _pytree as pytree

from qbench.errors import ExportError, require
from qbench.export.executorch import to_executorch
from qbench.export.onnx import open_session, to_onnx
from qbench.export.program import load_program, quiet

Batch = list[np.ndarray]

_STDERR_LINES = 20
#: CPU features that decide which integer kernels run: without VNNI some saturate (`qbench.export.onnx.open_session`).
_CPU_FLAGS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni")


@dataclass(frozen=True)
class Runtime:
    """A runtime: how its files are written and how they are run.

    Attributes:
        name: Its name, `"onnxruntime"`.
        suffix: The suffix of its files, `".onnx"`.
        export: `export(program, path) -> report` writes a Q/DQ program to a file.
        run: `run(path, batches, threads) -> outputs` runs a file, in the process that calls it.
        version: `version() -> str`, that of the library which runs it.
    """

    name: str
    suffix: str
    export: Callable[[Any, Path], Any]
    run: Callable[[Path, Sequence[Batch], int], list[Batch]]
    version: Callable[[], str]


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


def run_onnx(path: Path, batches: Sequence[Batch], threads: int) -> list[Batch]:
    """Run an ONNX file with ONNX Runtime on the CPU.

    Raises:
        MissingDependencyError: onnxruntime is not installed.
        ExportError: the file does not load, or not with these inputs.
    """
    session = open_session(path, threads=threads)
    names = [value.name for value in session.get_inputs()]
    outputs = []
    for batch in batches:
        if len(batch) != len(names):
            raise ExportError(f"{path} has the inputs {names}, and {len(batch)} were given")
        try:
            outputs.append([np.asarray(value) for value in session.run(None, dict(zip(names, batch, strict=True)))])
        except Exception as error:  # onnxruntime's errors share no public base class.
            raise ExportError(f"ONNX Runtime does not run {path} on {_shapes(batch)}: {error}") from error
    return outputs


def run_executorch(path: Path, batches: Sequence[Batch], threads: int) -> list[Batch]:
    """Run a .pte file with ExecuTorch's portable runtime, the XNNPACK backend included.

    Raises:
        MissingDependencyError: executorch is not installed.
        ExportError: the file does not load, or not with these inputs.
    """
    with quiet():
        runtime = require("executorch.runtime", extra="executorch", purpose="run ExecuTorch files")
        from executorch.extension.pybindings import portable_lib
    if portable_lib._threadpool_get_thread_count() != threads:
        portable_lib._unsafe_reset_threadpool(threads)
    outputs = []
    method, shapes = None, ""
    for batch in batches:
        if method is None or shapes != _shapes(batch):
            # A method of several delegates that has run a small batch gives wrong values for a larger one
            # (ExecuTorch 1.5.1; a file with one delegate is right).
            method, shapes = _load_method(runtime, path), _shapes(batch)
        try:
            values = method.execute([torch.from_numpy(np.ascontiguousarray(array)) for array in batch])
        except Exception as error:
            raise ExportError(f"ExecuTorch does not run {path} on {_shapes(batch)}: {error}") from error
        # The runtime's outputs live in its own memory, which the next call writes.
        outputs.append([value.numpy().copy() for value in values])
    return outputs


def _load_method(runtime: Any, path: Path) -> Any:
    try:
        return runtime.Runtime.get().load_program(path).load_method("forward")
    except Exception as error:  # The bindings raise RuntimeError and others.
        raise ExportError(f"ExecuTorch does not load {path}: {error}") from error


def run_pt2(path: Path, batches: Sequence[Batch], threads: int) -> list[Batch]:
    """Run a program that `torch.export.save` wrote, without gradients.

    Raises:
        ExportError: the file does not load, or not with these inputs.
    """
    module = load_program(path).module()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return [_run_module(module, batch, path) for batch in batches]
    finally:
        torch.set_num_threads(before)


def _run_module(module: torch.nn.Module, batch: Batch, path: Path) -> Batch:
    try:
        with torch.no_grad():
            values = pytree.tree_leaves(module(*(torch.from_numpy(array) for array in batch)))
    except Exception as error:  # Its guards raise AssertionError, its ops RuntimeError and others.
        raise ExportError(f"the program {path} does not run on {_shapes(batch)}: {error}") from error
    return [value.numpy().copy() for value in values]


def _shapes(batch: Batch) -> str:
    return ", ".join(f"{array.dtype}{list(array.shape)}" for array in batch)


def _onnxruntime_version() -> str:
    return str(require("onnxruntime", extra="onnx", purpose="run ONNX files").__version__)


def _executorch_version() -> str:
    from importlib.metadata import version

    return version("executorch")


#: Every runtime, in the order in which reports name them. A new runtime is one more entry.
RUNTIMES: dict[str, Runtime] = {
    runtime.name: runtime
    for runtime in (
        Runtime("onnxruntime", ".onnx", to_onnx, run_onnx, _onnxruntime_version),
        Runtime("executorch", ".pte", to_executorch, run_executorch, _executorch_version),
    )
}

#: What a worker can run: the runtimes, and a saved program by PyTorch itself.
RUNNERS: dict[str, tuple[Callable[[Path, Sequence[Batch], int], list[Batch]], Callable[[], str]]] = {
    **{runtime.name: (runtime.run, runtime.version) for runtime in RUNTIMES.values()},
    "program": (run_pt2, lambda: str(torch.__version__)),
}


def get_runtime(name: str) -> Runtime:
    """The runtime of that name.

    Raises:
        ExportError: there is none; the message lists those there are.
    """
    if name not in RUNTIMES:
        raise ExportError(f"there is no runtime {name!r}; use one of {', '.join(map(repr, RUNTIMES))}")
    return RUNTIMES[name]


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
        `outputs[batch][output]`, arrays on the host.

    Raises:
        ExportError: unknown runtime; no such file; the process failed (with the end of what it said).
    """
    return _run_worker(get_runtime(runtime).name, path, batches, threads)


def run_program(path: str | os.PathLike[str], batches: Iterable[Sequence[Any]], *, threads: int = 1) -> RunOutputs:
    """Reload a program that `torch.export.save` wrote, in a fresh process, and run it; as `run_file`.

    `threads` is the process's number of torch threads: float results depend on it.
    """
    return _run_worker("program", path, batches, threads)


def _run_worker(kind: str, path: str | os.PathLike[str], batches: Iterable[Sequence[Any]], threads: int) -> RunOutputs:
    file = Path(path).absolute()
    if not file.is_file():
        raise ExportError(f"there is no file {file}; export the program to it first")
    if threads < 1:
        raise ExportError(f"threads={threads} is not possible; use threads=1 or more")
    with tempfile.TemporaryDirectory(prefix="qbench-") as name:
        folder = Path(name)
        save_batches(folder / "inputs.npz", [_arrays(batch) for batch in batches])
        job = {"kind": kind, "file": str(file), "threads": threads}
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        _start_worker(folder, threads, what=f"{kind} on {file}")
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        outputs = load_batches(folder / "outputs.npz")
    return RunOutputs(outputs, runtime=kind, version=result["version"], threads=threads, cpu=tuple(result["cpu"]))


def _start_worker(folder: Path, threads: int, *, what: str) -> None:
    root = str(Path(__file__).resolve().parents[2])
    given = [os.path.abspath(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, *given]), "OMP_NUM_THREADS": str(threads)}
    # Threads that wait by spinning take the cores from those that work: on a busy machine, several times slower.
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    done = subprocess.run(
        [sys.executable, "-m", "qbench.export.worker", str(folder)],
        env=environment,
        cwd=folder,  # Python looks for modules in the current folder first, and the user's may hold anything.
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode != 0:
        tail = "\n".join(done.stderr.strip().splitlines()[-_STDERR_LINES:]) or "(it said nothing)"
        raise ExportError(f"running {what} failed in its process (exit status {done.returncode}):\n{tail}")


def _arrays(batch: Sequence[Any]) -> Batch:
    if isinstance(batch, (torch.Tensor, np.ndarray)):
        raise ExportError("a batch is a tuple of inputs, and a single tensor was given; write [(x,), …] for one input")
    return [value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value) for value in batch]


def save_batches(path: Path, batches: Sequence[Batch]) -> None:
    """Write `batches[i][j]` as the array `i.j` of an .npz file, with the number of batches beside them."""
    arrays = {f"{i}.{j}": array for i, batch in enumerate(batches) for j, array in enumerate(batch)}
    np.savez(path, count=np.asarray(len(batches)), **arrays)  # type: ignore[arg-type]


def load_batches(path: Path) -> list[Batch]:
    """Read what `save_batches` wrote."""
    with np.load(path) as archive:
        batches: list[dict[int, np.ndarray]] = [{} for _ in range(int(archive["count"]))]
        for name in archive.files:
            if name != "count":
                i, j = map(int, name.split("."))
                batches[i][j] = archive[name]
    return [[batch[j] for j in sorted(batch)] for batch in batches]


def cpu_features() -> tuple[str, ...]:
    """Which of the CPU features that choose integer kernels are there; empty where the system does not say."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return ()
    flags = next((line.split(":", 1)[1].split() for line in text.splitlines() if line.startswith("flags")), [])
    known = tuple(flag for flag in _CPU_FLAGS if flag in flags)
    return known or (platform.machine(),)

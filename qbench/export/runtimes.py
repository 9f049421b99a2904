"""The runtimes that run exported files, each one entry of `RUNTIMES`, and how each opens a file.

Opening gives a `Session`: a function from the inputs of a batch to its outputs, and the settings that it runs with,
read back from the runtime itself. The sessions here run in the process that opens them; `qbench.export.processes` runs
them in a fresh one.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from qbench.errors import ExportError, require
from qbench.export.executorch import to_executorch
from qbench.export.onnx import open_session, to_onnx
from qbench.export.program import load_program, quiet

Batch = list[np.ndarray]

#: CPU features that decide which integer kernels run: without VNNI some saturate (`qbench.export.onnx.open_session`).
_CPU_FLAGS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni")
_EXACT_KERNELS = "session.x64quantprecision"


@dataclass(frozen=True)
class Session:
    """An open file.

    Attributes:
        run: Outputs of the inputs of one batch, arrays on the host.
        settings: Settings of the runtime that decide which kernels run, `("session.x64quantprecision=1",)`.
    """

    run: Callable[[Batch], Batch]
    settings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Runtime:
    """A runtime: how its files are written and how they are run.

    Attributes:
        name: Its name, `"onnxruntime"`.
        suffix: The suffix of its files, `".onnx"`.
        target: Name of the target whose arithmetic it has.
        codes: What its files store 8-bit codes of activations in.
        export: `export(program, path) -> report` writes a Q/DQ program to a file.
        open: `open(path, threads) -> Session`, in the process that calls it.
        version: `version() -> str`, that of the library which runs it.
        exact_settings: Settings without which its integer kernels are not exact on every CPU.
    """

    name: str
    suffix: str
    target: str
    codes: torch.dtype
    export: Callable[[Any, Path], Any]
    open: Callable[[Path, int], Session]
    version: Callable[[], str]
    exact_settings: tuple[str, ...] = ()

    def run(self, path: Path, batches: Sequence[Batch], threads: int) -> list[Batch]:
        """Run a file on batches of inputs, in this process.

        Raises:
            MissingDependencyError: the runtime is not installed.
            ExportError: the file does not load, or not with these inputs.
        """
        session = self.open(path, threads)
        return [session.run(batch) for batch in batches]


def open_onnx(path: Path, threads: int) -> Session:
    """Open an ONNX file with ONNX Runtime on the CPU.

    Raises:
        MissingDependencyError: onnxruntime is not installed.
        ExportError: the file does not load; running it, the inputs are not those of the file.
    """
    session = open_session(path, threads=threads)
    names = [value.name for value in session.get_inputs()]

    def run(batch: Batch) -> Batch:
        if len(batch) != len(names):
            raise ExportError(f"{path} has the inputs {names}, and {len(batch)} were given")
        try:
            return [np.asarray(value) for value in session.run(None, dict(zip(names, batch, strict=True)))]
        except Exception as error:  # onnxruntime's errors share no public base class.
            raise ExportError(f"ONNX Runtime does not run {path} on {_shapes(batch)}: {error}") from error

    return Session(run, (f"{_EXACT_KERNELS}={_config_entry(session, _EXACT_KERNELS)}",))


def _config_entry(session: Any, key: str) -> str:
    try:
        return str(session.get_session_options().get_session_config_entry(key))
    except RuntimeError:  # It has no entry of that name.
        return "0"


def open_executorch(path: Path, threads: int) -> Session:
    """Open a .pte file with ExecuTorch's portable runtime, the XNNPACK backend included.

    Raises:
        MissingDependencyError: executorch is not installed.
        ExportError: the file does not load; running it, the inputs are not those of the file.
    """
    with quiet():
        runtime = require("executorch.runtime", extra="executorch", purpose="run ExecuTorch files")
        from executorch.extension.pybindings import portable_lib
    if portable_lib._threadpool_get_thread_count() != threads:
        portable_lib._unsafe_reset_threadpool(threads)
    method, shapes = _load_method(runtime, path), ""

    def run(batch: Batch) -> Batch:
        nonlocal method, shapes
        if shapes not in ("", _shapes(batch)):
            # A method of several delegates that has run a small batch gives wrong values for a larger one
            # (ExecuTorch 1.5.1; a file with one delegate is right).
            method = _load_method(runtime, path)
        shapes = _shapes(batch)
        try:
            values = method.execute([torch.from_numpy(np.ascontiguousarray(array)) for array in batch])
        except Exception as error:
            raise ExportError(f"ExecuTorch does not run {path} on {_shapes(batch)}: {error}") from error
        # The runtime's outputs live in its own memory, which the next call writes.
        return [value.numpy().copy() for value in values]

    return Session(run)


def _load_method(runtime: Any, path: Path) -> Any:
    try:
        return runtime.Runtime.get().load_program(path).load_method("forward")
    except Exception as error:  # The bindings raise RuntimeError and others.
        raise ExportError(f"ExecuTorch does not load {path}: {error}") from error


def open_pt2(path: Path, threads: int) -> Session:
    """Open a program that `torch.export.save` wrote; it is run without gradients.

    Raises:
        ExportError: the file does not load; running it, the inputs are not those of the file.
    """
    module = load_program(path).module()

    def run(batch: Batch) -> Batch:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            with torch.no_grad():
                values = pytree.tree_leaves(module(*(torch.from_numpy(array) for array in batch)))
        except Exception as error:  # Its guards raise AssertionError, its ops RuntimeError and others.
            raise ExportError(f"the program {path} does not run on {_shapes(batch)}: {error}") from error
        finally:
            torch.set_num_threads(before)
        return [value.numpy().copy() for value in values]

    return Session(run)


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
        Runtime(
            "onnxruntime",
            ".onnx",
            "onnxruntime",
            torch.uint8,
            to_onnx,
            open_onnx,
            _onnxruntime_version,
            exact_settings=(f"{_EXACT_KERNELS}=1",),
        ),
        Runtime("executorch", ".pte", "xnnpack", torch.int8, to_executorch, open_executorch, _executorch_version),
    )
}

#: What a fresh process can open: files of the runtimes, and a saved program by PyTorch itself.
OPENERS: dict[str, tuple[Callable[[Path, int], Session], Callable[[], str]]] = {
    **{runtime.name: (runtime.open, runtime.version) for runtime in RUNTIMES.values()},
    "program": (open_pt2, lambda: str(torch.__version__)),
}


def get_runtime(name: str) -> Runtime:
    """The runtime of that name.

    Raises:
        ExportError: there is none; the message lists those there are.
    """
    if name not in RUNTIMES:
        raise ExportError(f"there is no runtime {name!r}; use one of {', '.join(map(repr, RUNTIMES))}")
    return RUNTIMES[name]


def run_onnx(path: Path, batches: Sequence[Batch], threads: int) -> list[Batch]:
    """`RUNTIMES["onnxruntime"].run`."""
    return RUNTIMES["onnxruntime"].run(path, batches, threads)


def run_executorch(path: Path, batches: Sequence[Batch], threads: int) -> list[Batch]:
    """`RUNTIMES["executorch"].run`."""
    return RUNTIMES["executorch"].run(path, batches, threads)


def cpu_features() -> tuple[str, ...]:
    """Which of the CPU features that choose integer kernels are there; empty where the system does not say."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return ()
    flags = next((line.split(":", 1)[1].split() for line in text.splitlines() if line.startswith("flags")), [])
    known = tuple(flag for flag in _CPU_FLAGS if flag in flags)
    return known or (platform.machine(),)

"""The deployed files of a network against its float form: how long one image takes, and what of them is still in float.

    float eager          PyTorch, eval, inference_mode
    float ONNX Runtime   the float network as ONNX
    int8 ONNX Runtime    `qbench.export.to_onnx`, opened by `open_session`, whose integer kernels are exact everywhere
    int8 weights,        weight_codes="int8" in a session of ONNX Runtime's own defaults: on x64 without VNNI it takes
      default session    kernels that saturate sums, so its outputs are counted against those of `open_session`
    int8 ExecuTorch      `qbench.export.to_executorch`, XNNPACK

    speed    median over the rounds of (time of the other form / time of this one in the same round)

Each runtime has threads of its own, which go on looking for work for some milliseconds after a call, on the processors
that the next form needs: so a form's turn starts with a pause and a call that is not counted.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import qbench
from benchmarks.speed.rows import Job, Row
from benchmarks.speed.train_step import reason
from benchmarks.speed.variants import float_network, qbench_plain
from qbench.errors import require
from qbench.export.program import quiet
from qbench.export.runtimes import open_executorch, open_onnx

Call = Callable[[], object]
_WARM_UP, _CALLS, _PAUSE = 2, 5, 0.25
_BASES = ("float eager", "float ONNX Runtime")


def deployed(job: Job) -> Iterator[Row]:
    """The part `deployed`."""
    torch.manual_seed(0)
    network = float_network(job.model)
    images = torch.randn(job.batch, 3, job.px, job.px)
    calls: dict[str, Call] = {}
    rows: dict[str, Row] = {}
    with tempfile.TemporaryDirectory(prefix="qbench-bench-") as name:
        files = _Files(network, images, Path(name), job)
        for form, make in FORMS.items():
            try:
                calls[form], about = make(files)
                rows[form] = job.row(form, **about)
            except Exception as error:  # a runtime that is not installed, a network that it refuses
                rows[form] = job.row(form, refused=reason(error))
        times = _timed(calls, job.rounds)
    for form, own in times.items():
        over = {base: _speed(times[base], own) for base in _BASES if base in times}
        rows[form] |= {"seconds": statistics.median(own), "speed": over}
    yield from (rows[form] for form in FORMS if form in job.forms)


class _Files:
    """A network in every form: each method gives a call on the images, and what is to be said about it."""

    def __init__(self, network: nn.Module, images: Tensor, folder: Path, job: Job) -> None:
        self.images, self.folder, self.threads = images, folder, job.threads
        self.batch = [images.numpy()]
        model = qbench_plain(job.model, network, (images,))
        model(torch.cat([images, torch.randn_like(images)]))
        self.program = qbench.convert(model.eval(), (images,))
        self.network = network.eval()

    def eager(self) -> tuple[Call, dict[str, Any]]:
        return torch.inference_mode()(lambda: self.network(self.images)), {}

    def float_onnx(self) -> tuple[Call, dict[str, Any]]:
        path = self.folder / "float.onnx"
        with quiet():
            torch.onnx.export(self.network, (self.images,), path, dynamo=True, verbose=False)
        session = open_onnx(path, self.threads)
        return lambda: session.run(self.batch), {}

    def int8_onnx(self) -> tuple[Call, dict[str, Any]]:
        about = self._exported(qbench.export.to_onnx, "int8.onnx")
        session = open_onnx(self.folder / "int8.onnx", self.threads)
        return lambda: session.run(self.batch), about

    def int8_default(self) -> tuple[Call, dict[str, Any]]:
        path = self.folder / "weights.onnx"
        about = self._exported(qbench.export.to_onnx, path.name, weight_codes="int8")
        ort = require("onnxruntime", extra="onnx", purpose="run ONNX files")
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        given = {session.get_inputs()[0].name: self.batch[0]}
        found, exact = session.run(None, given)[0], open_onnx(path, self.threads).run(self.batch)[0]
        about |= {"different": int((found != exact).sum()), "compared": found.size}
        return lambda: session.run(None, given), about

    def int8_executorch(self) -> tuple[Call, dict[str, Any]]:
        about = self._exported(qbench.export.to_executorch, "int8.pte")
        session = open_executorch(self.folder / "int8.pte", self.threads)
        return lambda: session.run(self.batch), about

    def _exported(self, export: Callable[..., Any], name: str, **options: Any) -> dict[str, Any]:
        started = time.perf_counter()
        report = export(self.program, self.folder / name, **options)
        seconds = time.perf_counter() - started
        return {"export_seconds": seconds, "float_nodes": list(map(str, report.float_nodes))}


FORMS: dict[str, Callable[[_Files], tuple[Call, dict[str, Any]]]] = {
    "float eager": _Files.eager,
    "float ONNX Runtime": _Files.float_onnx,
    "int8 ONNX Runtime": _Files.int8_onnx,
    "int8 weights, default session": _Files.int8_default,
    "int8 ExecuTorch": _Files.int8_executorch,
}


def _timed(calls: dict[str, Call], rounds: int) -> dict[str, list[float]]:
    """Seconds of a call, the median of several in a row, in every round."""
    times: dict[str, list[float]] = {form: [] for form in calls}
    for index in range(_WARM_UP + rounds):
        for form, call in calls.items():
            time.sleep(_PAUSE)
            call()
            found = statistics.median(_seconds(call) for _ in range(_CALLS))
            if index >= _WARM_UP:
                times[form].append(found)
    return times


def _seconds(call: Call) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _speed(base: list[float], own: list[float]) -> float:
    return statistics.median(other / one for other, one in zip(base, own, strict=True))

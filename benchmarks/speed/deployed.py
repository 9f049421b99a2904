"""The deployed files of a network against its float form: how long one image takes, and what of them is still in float.

    float eager          PyTorch, eval, inference_mode
    float ONNX Runtime   the float network as ONNX
    int8 ONNX Runtime    `qbench.export.to_onnx`, opened as `open_session` does, whose integer kernels are exact
    int8 ExecuTorch      `qbench.export.to_executorch`, XNNPACK

    speed    median over the rounds of (time of the other form / time of this one in the same round)
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
from qbench.export.program import quiet
from qbench.export.runtimes import open_executorch, open_onnx

Call = Callable[[], object]
FORMS = ("float eager", "float ONNX Runtime", "int8 ONNX Runtime", "int8 ExecuTorch")
_WARM_UP, _CALLS = 3, 5


def deployed(job: Job) -> Iterator[Row]:
    """The part `deployed`."""
    torch.manual_seed(0)
    network = float_network(job.model)
    images = torch.randn(job.batch, 3, job.px, job.px)
    calls: dict[str, Call] = {}
    rows: dict[str, Row] = {}
    with tempfile.TemporaryDirectory(prefix="qbench-bench-") as name:
        makers = _makers(network, images, Path(name), job)
        for form in FORMS:
            try:
                calls[form], about = makers[form]()
                rows[form] = job.row(form, **about)
            except Exception as error:  # a runtime that is not installed, a network that it refuses
                rows[form] = job.row(form, refused=reason(error))
        times = _timed(calls, _CALLS * job.rounds)
    for form, own in times.items():
        over = {base: _speed(times[base], own) for base in FORMS[:2] if base in times}
        rows[form] |= {"seconds": statistics.median(own), "speed": over}
    yield from (rows[form] for form in FORMS if form in job.forms)


def _makers(
    network: nn.Module, images: Tensor, folder: Path, job: Job
) -> dict[str, Callable[[], tuple[Call, dict[str, Any]]]]:
    """By form, what makes its call and says something about it."""
    batch = [images.numpy()]
    model = qbench_plain(job.model, network, (images,))
    model(torch.cat([images, torch.randn_like(images)]))
    program = qbench.convert(model.eval(), (images,))
    network.eval()

    def eager() -> tuple[Call, dict[str, Any]]:
        return torch.inference_mode()(lambda: network(images)), {}

    def float_onnx() -> tuple[Call, dict[str, Any]]:
        with quiet():
            torch.onnx.export(network, (images,), folder / "float.onnx", dynamo=True, verbose=False)
        session = open_onnx(folder / "float.onnx", job.threads)
        return lambda: session.run(batch), {}

    def int8_onnx() -> tuple[Call, dict[str, Any]]:
        started = time.perf_counter()
        report = qbench.export.to_onnx(program, folder / "int8.onnx")
        about = {"export_seconds": time.perf_counter() - started, "float_nodes": list(map(str, report.float_nodes))}
        session = open_onnx(folder / "int8.onnx", job.threads)
        return lambda: session.run(batch), about

    def int8_executorch() -> tuple[Call, dict[str, Any]]:
        started = time.perf_counter()
        report = qbench.export.to_executorch(program, folder / "int8.pte")
        about = {"export_seconds": time.perf_counter() - started, "float_nodes": list(map(str, report.float_nodes))}
        session = open_executorch(folder / "int8.pte", job.threads)
        return lambda: session.run(batch), about

    return dict(zip(FORMS, (eager, float_onnx, int8_onnx, int8_executorch), strict=True))


def _timed(calls: dict[str, Call], rounds: int) -> dict[str, list[float]]:
    """Seconds of every call in every round, one after the other."""
    times: dict[str, list[float]] = {form: [] for form in calls}
    for index in range(_WARM_UP + rounds):
        for form, call in calls.items():
            started = time.perf_counter()
            call()
            if index >= _WARM_UP:
                times[form].append(time.perf_counter() - started)
    return times


def _speed(base: list[float], own: list[float]) -> float:
    return statistics.median(other / one for other, one in zip(base, own, strict=True))

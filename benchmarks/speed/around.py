"""What everything around the training step costs, each in fresh processes, as a user meets it.

    import     seconds of `import qbench` after `import torch, numpy`, from compiled files, as pip installs them
    flow       seconds of the first fuse, prepare_qat, convert, quantize_bias and fuse_qdq of a network in a process
    slope      log2(seconds(2n) / seconds(n)) of each pass on chains of n convolutions       1 is linear

Medians over the processes.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import torch

import qbench
from benchmarks import passes_slope
from benchmarks.speed.rows import Job, Row
from benchmarks.speed.variants import float_network
from qbench.export.program import copy_program

_IMPORT = """
import time
started = time.perf_counter()
import torch, numpy
loaded = time.perf_counter()
import qbench
print(loaded - started, time.perf_counter() - loaded)
"""
_LAYERS = (1250, 2500, 5000, 10000)
_IMAGES, _PROCESSES = 2, 3


def imports(job: Job) -> Iterator[Row]:
    """The part `import`."""
    with tempfile.TemporaryDirectory(prefix="qbench-bench-") as folder:
        root = str(Path(qbench.__file__).parents[1])
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH", "")])])
        environment = {**os.environ, "PYTHONPATH": path, "PYTHONPYCACHEPREFIX": folder}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)

        def once() -> list[float]:
            command = [sys.executable, "-W", "ignore", "-c", _IMPORT]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            return list(map(float, done.stdout.split()))

        once()  # compiles the files
        found = [once() for _ in range(job.rounds)]
    torch_seconds, own = (statistics.median(column) for column in zip(*found, strict=True))
    for form in job.forms:
        yield job.row(form, seconds=own, torch_seconds=torch_seconds, all_seconds=[own for _, own in found])


def flows(job: Job) -> Iterator[Row]:
    """The part `flow`: a row a network, with the seconds of each step."""
    found = [_elsewhere(flow, job.model, job.px, job.threads) for _ in range(min(job.rounds, _PROCESSES))]
    seconds = {name: statistics.median(row[name] for row in found) for name in found[0]}
    for form in job.forms:
        yield job.row(form, seconds=seconds, processes=found)


def flow(model: str, px: int, threads: int) -> dict[str, float]:
    """Seconds of each step from a float network to its integer program, in this process."""
    torch.set_num_threads(threads)
    seconds: dict[str, float] = {}

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        seconds[name] = time.perf_counter() - started

    network, images = float_network(model), torch.randn(_IMAGES, 3, px, px)
    with timed("fuse"):
        fused = qbench.fuse(network)
    with timed("prepare_qat"):
        prepared = qbench.prepare_qat(fused, qconfig=qbench.get_qconfig(), example_inputs=(images,))
    prepared.train()(images)
    with timed("convert"):
        program = qbench.convert(prepared.eval(), (images,))
    with timed("quantize_bias"):
        qbench.passes.quantize_bias(program)
    program = copy_program(program)
    with timed("fuse_qdq"):
        qbench.passes.fuse_qdq(program, target="onnxruntime")
    return seconds


def slopes(job: Job, layers: tuple[int, ...] = _LAYERS) -> Iterator[Row]:
    """The part `slope`: processor seconds of each pass, by the number of convolutions."""
    passes_slope.measure(10)  # operators are registered
    rows = [{"layers": count, **passes_slope.measure(count)} for count in sorted(layers)]
    for form in job.forms:
        yield job.row(form, seconds=rows, slope=passes_slope.slopes(rows))


def _elsewhere(call: Callable[..., dict[str, float]], *args: object) -> dict[str, float]:
    """What a function returns in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(call, *args).result()

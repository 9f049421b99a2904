"""Images on disk: what verification holds in memory as their number grows, and how long training waits for them.

    streaming    peak memory of `qbench.verify` and of the processes that it starts, on so many images, read from a
                 folder batch by batch
    loading      share of a training pass that is spent waiting for images; rate = images a second

The images are JPEG files of ImageNet's usual size, noise on a smooth ground, so that decoding has its usual work.
"""

from __future__ import annotations

import cProfile
import pstats
import resource
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import qbench
from benchmarks.speed import memory
from benchmarks.speed.rows import Job, Row
from benchmarks.speed.variants import float_network, qbench_plain
from qbench import data
from qbench.errors import require
from qbench.training import train_epoch

_WIDTH, _HEIGHT, _QUALITY = 500, 375, 90
#: Functions of the profile, by what they do.
_STAGES = {"_decode": "decode", "resize": "resize"}


def write_images(folder: Path, count: int, seed: int = 0) -> None:
    """Write `count` images into two classes."""
    image_module = require("PIL.Image", extra="data", purpose="write images")
    generator = np.random.default_rng(seed)
    for index in range(count):
        ground = image_module.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        smooth = np.asarray(ground.resize((_WIDTH, _HEIGHT), resample=3), dtype=np.int16)
        noisy = smooth + generator.integers(-12, 13, smooth.shape, dtype=np.int16)
        path = folder / f"class_{index % 2}" / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image_module.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=_QUALITY)


def streaming(job: Job) -> Iterator[Row]:
    """The part `streaming`: a form is a number of images; one process each, as a peak cannot be set back in others."""
    torch.manual_seed(0)
    example = (torch.randn(job.batch, 3, job.px, job.px),)
    model = qbench_plain(job.model, float_network(job.model), example)
    model(*example)
    program = qbench.convert(model.eval(), example)
    for form in job.forms:
        with tempfile.TemporaryDirectory(prefix="qbench-bench-") as folder:
            write_images(Path(folder), int(form))
            # All of them, in the order of a data set to evaluate on.
            dataset = data.ImageFiles(tuple(data.scan(Path(folder))[1]), job.px, augment=False)
            memory.reset_peak()
            batches = ((images,) for images, _ in data.batches(dataset, job.batch))
            found = qbench.verify(model, program, batches, runtimes=("onnxruntime",))
            peak, others = memory.peak(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        yield job.row(form, peak_mib=peak, processes_mib=others, exact=found.exact, seconds=found.seconds)


class Waiting:
    """Batches, and for how long they were waited for.

    Attributes:
        seconds: The time from asking for a batch until it was there, summed.
        images: How many there were.
    """

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader, self.seconds, self.images = loader, 0.0, 0

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.loader)
        while True:
            started = time.perf_counter()
            batch = next(batches, None)
            self.seconds += time.perf_counter() - started
            if batch is None:
                return
            self.images += len(batch[1])
            yield batch


def loading(job: Job) -> Iterator[Row]:
    """The part `loading`: a form is a number of processes that read images; `rounds` batches are trained."""
    torch.manual_seed(0)
    model = float_network(job.model).to(job.device)
    model = qbench_plain(job.model, model, (torch.randn(job.batch, 3, job.px, job.px, device=job.device),))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with tempfile.TemporaryDirectory(prefix="qbench-bench-") as folder:
        write_images(Path(folder), job.rounds * job.batch)
        dataset = data.ImageFiles(tuple(data.scan(Path(folder))[1]), job.px, augment=True)
        stages = profile(dataset)
        for form in job.forms:
            loader = data.batches(dataset, job.batch, seed=0, workers=int(form))
            alone = _drained(Waiting(loader))
            waiting = Waiting(loader)
            started = time.perf_counter()
            train_epoch(model, waiting, optimizer)
            total = time.perf_counter() - started
            rates = {"loaded": alone.images / alone.seconds, "trained": waiting.images / (total - waiting.seconds)}
            yield job.row(form, share=waiting.seconds / total, rates=rates, stages=stages)


def profile(dataset: data.ImageFiles) -> dict[str, float]:
    """Share of the time that an image takes, by stage."""
    profiler = cProfile.Profile()
    profiler.runcall(lambda: [dataset[index] for index in range(len(dataset))])
    found = pstats.Stats(profiler)
    stages = dict.fromkeys(_STAGES.values(), 0.0)
    for (_, _, name), (_, _, _, cumulative, _) in found.stats.items():  # type: ignore[attr-defined]
        if name in _STAGES:
            stages[_STAGES[name]] += cumulative
    total = found.total_tt  # type: ignore[attr-defined]
    stages["the rest"] = total - sum(stages.values())
    return {name: seconds / total for name, seconds in stages.items()}


def _drained(waiting: Waiting) -> Waiting:
    for _ in waiting:
        pass
    return waiting

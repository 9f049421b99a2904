"""The parts of the suite, and the process that measures one job: `python -m benchmarks.speed.parts JOB.json OUT.jsonl`.

A part is a function from a job to its rows. What of `Options` it is asked for is its list of jobs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.speed import around, deployed, images, kernels, train_step
from benchmarks.speed.rows import LAYOUTS, Job, Row, append, command, machine
from benchmarks.speed.variants import FORMS

MODELS = ("resnet18", "resnet50", "mobilenet_v2", "efficientnet_b0")
SIZES = ("8x128", "16x224")
_PX = 224


@dataclass(frozen=True)
class Options:
    """What of the suite is wanted.

    Attributes:
        models: torchvision classifiers.
        sizes: `"BATCHxPX"`.
        layouts: Names of `LAYOUTS`.
        forms: Names of `FORMS`.
        amp, device, threads, rounds: As in `Job`.
    """

    models: tuple[str, ...] = MODELS
    sizes: tuple[str, ...] = SIZES
    layouts: tuple[str, ...] = tuple(LAYOUTS)
    forms: tuple[str, ...] = tuple(FORMS)
    amp: bool = False
    device: str = "cpu"
    threads: int = 1
    rounds: int = 11


@dataclass(frozen=True)
class Part:
    """A part of the suite.

    Attributes:
        rows: Measures a job.
        jobs: The jobs that options ask for, without part, device, threads and rounds.
        alone: Whether each form needs a process of its own.
        devices: Where it runs.
    """

    rows: Callable[[Job], Iterator[Row]]
    jobs: Callable[[Options], list[Job]]
    alone: bool = False
    devices: tuple[str, ...] = ("cpu",)


def _settings(part: str, options: Options) -> list[Job]:
    """Every network in every size and layout."""
    found = []
    for model in options.models:
        for size in options.sizes:
            batch, px = map(int, size.split("x"))
            for layout in options.layouts:
                found.append(Job(part, options.forms, model, batch, px, layout, options.amp))
    return found


PARTS = {
    "import": Part(around.imports, lambda o: [Job("import", ("import qbench",))]),
    "flow": Part(around.flows, lambda o: [Job("flow", ("first in a process",), model, 2, _PX) for model in o.models]),
    "slope": Part(around.slopes, lambda o: [Job("slope", ("passes",))]),
    "deployed": Part(
        deployed.deployed, lambda o: [Job("deployed", tuple(deployed.FORMS), model, 1, _PX) for model in o.models]
    ),
    "kernels": Part(kernels.kernels, lambda o: [Job("kernels", tuple(kernels.GROUPS), "resnet18", 1, _PX)]),
    "streaming": Part(
        images.streaming, lambda o: [Job("streaming", ("128", "512", "1024"), "resnet18", 8, 32)], alone=True
    ),
    "loading": Part(
        images.loading, lambda o: [Job("loading", ("0", "1", "2"), "resnet18", 16, _PX)], devices=("cpu", "cuda")
    ),
    "step": Part(train_step.steps, lambda o: _settings("step", o), devices=("cpu", "cuda")),
    "peak": Part(train_step.peaks, lambda o: _settings("peak", o), alone=True, devices=("cpu", "cuda")),
}
"""Every part, the quick ones first."""


def main() -> None:
    """Measure one job and append its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    fields = json.loads(options.job.read_text(encoding="utf-8"))
    job = Job(**{**fields, "forms": tuple(fields["forms"])})
    torch.set_num_threads(job.threads)
    about = {**machine(job.device), "command": command(job.setting())}
    for row in PARTS[job.part].rows(job):
        append(options.out, [{**row, **about}])


if __name__ == "__main__":
    main()

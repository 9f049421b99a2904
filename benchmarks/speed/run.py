"""The whole benchmark suite; goes on where it stopped.

    python -m benchmarks.speed.run                                      everything, and docs/benchmarks.md from it
    python -m benchmarks.speed.run --parts step peak --models resnet18 --sizes 8x128 --layouts contiguous
    python -m benchmarks.speed.run --again --parts deployed             what is there is measured again
    python -m benchmarks.speed.run --device cuda --amp --models resnet50 --sizes 128x224
    python -m benchmarks.speed.run --parts                              only the page, from the rows that are there

Each network, size and layout is a process of its own, in which all forms are measured side by side. Where such a
process ends before it is done, each of its forms gets a process of its own, so that one of them cannot take the others
with it. A form that cannot be measured is a row with the reason.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch

from benchmarks.speed.page import page
from benchmarks.speed.parts import MODELS, PARTS, SIZES, Options
from benchmarks.speed.rows import LAYOUTS, Job, Row, append, command, key, machine, read, tidy
from benchmarks.speed.variants import FORMS
from qbench.export.files import write_text


def jobs(parts: list[str], options: Options) -> list[Job]:
    """Everything that is asked for."""
    return [
        replace(job, device=options.device, threads=options.threads, rounds=options.rounds)
        for part in parts
        if options.device in PARTS[part].devices
        for job in PARTS[part].jobs(options)
    ]


def missing(job: Job, known: dict[tuple[object, ...], Row], again: bool) -> Job:
    """The job with the forms that are not known yet."""
    return job.of(*(form for form in job.forms if again or key(job.row(form)) not in known))


def measured(job: Job, memory_gib: int, hours: float) -> Iterator[Row]:
    """The rows of a job: from one process, or from one a form where the part asks for it or that process failed."""
    left, end = job.forms, ""
    if len(left) == 1 or not PARTS[job.part].alone:
        rows, end = _process(job, memory_gib, hours)
        yield from rows
        found = {row["form"] for row in rows}
        left = tuple(form for form in left if form not in found)
    if len(job.forms) == 1:
        about = {**machine(job.device), "command": command(job.setting())}
        yield from ({**job.row(form, refused=end), **about} for form in left)
        return
    for form in left:
        yield from measured(job.of(form), memory_gib, hours)


def _process(job: Job, memory_gib: int, hours: float) -> tuple[list[Row], str]:
    """What one process wrote, and how it ended."""
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_DATA, (memory_gib << 30, memory_gib << 30))
    with tempfile.TemporaryDirectory(prefix="qbench-bench-") as name:
        given, out = Path(name) / "job.json", Path(name) / "rows.jsonl"
        given.write_text(json.dumps(asdict(job)), encoding="utf-8")
        try:
            done = subprocess.run(
                [sys.executable, "-W", "ignore", "-m", "benchmarks.speed.parts", str(given), str(out)],
                env={**os.environ, "OMP_NUM_THREADS": str(job.threads)},
                preexec_fn=limit if job.device == "cpu" else None,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=hours * 3600,
                check=False,
            )
            end = f"the process ended with {done.returncode}: {' '.join(done.stderr.strip().splitlines()[-1:])[:200]}"
        except subprocess.TimeoutExpired:
            end = f"not done after {hours:g} h"
        return list(read(out).values()), end


def main() -> None:
    """Measure what is missing, then write the page."""
    options = _parsed()
    # A run that is ended takes the process under way with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    wanted = Options(
        models=tuple(options.models),
        sizes=tuple(options.sizes),
        layouts=tuple(options.layouts),
        forms=tuple(options.forms),
        amp=options.amp,
        device=options.device,
        threads=options.threads or torch.get_num_threads(),
        rounds=options.rounds,
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for asked in jobs(options.parts, wanted):
        job = missing(asked, read(options.out), options.again)
        if not job.forms:
            continue
        started = time.perf_counter()
        rows = []
        for row in measured(job, options.memory_gib, options.hours):
            append(options.out, [row])
            rows.append(row)
        refused = sum("refused" in row for row in rows)
        what = " ".join(filter(None, (job.part, job.model, f"{job.batch}x{job.px}" if job.batch else "", job.layout)))
        print(f"{what}: {len(rows)} forms, {refused} refused, {time.perf_counter() - started:.0f} s", flush=True)
    rows = tidy(options.out)
    print(f"written: {options.out}, {write_text(options.page, page(rows))}")


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--sizes", nargs="+", default=SIZES, metavar="BATCHxPX")
    parser.add_argument("--layouts", nargs="+", choices=list(LAYOUTS), default=list(LAYOUTS))
    parser.add_argument("--forms", nargs="+", choices=list(FORMS), default=list(FORMS), help="of the training step")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--amp", action="store_true")
    parser.add_argument("--threads", type=int, default=None, help="default: as many as PyTorch takes")
    parser.add_argument("--again", action="store_true", help="measure also what is there")
    parser.add_argument("--memory-gib", type=int, default=20, help="at most, for one process")
    parser.add_argument("--hours", type=float, default=2.0, help="at most, for one process")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks.jsonl"))
    parser.add_argument("--page", type=Path, default=Path("docs/benchmarks.md"))
    return parser.parse_args()


if __name__ == "__main__":
    main()

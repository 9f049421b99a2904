"""Every network of the zoo, one process each; goes on where it stopped.

    python -m benchmarks.zoo.run                        all of them, and docs/zoo.md from what is there
    python -m benchmarks.zoo.run --models resnet18      some of them
    python -m benchmarks.zoo.run --again failed         those again that did not go through

A row is appended to the output file when it is there. A process that needs more memory than it may have, or more time,
is ended, and that is its row.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.zoo.networks import names
from benchmarks.zoo.table import page
from qbench.export.files import write_text


def measured(name: str, memory_gib: int, hours: float) -> dict[str, Any]:
    """The row of one network, from a process of its own with at most so much memory and time."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="qbench-zoo-") as folder:
        out = Path(folder) / "row.json"
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.zoo.measure", name, str(out)]
        limit = functools.partial(resource.setrlimit, resource.RLIMIT_DATA, (memory_gib << 30, memory_gib << 30))
        # Its workers' files go with it, if it is ended before it can remove them.
        environment = {**os.environ, "TMPDIR": folder}
        try:
            done = subprocess.run(
                command,
                preexec_fn=limit,
                env=environment,
                capture_output=True,
                text=True,
                timeout=hours * 3600,
                check=False,
            )
            end = f"process ended with {done.returncode}: {done.stderr.strip().splitlines()[-1:]}"
        except subprocess.TimeoutExpired:
            end = f"not done after {hours} h"
        row = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {"model": name, "failed": end}
    return {**row, "total_seconds": round(time.perf_counter() - started, 1)}


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The newest row of each network."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {row["model"]: row for row in map(json.loads, lines)}


def main() -> None:
    """Measure what is missing, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=None, help="default: all")
    parser.add_argument("--again", choices=["failed", "all"], default=None, help="measure these again")
    parser.add_argument("--memory-gib", type=int, default=20)
    parser.add_argument("--hours", type=float, default=2.0, help="at most, for one network")
    parser.add_argument("--out", type=Path, default=Path("docs/zoo.jsonl"))
    parser.add_argument("--page", type=Path, default=Path("docs/zoo.md"))
    options = parser.parse_args()
    wanted = options.models or names()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for name in wanted:
        known = read(options.out).get(name)
        if known and not (options.again == "all" or (options.again == "failed" and "failed" in known)):
            continue
        row = measured(name, options.memory_gib, options.hours)
        with options.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{name}: {row.get('failed', 'went through')}, {row['total_seconds']} s", flush=True)
    rows = read(options.out)
    # One line a network, in the order of the zoo.
    kept = [rows[name] for name in names() if name in rows]
    write_text(options.out, "".join(json.dumps(row) + "\n" for row in kept))
    print(f"written: {options.out}, {write_text(options.page, page(kept, len(names())))}")


if __name__ == "__main__":
    main()

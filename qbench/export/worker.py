"""The fresh process of `qbench.export.runtimes`: `python -m qbench.export.worker FOLDER`.

FOLDER holds `job.json` ({"kind", "file", "threads"}) and `inputs.npz`; `outputs.npz` and `result.json` are written.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from qbench.errors import QBenchError
from qbench.export.runtimes import RUNNERS, cpu_features, load_batches, save_batches


def work(folder: Path) -> None:
    """Run the job of a folder."""
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    run, version = RUNNERS[job["kind"]]
    outputs = run(Path(job["file"]), load_batches(folder / "inputs.npz"), job["threads"])
    save_batches(folder / "outputs.npz", outputs)
    result = {"version": version(), "cpu": cpu_features()}
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")


def main() -> int:
    """Run the job of the folder on the command line; an error of qbench ends in one line, others in a traceback."""
    try:
        work(Path(sys.argv[1]))
    except QBenchError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

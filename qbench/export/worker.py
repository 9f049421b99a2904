"""The fresh process of `qbench.export.processes`: `python -m qbench.export.worker FOLDER`.

FOLDER holds `job.json` ({"kind", "files", "threads"}). Every line on stdin is the index of a file to run on
`inputs.npz`; `outputs.npz` is written, and one line of JSON answers, as one does when all files are open.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import TextIO

from qbench.errors import QBenchError
from qbench.export.processes import load_batch, save_batch
from qbench.export.runtimes import OPENERS, cpu_features


def work(folder: Path, orders: TextIO, answers: TextIO) -> None:
    """Open the files of a folder's job, then run them as told until there are no more orders."""
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    opener, version = OPENERS[job["kind"]]
    sessions = [opener(Path(file), job["threads"]) for file in job["files"]]
    _answer(answers, version=version(), cpu=cpu_features(), settings=[session.settings for session in sessions])
    for order in orders:
        batch = load_batch(folder / "inputs.npz")
        started = time.perf_counter()
        outputs = sessions[int(order)].run(batch)
        seconds = time.perf_counter() - started
        save_batch(folder / "outputs.npz", outputs)
        _answer(answers, seconds=seconds)


def _answer(answers: TextIO, **fields: object) -> None:
    print(json.dumps(fields), file=answers, flush=True)


def main() -> int:
    """Do the job of the folder on the command line; an error of qbench ends in one line, others in a traceback."""
    # Libraries print to stdout as they like: the answers get a stream of their own, and theirs goes to stderr.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        work(Path(sys.argv[1]), sys.stdin, answers)
    except QBenchError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

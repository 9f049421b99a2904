"""How many codes of each operation differ between this library's integer arithmetic and the runtime itself.

    python -m benchmarks.exactness.ops --targets onnxruntime xnnpack --codes 1000000 --out runs/ops.json

Prints op × target × (codes, different) and writes the same as JSON. Each target has a module beside this one that
exposes

    TARGET: str                 the target's name
    OPS: tuple[str, ...]        what it can sweep
    sweep(op, codes, seed)      -> OpResult over at least `codes` codes, from the cases of `cases.py`

and that imports its runtime when it is imported: a target whose runtime is not installed is skipped, with the reason.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from benchmarks.exactness.results import OpResult, Tally, table
from qbench.export.files import write_text

__all__ = ["MODULES", "OpResult", "Tally", "main", "sweeps"]

#: Target -> the module that sweeps it.
MODULES = {
    "onnxruntime": "benchmarks.exactness.onnxruntime_ops",
    "xnnpack": "benchmarks.exactness.xnnpack_ops",
    "tosa": "benchmarks.exactness.tosa_ops",
}


def load(target: str) -> ModuleType | str:
    """The module that sweeps a target, or why there is none here."""
    try:
        return importlib.import_module(MODULES[target])
    except ImportError as error:
        return f"skipped: {error}"


def sweeps(targets: list[str], ops: list[str], codes: int, seed: int) -> Iterator[dict[str, Any]]:
    """One row of plain values an op and target, as they are found; a skipped target is one row with a reason."""
    for target in targets:
        module = load(target)
        if isinstance(module, str):
            yield {"target": target, "skipped": module}
            continue
        for op in module.OPS:
            if ops and op not in ops:
                continue
            started = time.perf_counter()
            found: OpResult = module.sweep(op, codes, seed)
            yield {**dataclasses.asdict(found), "seconds": round(time.perf_counter() - started, 1)}


def main() -> None:
    """Sweep what the command line asks for, print the table and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=list(MODULES), default=list(MODULES))
    parser.add_argument("--ops", nargs="+", default=[], help="default: all that the target has")
    parser.add_argument("--codes", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/ops.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows, results = [], []
    for row in sweeps(options.targets, options.ops, options.codes, options.seed):
        rows.append(row)
        if "skipped" in row:
            print(f"{row['target']}: {row['skipped']}", flush=True)
            continue
        results.append(OpResult(**{field.name: row[field.name] for field in dataclasses.fields(OpResult)}))
        counts = f"{row['different']} of {row['compared']:,}"
        print(f"{row['target']} {row['op']}: {counts} in {row['seconds']} s", flush=True)
    print(f"\n{table(results)}")
    found = {"seed": options.seed, "torch": torch.__version__, "machine": platform.machine(), "rows": rows}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    print(f"\nwritten to {write_text(options.out, json.dumps(found, indent=2) + chr(10))}")


if __name__ == "__main__":
    main()

"""What is measured together, where its rows are kept, and on which machine they were made.

A `Job` is what one process measures: a part of the suite, on a network, a size and a layout, in some forms. A row is
what it finds for one form. Rows are lines of JSON; of rows that answer the same question the newest counts.
"""

from __future__ import annotations

import json
import platform
import shlex
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from qbench.export.files import write_text
from qbench.export.runtimes import cpu_features

Row = dict[str, Any]
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Job:
    """What one process measures.

    Attributes:
        part: A name of `benchmarks.speed.parts.PARTS`.
        forms: What is measured; one row each.
        model: A torchvision classifier; empty where the part has none.
        batch: Images at once.
        px: Their height and width.
        layout: A name of `LAYOUTS`.
        amp: Whether forwards run under autocast.
        device: `"cpu"` or `"cuda"`.
        threads: Of PyTorch and of the runtimes.
        rounds: How often each form is timed.
    """

    part: str
    forms: tuple[str, ...] = ()
    model: str = ""
    batch: int = 0
    px: int = 0
    layout: str = ""
    amp: bool = False
    device: str = "cpu"
    threads: int = 1
    rounds: int = 11

    def setting(self) -> Row:
        """What a row says about the job, beside its form."""
        return {key: value for key, value in asdict(self).items() if key != "forms"}

    def row(self, form: str, **found: Any) -> Row:
        """What was found for a form."""
        return {**self.setting(), "form": form, **found}

    def of(self, *forms: str) -> Job:
        """The same for other forms."""
        return replace(self, forms=forms)


def command(row: Row) -> str:
    """The command that measures a row again, with those of the same part, and of the same network where it has one."""
    words = ["python", "-m", "benchmarks.speed.run", "--again", "--parts", row["part"]]
    if row["model"]:
        words += ["--models", row["model"]]
    if row["layout"]:
        words += ["--sizes", f"{row['batch']}x{row['px']}", "--layouts", row["layout"]]
    words += ["--device", row["device"], "--threads", str(row["threads"]), "--rounds", str(row["rounds"])]
    return shlex.join([*words, *(["--amp"] if row["amp"] else [])])


def key(row: Row) -> tuple[Any, ...]:
    """The question that a row answers; how often it was asked does not change it."""
    return tuple(row[name] for name in ("part", "model", "batch", "px", "layout", "amp", "device", "threads", "form"))


def read(path: Path) -> dict[tuple[Any, ...], Row]:
    """The newest row of each question."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {key(row): row for row in map(json.loads, lines)}


def append(path: Path, rows: Iterable[Row]) -> None:
    """Add rows to a file."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def tidy(path: Path) -> list[Row]:
    """Keep one row of each question, in the order in which they were first asked."""
    rows = list(read(path).values())
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    return rows


def machine(device: str) -> Row:
    """What figures are made on: the processor, or the GPU with its host's processor, and the version of PyTorch."""
    host = f"{_processor()} ({', '.join(cpu_features())})"
    name = f"{torch.cuda.get_device_name()}, {host}" if device == "cuda" else host
    return {"machine": name, "torch": torch.__version__, "python": platform.python_version()}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())

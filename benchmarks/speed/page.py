"""The rows of the suite as a page: a table a part, figures beside their targets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from benchmarks.speed.rows import Row, command
from benchmarks.speed.targets import checks

_HEAD = """# Benchmarks

```
make bench        # python -m benchmarks.speed.run: one process a network, size and layout; goes on where it stopped
```

Every network has random weights and ReLU in place of ReLU6, in the float form as in all others. Times are medians;
ratios are taken round by round, all forms taking turns in one process, and *quartiles* are those of the rounds. What
could not be measured is named with the reason. Whether a target is met is computed from the figure beside it.
"""


class _Table:
    """One part as a table.

    Args:
        title: Its heading.
        text: What the columns are.
        columns: Heading of each column and the cell of a row.
    """

    def __init__(self, title: str, text: str, columns: dict[str, Callable[[Row, list[Row]], str]]) -> None:
        self.title, self.text, self.columns = title, text, columns

    def lines(self, rows: list[Row]) -> Iterator[str]:
        """The part as Markdown."""
        yield f"\n### {self.title}\n"
        yield f"{self.text}\n"
        yield f"| {' | '.join(self.columns)} | target |"
        yield f"| {' | '.join(['---'] * (len(self.columns) + 1))} |"
        for row in rows:
            cells = [_safe(cell, row, rows) for cell in self.columns.values()]
            yield f"| {' | '.join(cells)} | {_targets(row, rows)} |"
        commands = dict.fromkeys(command({**row, "model": "", "layout": ""}) for row in rows)
        yield "\n```\n" + "\n".join(commands) + "\n```"


def page(rows: list[Row]) -> str:
    """The page as Markdown, a section for each machine."""
    lines = [_HEAD]
    for about in dict.fromkeys(map(_machine, rows)):
        here = [row for row in rows if _machine(row) == about]
        lines.append(f"\n## {about}\n")
        lines.append(_summary(here))
        for part, table in _TABLES.items():
            own = [row for row in here if row["part"] == part]
            if own:
                lines += table.lines(own)
    return "\n".join(lines).replace("\n\n\n", "\n\n") + "\n"


def _machine(row: Row) -> str:
    return f"{row['machine']}, {row['threads']} threads, PyTorch {row['torch']}"


def _summary(rows: list[Row]) -> str:
    found = [check for row in rows for check in checks(row, _same_part(row, rows))]
    return f"{sum(check.met for check in found)} of {len(found)} targets are met."


def _same_part(row: Row, rows: list[Row]) -> list[Row]:
    """The rows of the same part, network, size and layout."""
    names = ("part", "model", "batch", "px", "layout", "amp", "device")
    return [other for other in rows if all(other[name] == row[name] for name in names)]


def _targets(row: Row, rows: list[Row]) -> str:
    if "refused" in row:
        return f"not measured: {row['refused']}".replace("|", "\\|")
    return "; ".join(f"{check.what} {check.value:.2f}, {check}" for check in checks(row, _same_part(row, rows)))


def _safe(cell: Callable[[Row, list[Row]], str], row: Row, rows: list[Row]) -> str:
    """A cell; empty where the row has no such figure."""
    try:
        return cell(row, rows)
    except KeyError:
        return "–"


def _peak_over_float(row: Row, rows: list[Row]) -> str:
    base = next((other for other in _same_part(row, rows) if other["form"] == "float"), {})
    return f"{row['above_mib'] / base['above_mib']:.2f}"


def _milliseconds(name: str) -> Callable[[Row, list[Row]], str]:
    return lambda row, rows: f"{1e3 * row['seconds'][name]:.0f}"


def _speed(base: str) -> Callable[[Row, list[Row]], str]:
    return lambda row, rows: f"{row['speed'][base]:.2f} ×"


def _left(row: Row, rows: list[Row]) -> str:
    counts = Counter(node.split()[0] for node in row["float_nodes"])
    return _list(f"{name} ×{count}" for name, count in counts.items()) or "none"


def _list(values: Iterable[Any]) -> str:
    return ", ".join(map(str, values))


_SETTING: dict[str, Callable[[Row, list[Row]], str]] = {
    "network": lambda row, rows: row["model"],
    "batch × px": lambda row, rows: f"{row['batch']} × {row['px']}" + (", AMP" if row["amp"] else ""),
    "layout": lambda row, rows: row["layout"],
}
_FORM: dict[str, Callable[[Row, list[Row]], str]] = {"form": lambda row, rows: row["form"]}

_TABLES = {
    "step": _Table(
        "Training step",
        "Forward, backward and SGD. *Saved*: bytes of distinct storages that autograd keeps for backward, without "
        "parameters, buffers and images. *Start*: making the form and two steps; compilers keep what they made for the "
        "next run. *Passes alone*: convolution, BatchNorm, and the operators that look for a range, round, and find "
        "where gradients pass, with constant grids: a bound for what `qbench plain` can reach.",
        {
            **_SETTING,
            **_FORM,
            "seconds": lambda row, rows: f"{row['seconds']:.3f}",
            "over float": lambda row, rows: f"{row['ratio']:.2f}",
            "quartiles": lambda row, rows: "{:.2f}–{:.2f}".format(*row["quartiles"]),
            "start, s": lambda row, rows: f"{row['start_seconds']:.1f}",
            "saved, MiB": lambda row, rows: f"{row['saved_mib']:.0f}",
            "saved over float": lambda row, rows: f"{row['saved_ratio']:.2f}",
        },
    ),
    "peak": _Table(
        "Peak memory of a training step",
        "Each form in a process of its own. *Peak*: the largest resident memory of the process during a step (on a GPU "
        "that of its tensors); *network and step*: without what was resident before the network was made.",
        {
            **_SETTING,
            **_FORM,
            "peak, MiB": lambda row, rows: f"{row['peak_mib']:.0f}",
            "network and step, MiB": lambda row, rows: f"{row['above_mib']:.0f}",
            "over float": _peak_over_float,
        },
    ),
    "import": _Table(
        "Import",
        "Median of fresh processes, from compiled files.",
        {
            "import torch, numpy, s": lambda row, rows: f"{row['torch_seconds']:.2f}",
            "import qbench, s": lambda row, rows: f"{row['seconds']:.2f}",
        },
    ),
    "flow": _Table(
        "From the float network to its integer program",
        "Milliseconds of the first call in a process, median of processes.",
        {
            "network": _SETTING["network"],
            **{name: _milliseconds(name) for name in ("fuse", "prepare_qat", "convert", "quantize_bias", "fuse_qdq")},
        },
    ),
    "slope": _Table(
        "Passes on chains of convolutions",
        "Processor seconds by the number of convolutions; slope 1 is linear.",
        {
            "convolutions": lambda row, rows: _list(chain["layers"] for chain in row["seconds"]),
            **{
                name: lambda row, rows, name=name: _list(f"{chain[name]:.1f}" for chain in row["seconds"])  # type: ignore[misc]
                for name in ("remove_redundant_qdq", "quantize_bias", "fuse_qdq")
            },
        },
    ),
    "deployed": _Table(
        "Deployed files",
        "One image. *In float*: operators that the runtime computes in float. *Different*: outputs that differ from "
        "those of exact kernels, on this processor. The fastest ONNX file of a network without such has a target: "
        "codes of uint8 weights are exact on every processor, those of int8 weights faster, and exact with VNNI.",
        {
            "network": _SETTING["network"],
            **_FORM,
            "ms": lambda row, rows: f"{1e3 * row['seconds']:.1f}",
            "speed over float eager": _speed("float eager"),
            "over float ONNX Runtime": _speed("float ONNX Runtime"),
            "in float": _left,
            "different": lambda row, rows: f"{row['different']:,} of {row['compared']:,}",
            "export, s": lambda row, rows: f"{row['export_seconds']:.1f}",
        },
    ),
    "kernels": _Table(
        "Exact integer operators in PyTorch",
        "ResNet-18, one image, milliseconds; `python benchmarks/integer_kernels.py` prints the layers one by one.",
        {
            **_FORM,
            "float": lambda row, rows: f"{row['float_ms']:.1f}",
            "integer": lambda row, rows: f"{row['integer_ms']:.1f}",
            "over float": lambda row, rows: f"{row['ratio']:.2f}",
        },
    ),
    "streaming": _Table(
        "Memory of verification",
        "`qbench.verify` of ResNet-18 on images of a folder: most memory of its process, and of any that it starts.",
        {
            "images": lambda row, rows: row["form"],
            "peak, MiB": lambda row, rows: f"{row['peak_mib']:.0f}",
            "its processes, MiB": lambda row, rows: f"{row['processes_mib']:.0f}",
            "seconds": lambda row, rows: f"{row['seconds']:.0f}",
        },
    ),
    "loading": _Table(
        "Loading images",
        "ResNet-18, QAT on JPEG files of 500 × 375. *Loaded*: images a second that are read where nothing is trained; "
        "*trained*: where no image is waited for; *waiting*: share of the time of a pass.",
        {
            "readers": lambda row, rows: row["form"],
            "device": lambda row, rows: row["device"],
            "loaded": lambda row, rows: f"{row['rates']['loaded']:.0f}",
            "trained": lambda row, rows: f"{row['rates']['trained']:.0f}",
            "waiting": lambda row, rows: f"{100 * row['share']:.1f} %",
            "profile of an image": lambda row, rows: _list(f"{k} {100 * v:.0f} %" for k, v in row["stages"].items()),
        },
    ),
}

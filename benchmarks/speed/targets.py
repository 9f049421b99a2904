"""What the suite is to show, as limits; whether a figure meets its limit is computed from the rows.

    a step            time over the float step of the same round; its saved bytes over those of float
    around it         seconds of the first call; slope; memory over that of the fewest images
    deployed          operators in float; speed = time of float eager / time of the file
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.speed.rows import Row

_STEP_NETWORKS = ("resnet18", "mobilenet_v2")
_MEMORY_NETWORKS = ("resnet18", "resnet50", "mobilenet_v2")
FAST = "qbench fast"
#: (form, layout, px) -> the most that a step may take over the float step.
_STEPS = {
    ("qbench plain", "contiguous", 224): 1.15,
    ("qbench plain", "channels_last", 224): 1.30,
    ("qbench plain", "contiguous", 128): 1.20,
    ("qbench plain", "channels_last", 128): 1.35,
    (FAST, "contiguous", 224): 1.00,
    (FAST, "channels_last", 224): 1.00,
    (FAST, "contiguous", 128): 1.10,
    (FAST, "channels_last", 128): 1.10,
}
_ON_GPU = {"qbench plain": 1.25, FAST: 1.00}
_COMPILED_OVER_COMPILED = 1.05
_SAVED = {"qbench plain": 1.2, "qbench low memory": 0.75}
_LOW_MEMORY_OVER_FAST = 1.10
_LEARNED, _WHERE_PLAIN = 1.25, 1.10


@dataclass(frozen=True)
class Check:
    """A figure and its limit.

    Attributes:
        what: What the figure is.
        value: The figure.
        limit: At most so much, or at least.
        at_least: Whether the limit is a lower one.
        unit: Behind the limit.
    """

    what: str
    value: float
    limit: float
    at_least: bool = False
    unit: str = ""

    @property
    def met(self) -> bool:
        """Whether the figure is on the right side of its limit."""
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def __str__(self) -> str:
        limit = f"{'≥' if self.at_least else '≤'} {self.limit:g}{self.unit}"
        return f"{limit}: {'met' if self.met else '**not met**'}"


def checks(row: Row, others: list[Row]) -> Iterator[Check]:
    """The limits that a row has; `others` are the rows of the same part, for limits that depend on another form."""
    if "refused" in row:
        return
    if row["part"] == "step":
        yield from _step_checks(row, others)
    elif row["part"] == "import":
        yield Check("import qbench, beyond torch", row["seconds"], 0.3, unit=" s")
    elif row["part"] == "flow" and row["model"] == "resnet50":
        seconds = row["seconds"]
        yield Check("fuse + prepare", seconds["fuse"] + seconds["prepare_qat"], 2, unit=" s")
        passes = seconds["convert"] + seconds["quantize_bias"] + seconds["fuse_qdq"]
        yield Check("convert + bias pass + Q/DQ fusion", passes, 5, unit=" s")
    elif row["part"] == "slope":
        yield from (Check(f"slope of {name}", slope, 1.1) for name, slope in row["slope"].items())
    elif row["part"] == "deployed" and "float_nodes" in row:
        yield Check("float operators", len(row["float_nodes"]), 0)
        if row is max(filter(_is_exact_onnx, others), key=_speed, default=None):
            yield Check("speed over float eager", _speed(row), 3, at_least=True, unit=" ×")
    elif row["part"] == "streaming":
        least = min(int(other["form"]) for other in others if "refused" not in other)
        first = next(other for other in others if other["form"] == str(least))
        if row is not first:
            own, base = (max(r["peak_mib"], r["processes_mib"]) for r in (row, first))
            yield Check(f"memory over that of {least} images", own / base, 1.05)
    elif row["part"] == "loading":
        rates = row["rates"]
        yield Check("images loaded for each that is trained", rates["loaded"] / rates["trained"], 1, at_least=True)


def _step_checks(row: Row, others: list[Row]) -> Iterator[Check]:
    form, over = row["form"], row["over"]
    gpu = row["device"] == "cuda"
    limit = None
    if gpu and row["model"] == "resnet50" and row["batch"] == 128:
        limit = _ON_GPU.get(form)
    elif not gpu and row["model"] in _STEP_NETWORKS and not row["amp"]:
        limit = _STEPS.get((form, row["layout"], row["px"]))
    if form == "qbench lsq" and any(o["form"] in ("qbench plain", FAST) and _ratio(o) <= _WHERE_PLAIN for o in others):
        limit = _LEARNED
    if limit is not None:
        yield Check("step over float", row["ratio"], limit)
    if form == "qbench compiled" and "float compiled" in over:
        yield Check("step over compiled float", over["float compiled"][1], _COMPILED_OVER_COMPILED)
    if form == "qbench low memory" and FAST in over:
        yield Check("step over the fast path's", over[FAST][1], _LOW_MEMORY_OVER_FAST)
    if form in _SAVED and "saved_ratio" in row and (form == "qbench plain" or row["model"] in _MEMORY_NETWORKS):
        yield Check("saved over float", row["saved_ratio"], _SAVED[form])


def _is_exact_onnx(row: Row) -> bool:
    """Whether a row is of an integer file that ONNX Runtime runs exactly: what saturates is fast, and no result."""
    integer = "float_nodes" in row and row["form"] != "int8 ExecuTorch" and "float eager" in row.get("speed", {})
    return integer and not row.get("different")


def _speed(row: Row) -> float:
    return float(row["speed"]["float eager"])


def _ratio(row: Row) -> float:
    return float(row.get("ratio", float("inf")))

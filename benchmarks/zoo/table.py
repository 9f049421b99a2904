"""The rows of the zoo as a page."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

_HEAD = """# Every torchvision model, the whole way

```
make zoo        # python -m benchmarks.zoo.run: one process a network, goes on where it stopped
```

Each network has random weights and its own input size. It is fused, prepared, trained for two steps on real images,
converted, its biases made int32, exported and run by ONNX Runtime in a fresh process. *Fused*: BatchNorms that a layer
computes (the others are quantized layers of their own). *Linked*: layers with a weight that read codes from a quantizer
before them; the first layer never does. *Values*: outputs that differ between the QAT model in eval and the Q/DQ
program. *Codes*: of the outputs and every activation that differ between the integer program and ONNX Runtime.
*Seconds* are those of the clock, whatever else the machine did; *GiB* is the largest memory of a process.
"""
_COLUMNS = (
    *("network", "px", "M parameters", "fused", "quantized", "linked"),
    *("values", "codes", "seconds", "GiB", "gaps"),
)


def page(rows: list[dict[str, Any]], networks: int) -> str:
    """The page as Markdown."""
    through = sum("failed" not in row for row in rows)
    lines = [_HEAD, f"{through} of {networks} networks go through ({len(rows)} measured).\n"]
    lines += [f"| {' | '.join(_COLUMNS)} |", f"| --- |{' --: |' * (len(_COLUMNS) - 2)} --- |"]
    lines += [f"| {' | '.join(_cells(row))} |" for row in rows]
    return "\n".join(lines) + "\n"


def _cells(row: dict[str, Any]) -> Iterable[str]:
    different, compared = row.get("different", {}), row.get("compared", {})

    def counted(key: str) -> str:
        if key not in compared:
            return "–"
        return f"{'**0**' if not different[key] else format(different[key], ',')} of {compared[key]:,}"

    return (
        row["model"],
        str(row.get("image_size", "")),
        f"{row['parameters'] / 1e6:.1f}" if "parameters" in row else "",
        _share(row, "folded", "batch_norms"),
        _share(row, "quantized_layers", "layers"),
        _share(row, "linked_layers", "quantized_layers"),
        counted("eval_vs_program"),
        counted("integer_vs_onnxruntime"),
        f"{row['total_seconds']:.0f}",
        f"{row['peak_mib'] / 1024:.1f}" if "peak_mib" in row else "",
        "; ".join(_gaps(row)).replace("|", "\\|"),
    )


def _share(row: dict[str, Any], part: str, whole: str) -> str:
    if not row.get(whole):
        return "–"
    return f"{100 * row[part] / row[whole]:.1f} %"


def _gaps(row: dict[str, Any]) -> Iterable[str]:
    """Why a network is not quantized, or not exact, in every part."""
    if "failed" in row:
        yield f"**failed** at {row['failed']}"
    yield from (f"{reason} (×{count})" for reason, count in row.get("left_in_float", {}).items())
    if row.get("computed_in_float"):
        listed = ", ".join(f"{name} ×{count}" for name, count in row["computed_in_float"].items())
        yield f"between modules, in float: {listed}"
    if row.get("unreached"):
        yield f"{row['unreached']} QAT modules that no forward reached"
    inexact = sorted({reason for reasons in row.get("inexact", {}).values() for reason in reasons})
    if inexact and row.get("different", {}).get("integer_vs_onnxruntime"):
        yield f"codes differ behind {', '.join(inexact)}"
    if row.get("attention_replaced"):
        yield "attention is written out first"

"""How results look as plain text: data in, one string out; nothing here prints, colours or measures.

Tables are aligned, stand in `WIDTH` columns and use no character that a plain terminal lacks.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

from qbench.report.data import CodeSpread, Comparison, LayerComparison, RunSummary, Verification

WIDTH = 80

COMPARISON_LABELS: Mapping[str, str] = {
    "parameters": "trained codes vs converted codes",
    "eval_vs_program": "QAT eval vs Q/DQ program",
    "program_vs_onnxruntime": "Q/DQ program vs ONNX Runtime",
    "program_vs_executorch": "Q/DQ program vs ExecuTorch",
    "integer_vs_onnxruntime": "integer program vs ONNX Runtime",
    "integer_vs_executorch": "integer program vs ExecuTorch",
}
RUNTIME_LABELS: Mapping[str, str] = {"onnxruntime": "ONNX Runtime", "executorch": "ExecuTorch"}
_ROLES = ("weight", "activation", "bias")
STEP_LABELS: Mapping[str, str] = {
    "float": "train float",
    "qat": "fine-tune QAT",
    "convert": "convert",
    "export": "export",
    "verify": "verify",
    "report": "report",
    "score": "score",
    "total": "total",
}


def columns(rows: Sequence[Sequence[str]], right: frozenset[int] = frozenset()) -> list[str]:
    """Align rows of equal length into lines, two spaces between columns.

    Args:
        rows: Cells; each row as long as the first.
        right: Indices of the columns that are aligned to the right (numbers).
    """
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if index in right else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def bullets(notes: Sequence[str], width: int = WIDTH) -> list[str]:
    """Notes as wrapped lines, each note starting with a dash."""
    return [line for note in notes for line in textwrap.wrap(note, width, initial_indent="- ", subsequent_indent="  ")]


def percent(share: float, digits: int = 2) -> str:
    """A share in [0, 1] as a percentage; a share above 0 never reads as zero."""
    text = f"{100 * share:.{digits}f} %"
    if share > 0 and float(text[:-2]) == 0:
        return f"<{10.0**-digits:.{digits}f} %"
    return text


def duration(seconds: float) -> str:
    """Wall-clock time that a person reads: `0.4 s`, `37 s`, `2 min 05 s`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60:02d} s"


def size(n_bytes: int) -> str:
    """A file's size in decimal units: `312 B`, `11.4 MB`."""
    amount = float(n_bytes)
    for unit in ("B", "kB", "MB"):
        if amount < 999.5:
            return f"{amount:.0f} B" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} GB"


def comparison_cells(label: str, comparison: Comparison) -> tuple[str, str, str, str]:
    """Label, codes compared, codes different, and a verdict in words."""
    if comparison.exact:
        verdict = "exact"
    elif not comparison.compared:
        verdict = "nothing compared"
    else:
        verdict = f"{percent(comparison.share, 3)}, by {comparison.largest_step} at most"
    return label, f"{comparison.compared:,}", f"{comparison.different:,}", verdict


def comparison_line(comparison: Comparison) -> str:
    """One comparison as a sentence: `parameters: 0 of 11,689,512 differ (exact)`."""
    label, compared, different, verdict = comparison_cells(comparison.name, comparison)
    return f"{label}: {different} of {compared} differ ({verdict})"


def comparison_table(comparisons: Mapping[str, Comparison]) -> list[str]:
    """One row a comparison, by the keys of `Verification.comparisons`."""
    header = ("what is compared", "codes", "different", "")
    rows = [comparison_cells(_label(key), value) for key, value in comparisons.items()]
    return columns([header, *rows], right=frozenset({1, 2}))


def spread_line(spread: Sequence[CodeSpread]) -> str:
    """The least varied and the most saturated tensor of the ones looked at."""
    least = min(spread, key=lambda s: s.distinct)
    worst = max(spread, key=lambda s: s.saturated_share)
    return (
        f"codes of {len(spread)} tensors: at least {least.distinct} distinct ({least.name}), "
        f"at most {percent(worst.saturated_share)} saturated ({worst.name})"
    )


def verification_table(verification: Verification) -> str:
    """The comparisons as a table, then the layers that differ and why, the spread of the codes and the notes."""
    differing = [comparison_line(layer) for layer in verification.layers if layer.different]
    spread = [spread_line(verification.spread)] if verification.spread else []
    notes = [*differing, *doubt_notes(verification), *layer_notes(verification.by_layer), *spread, *verification.notes]
    lines = comparison_table(verification.comparisons) + bullets(notes)
    return "\n".join(lines)


def doubt_notes(verification: Verification) -> list[str]:
    """Why zeros are not called exact, in words; nothing where nothing is in doubt."""
    return [f"{_label(key)}: not called exact, {why}" for key, why in verification.doubts.items()]


def layer_notes(by_layer: Mapping[str, Sequence[LayerComparison]]) -> list[str]:
    """For every comparison of activations with a difference: where it starts, and which operators explain it."""
    notes = []
    for key, rows in by_layer.items():
        differing = [row for row in rows if row.different]
        if not differing:
            continue
        first = differing[0]
        notes.append(
            f"{_label(key)}: {len(differing)} of {len(rows)} tensors differ, first {first.name} "
            f"({first.different:,} of {first.compared:,}, by {first.largest_step} at most)"
        )
        if key.startswith("integer_vs_"):
            broken = [row.name for row in differing if not row.inexact]
            if broken:
                notes.append(f"{_label(key)}: a promised 0 is not 0 in {_some(broken)}")
            notes += dict.fromkeys(row.inexact for row in differing if row.inexact)
    return notes


def _label(key: str) -> str:
    return COMPARISON_LABELS.get(key, key)


def _some(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def run_table(summary: RunSummary, folder: str | None = None) -> str:
    """Everything that a run found, one block a question: how accurate, how exact, how long, which files.

    Args:
        summary: The run.
        folder: Where its files are; shown if given.
    """
    blocks = [
        _headline(summary),
        accuracy_table(summary),
        _indented(comparison_table(summary_comparisons(summary))),
        _indented(_time_line(summary.seconds)),
        _indented(_files_line(summary.files, folder)),
        bullets([*layer_notes(summary_layers(summary)), *summary.notes]),
    ]
    return "\n\n".join("\n".join(block) for block in blocks if block)


def accuracy_table(summary: RunSummary) -> list[str]:
    """Top-1 of every form of the model, and how far it is from the float model in points."""
    forms = {
        "float model": summary.float_top1,
        "QAT model": summary.qat_top1,
        **{RUNTIME_LABELS.get(name, name): top1 for name, top1 in summary.deployed_top1.items()},
    }
    rows = [(f"top-1 on {summary.held_out:,} held-out images", "", "to float")]
    for label, top1 in forms.items():
        distance = "" if label == "float model" else points(top1 - summary.float_top1)
        rows.append((label, percent(top1), distance))
    return _indented(columns(rows, right=frozenset({1, 2})))


def summary_comparisons(summary: RunSummary) -> dict[str, Comparison]:
    """The comparisons of a run, put together again from its summary."""
    return {
        key: Comparison(key, summary.compared.get(key, different), different, summary.largest_steps.get(key, 0))
        for key, different in summary.mismatches.items()
    }


def summary_layers(summary: RunSummary) -> dict[str, tuple[LayerComparison, ...]]:
    """The comparisons of activations of a run, put together again from its summary."""
    return {key: tuple(LayerComparison(**row) for row in rows) for key, rows in summary.by_layer.items()}


def points(share: float) -> str:
    """A difference of two shares in points of a percent, with its sign: `-0.22`, `0.00`, `+0.44`."""
    rounded = round(100 * share, 2)
    return f"{rounded:+.2f}" if rounded else "0.00"


def _headline(summary: RunSummary) -> list[str]:
    bits = summary.settings.get("widths", {})
    widths = f" (bits: {', '.join(f'{role} {bits[role]}' for role in _ROLES)})" if bits else ""
    return textwrap.wrap(f"{summary.model} on {summary.data} for {summary.target}{widths}", WIDTH)


def _time_line(seconds: Mapping[str, float]) -> list[str]:
    steps = [f"{STEP_LABELS.get(step, step)} {duration(value)}" for step, value in seconds.items() if step != "total"]
    return _listed(f"time {duration(seconds['total'])}:" if "total" in seconds else "time:", steps)


def _files_line(files: Mapping[str, int], folder: str | None) -> list[str]:
    """Where the files are, and how large each is; the summary and the report list the others, not themselves."""
    if not files:
        return []
    items = [f"{name} {size(n_bytes)}" for name, n_bytes in files.items()]
    if folder is None:
        return _listed("files:", items)
    return _listed(f"files in {folder}:", [*items, "summary.json", "report.html"])


def _listed(start: str, items: Sequence[str]) -> list[str]:
    """`start item, item, …`, wrapped between items and never within one."""
    glued = ", ".join(item.replace(" ", "\0") for item in items)
    lines = textwrap.wrap(
        f"{start} {glued}", WIDTH - 2, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False
    )
    return [line.replace("\0", " ") for line in lines]


def _indented(lines: Sequence[str]) -> list[str]:
    return [f"  {line}" for line in lines]

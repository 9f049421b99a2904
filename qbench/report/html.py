"""A run as one page: no script, no network, no other file. Data in, one string out.

The page follows the reader's choice of light or dark, and works from 320 px on: tables scroll inside their own frame,
plots are stretched, and every plotted number also stands in text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from qbench.report import plots, text
from qbench.report.data import LayerComparison, RunSummary
from qbench.report.figures import LayerFigures
from qbench.report.style import STYLE

Row = Sequence[str]  # cells, in HTML


def report_page(summary: RunSummary, figures: Sequence[LayerFigures] = (), *, notes: Sequence[str] = ()) -> str:
    """The whole page.

    Args:
        summary: The run.
        figures: Figures of its layers; without them their sections are left out.
        notes: What else to say, beside the summary's own notes.
    """
    title = f"{summary.model} on {summary.data} for {summary.target}"
    sections = [
        _accuracy(summary),
        _mismatches(summary),
        _by_layer(summary),
        *_figure_sections(figures),
        _about(summary, notes),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)} · qbench report</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<header><p class=kicker>qbench report</p><h1>{escape(title)}</h1>{_verdict(summary)}</header>\n"
        f"<main>\n{''.join(filter(None, sections))}</main>\n</body>\n</html>\n"
    )


def _verdict(summary: RunSummary) -> str:
    broken = [text.COMPARISON_LABELS.get(key, key) for key, kept in summary.promises.items() if not kept]
    if not summary.promises:
        return ""
    if broken:
        return f'<p class="verdict bad">✗ A promised zero is not zero: {escape(", ".join(broken))}</p>'
    return f'<p class="verdict good">✓ All {len(summary.promises)} promised zeros are zero</p>'


def _section(name: str, title: str, *parts: str) -> str:
    return f'<section aria-labelledby="{name}">\n<h2 id="{name}">{escape(title)}</h2>\n{"".join(parts)}\n</section>\n'


def _paragraph(words: str) -> str:
    return f"<p>{escape(words)}</p>"


def table(caption: str, header: Sequence[str], rows: Sequence[Row], *, plotted: frozenset[int] = frozenset()) -> str:
    """A table in a frame that scrolls; the first cell of a row is its name, `plotted` columns hold plots.

    On narrow pages the style sheet makes every row a block of labelled lines, which would take the meaning of a table
    from it: so the roles are said.

    Args:
        caption: What it shows, also the name of the frame.
        header: Words, not HTML.
        rows: HTML, as long as the header.
        plotted: Indices of columns.
    """
    kinds = ["plot" if i in plotted else "number" if i else "name" for i in range(len(header))]

    def cell(index: int, html: str) -> str:
        if index == 0:
            return f'<th scope="row" role="rowheader">{html}</th>'
        return f'<td role="cell" class="{kinds[index]}" data-label="{escape(header[index])}">{html}</td>'

    head = "".join(
        f'<th scope="col" role="columnheader" class="{kind}">{escape(name)}</th>'
        for kind, name in zip(kinds, header, strict=True)
    )
    body = "\n".join(f"<tr role=row>{''.join(cell(i, html) for i, html in enumerate(row))}</tr>" for row in rows)
    return (
        f'<div class="frame" role="region" tabindex="0" aria-label="{escape(caption)}"><table role="table">\n'
        f"<caption>{escape(caption)}</caption>\n<thead role=rowgroup><tr role=row>{head}</tr></thead>\n"
        f"<tbody role=rowgroup>\n{body}\n</tbody></table></div>\n"
    )


def _accuracy(summary: RunSummary) -> str:
    forms = {
        "float model": summary.float_top1,
        "QAT model": summary.qat_top1,
        **{text.RUNTIME_LABELS.get(name, name): top1 for name, top1 in summary.deployed_top1.items()},
    }
    rows = [
        (
            escape(name),
            plots.bar(top1, 1.0, f"{name}: {text.percent(top1)}"),
            text.percent(top1),
            "" if name == "float model" else text.points(top1 - summary.float_top1),
        )
        for name, top1 in forms.items()
    ]
    caption = f"Top-1 on {summary.held_out:,} held-out images"
    header = ("form", "0 to 100 %", "top-1", "points to float")
    return _section("accuracy", "Accuracy", table(caption, header, rows, plotted=frozenset({1})))


def _mismatches(summary: RunSummary) -> str:
    rows = []
    for key, comparison in text.summary_comparisons(summary).items():
        label, compared, different, verdict = text.comparison_cells(text.COMPARISON_LABELS.get(key, key), comparison)
        promise = "none" if key not in summary.promises else "kept ✓" if summary.promises[key] else "broken ✗"
        if comparison.different and summary.promises.get(key):
            promise = "kept where promised ✓"  # What differs depends on operators that the target computes in float.
        rows.append((escape(label), compared, different, escape(verdict), promise))
    cpu = f"CPU features: {', '.join(summary.cpu)}. " if summary.cpu else ""
    words = (
        f"{cpu}A mismatch is a code that differs between two forms of the model on the same images. Zero is promised "
        "between trained and converted parameters, between QAT eval and the Q/DQ program, and between the integer "
        "program and the runtime of its target, outputs and codes inside."
    )
    header = ("what is compared", "codes", "different", "verdict", "promised 0")
    return _section("mismatches", "Mismatches", _paragraph(words), table("Codes compared", header, rows))


def _by_layer(summary: RunSummary) -> str:
    parts = []
    for key, entries in text.summary_layers(summary).items():
        label = text.COMPARISON_LABELS.get(key, key)
        differing = sum(entry.different > 0 for entry in entries)
        first = next((entry.name for entry in entries if entry.different), None)
        rows = [_layer_row(key, entry) for entry in entries]
        header = ("activation", "codes", "different", "verdict", "promised 0")
        heading = f"{label}: {differing} of {len(entries)} tensors differ" + (f", first {first}" if first else "")
        opened = " open" if differing and key.startswith("integer_vs_") else ""
        parts.append(
            f"<details{opened}><summary>{escape(heading)}</summary>{table(label + ', by activation', header, rows)}"
            "</details>\n"
        )
    return _section("layers", "Mismatches by layer", *parts) if parts else ""


def _layer_row(key: str, entry: LayerComparison) -> Row:
    label, compared, different, verdict = text.comparison_cells(entry.name, entry)
    promise = "none"
    if key.startswith("integer_vs_"):
        promise = "broken ✗" if entry.different else "kept ✓"
        if entry.inexact:
            promise = f'<span class="why">none: {escape(entry.inexact)}</span>'
    return _name(label), compared, different, escape(verdict), promise


def _figure_sections(figures: Sequence[LayerFigures]) -> list[str]:
    return [section(figures) for section in (_biases, _weights, _activations, _histograms)] if figures else []


def _biases(figures: Sequence[LayerFigures]) -> str:
    rows = [
        (
            _name(layer.path),
            plots.bar(bias.largest, 0.5, f"{layer.path}: {_number(bias.largest)} of at most 0.5 steps"),
            _number(bias.largest),
            _number(bias.largest_output),
            text.percent(bias.relative, 4),
            f"{bias.channels:,}",
        )
        for layer in figures
        if (bias := layer.bias) is not None
    ]
    words = (
        "The float bias that training folded, against the value that the integer program adds. A step is one code of "
        "the bias: rounding is off by half of one at most. A step of the output is what becomes visible behind it."
    )
    header = ("layer", "0 to ½ step", "largest, steps", "largest, output steps", "relative", "channels")
    return _optional("bias", "Bias error", words, "Bias error by layer", header, rows, {1})


def _weights(figures: Sequence[LayerFigures]) -> str:
    found = [(layer.path, layer.weight) for layer in figures if layer.weight is not None]
    span = _span([limit for _, weight in found for limit in (weight.low, weight.high)])
    best = _largest([weight.sqnr for _, weight in found])
    rows = [
        (
            _name(path),
            plots.interval((w.low, w.high), None, span, f"{path}: {_number(w.low)} to {_number(w.high)}"),
            f"{_number(w.low)} … {_number(w.high)}",
            f"{_number(w.smallest_scale)} … {_number(w.largest_scale)}",
            plots.bar(w.sqnr, best, f"{path}: {_decibels(w.sqnr)}"),
            _decibels(w.sqnr),
        )
        for path, w in found
    ]
    words = "Folded weights: BatchNorm multiplied in. The upright line marks 0; every row has the same axis."
    header = ("layer", "range", "low … high", "scales", f"SQNR, 0 to {best:.0f} dB", "SQNR")
    return _optional("weights", "Weights", words, "Weight ranges and SQNR", header, rows, {1, 4})


def _activations(figures: Sequence[LayerFigures]) -> str:
    found = [(layer.path, layer.activation) for layer in figures if layer.activation is not None]
    span = _span([limit for _, a in found for limit in (a.low, a.high, a.grid_low, a.grid_high)])
    best = _largest([a.sqnr for _, a in found])
    rows = [
        (
            _name(path),
            plots.interval(
                (a.low, a.high),
                (a.grid_low, a.grid_high),
                span,
                f"{path}: values {_number(a.low)} to {_number(a.high)}, grid {_number(a.grid_low)} to "
                f"{_number(a.grid_high)}",
            ),
            f"{_number(a.low)} … {_number(a.high)}",
            f"{_number(a.grid_low)} … {_number(a.grid_high)}",
            text.percent(a.saturated / a.codes if a.codes else 0.0),
            plots.bar(a.sqnr, best, f"{path}: {_decibels(a.sqnr)}"),
            _decibels(a.sqnr),
        )
        for path, a in found
    ]
    words = (
        "Outputs on held-out images before they are quantized (dark), and what the grid can hold (pale). SQNR is "
        "against the same trained model without any quantization, so it falls from layer to layer as noise adds up."
    )
    header = ("layer", "range and grid", "values", "grid", "saturated", f"SQNR, 0 to {best:.0f} dB", "SQNR")
    return _optional("activations", "Activations", words, "Activation ranges and SQNR", header, rows, {1, 5})


def _histograms(figures: Sequence[LayerFigures]) -> str:
    cells = []
    for layer in figures:
        found = layer.activation
        if found is None or not found.codes:
            continue
        used = f"{found.distinct} of {len(found.counts)} codes used"
        plot = plots.histogram(found.counts, f"{layer.path}: how often each code occurs; {used}")
        cells.append(f"<figure>{plot}<figcaption>{_name(layer.path)}<br><small>{used}</small></figcaption></figure>\n")
    words = "How often each code of each output occurs, lowest code at the left; heights are logarithms of counts."
    grid = f'<div class="multiples">\n{"".join(cells)}</div>'
    return _section("histograms", "Code histograms", _paragraph(words), grid) if cells else ""


def _optional(
    name: str, title: str, words: str, caption: str, header: Sequence[str], rows: Sequence[Row], plotted: set[int]
) -> str:
    if not rows:
        return ""
    return _section(name, title, _paragraph(words), table(caption, header, rows, plotted=frozenset(plotted)))


def _about(summary: RunSummary, notes: Sequence[str]) -> str:
    every = [*summary.notes, *notes]
    listed = "".join(f"<li>{escape(note)}</li>" for note in every)
    times = [(escape(text.STEP_LABELS.get(k, k)), text.duration(v)) for k, v in summary.seconds.items()]
    files = [(escape(name), text.size(size)) for name, size in summary.files.items()]
    settings = [(escape(k), escape(str(v))) for k, v in summary.settings.items()]
    versions = [(escape(k), escape(v)) for k, v in summary.versions.items()]
    tables = "".join(
        f"<details><summary>{title}</summary>{table(title, (what, value), rows)}</details>\n"
        for title, what, value, rows in (
            ("Times", "step", "time", times),
            ("Files", "file", "size", files),
            ("Settings", "option", "value", settings),
            ("Versions", "library", "version", versions),
        )
        if rows
    )
    return _section("about", "About this run", f"<ul>{listed}</ul>" if every else "", tables)


def _name(path: str) -> str:
    """A dotted path that may break behind its dots."""
    return "<wbr>".join(escape(part) for part in (path or "(root)").replace(".", ".\0").split("\0"))


def _number(value: float) -> str:
    return f"{value:.3g}"


def _decibels(value: float) -> str:
    return f"{value:.1f} dB" if math.isfinite(value) else "no noise" if value > 0 else "no signal"


def _span(values: Sequence[float]) -> tuple[float, float]:
    finite = [value for value in values if math.isfinite(value)]
    return min([0.0, *finite]), max([0.0, *finite])


def _largest(values: Sequence[float]) -> float:
    return max((value for value in values if math.isfinite(value)), default=1.0)

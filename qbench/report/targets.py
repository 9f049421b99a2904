"""Targets as plain text: one table of all, everything of one. The rules themselves are data in `qbench.targets`."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from fractions import Fraction

from qbench.numerics.qparams import QSpec
from qbench.report.text import WIDTH, columns
from qbench.targets import FixedOutput, Target

# Widths of the table's columns: they and the two spaces between make WIDTH.
_COLUMNS = {"target": 11, "activation": 11, "weight": 16, "bias": 19, "requantization": 15}


def target_table(targets: Sequence[Target]) -> str:
    """One row a target, then what was verified of it, then the source of each of its rules."""
    rows = [tuple(_COLUMNS), *(line for target in targets for line in _lines(_cells(target)))]
    exact = [target.name for target in targets if target.arithmetic is not None]
    notes = [
        "",
        "2^n: scales are powers of two. Verified for each: trained codes = codes of the program, QAT eval = values of "
        f"the program. Integer arithmetic compared with a runtime or its reference model: {', '.join(exact)}.",
        "",
        "Where each rule is from (qbench targets NAME says everything of one):",
    ]
    text = [line for note in notes for line in textwrap.wrap(note, WIDTH) or [""]]
    return "\n".join([*columns(rows), *text, *(line for target in targets for line in _origin(target))])


def target_details(target: Target) -> str:
    """Everything of one target."""
    lines = [f"{target.name}: {target.description}", ""]
    for label, text in _facts(target):
        lines += textwrap.wrap(f"{label:16} {_plain(text)}", WIDTH, subsequent_indent=" " * 17)
    return "\n".join([*lines, "", "sources", *_sources(target)])


def _plain(text: str) -> str:
    """In characters that every terminal has."""
    return text.translate({ord("·"): "*", ord("…"): "to"})


def _cells(target: Target) -> tuple[str, ...]:
    return (
        target.name,
        "float" if target.activation is None else _grid(target.activation, target.widths("activation")),
        _grid(target.weight, target.widths("weight")),
        _bias(target),
        target.requantization,
    )


def _lines(cells: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """A row of cells as lines, each cell wrapped to its column."""
    wrapped = [textwrap.wrap(_plain(cell), width) for cell, width in zip(cells, _COLUMNS.values(), strict=True)]
    for index in range(max(map(len, wrapped))):
        yield tuple(cell[index] if index < len(cell) else "" for cell in wrapped)


def _origin(target: Target) -> Iterator[str]:
    yield target.name
    yield from _sources(target)
    yield from _item("verified", target.verified)
    yield from _item("not verified", target.unverified)


def _sources(target: Target) -> Iterator[str]:
    for rule, source in target.sources.items():
        yield from _item(rule, source)


def _item(label: str, text: str) -> list[str]:
    """`label: text`, indented; paths and addresses stay whole."""
    return textwrap.wrap(
        _plain(f"{label}: {text}"),
        WIDTH,
        initial_indent="  ",
        subsequent_indent="    ",
        break_on_hyphens=False,
        break_long_words=False,
    )


def _facts(target: Target) -> Iterator[tuple[str, str]]:
    for role, spec in (("activation", target.activation), ("weight", target.weight)):
        codes = "" if spec is None else f"; codes {spec.qmin} … {spec.qmax}"
        widths = ", ".join(map(str, target.widths(role)))
        yield role, "float" if spec is None else f"{spec}{codes}; widths {widths}"
    yield "bias", f"{target.bias}; widths {_ranges(target.bias_bits)}; scales {', '.join(target.bias_scales)}"
    yield "requantization", target.requantization
    yield "accumulator", f"{target.accumulator_bits} bits"
    yield "fused", ", ".join(kind.__name__ for kind in target.fused_activations)
    if target.shared_ops:
        yield "one grid", f"inputs and output of {', '.join(target.shared_ops)}"
    if target.fixed_outputs:
        yield "fixed outputs", "; ".join(_fixed(target, fixed) for fixed in target.fixed_outputs)
    if target.layers is not None:
        yield "layers", f"only {', '.join(kind.__name__ for kind in target.layers)}"
    if target.shifts is not None:
        low, high = target.shifts.requantize
        yield "shifts", f"requantization {low} … {high}, bias up to {target.shifts.bias}"
    if target.first_last_bits is not None:
        yield "first and last", f"layers at {target.first_last_bits} bits at least"
    if target.weight_only:
        yield "weight-only", "weights as codes under float activations"
    yield "integer program", "none" if target.arithmetic is None else "passes.fuse_qdq, bit by bit"
    yield "verified", target.verified
    yield "not verified", target.unverified


def _fixed(target: Target, fixed: FixedOutput) -> str:
    width = f" at {fixed.bits} bits" if len(target.widths("activation")) > 1 else ""
    return f"{', '.join(fixed.ops)}{width}: scale {Fraction(fixed.scale)}, zero point {fixed.zero_point}"


def _grid(spec: QSpec, widths: tuple[int, ...]) -> str:
    """A grid in few words: `int8 sym /channel 2^n; or 4 bits`."""
    words = [f"{'int' if spec.signed else 'uint'}{spec.bits}", "sym" if spec.symmetric else "asym"]
    words += [] if spec.axis is None else ["/channel"]
    words += ["2^n"] if spec.power_of_two else []
    others = tuple(width for width in widths if width != spec.bits)
    return " ".join(words) + (f"; or {_ranges(others)} bits" if others else "")


def _bias(target: Target) -> str:
    if target.activation is None:
        return "float"
    scales = {"input_weight": "s_in*s_w", "own": "own scale", "own_pow2": "own 2^n"}
    others = tuple(width for width in target.bias_bits if width != target.bias.bits)
    text = f"int{target.bias.bits} {scales[target.bias.scale]}"
    text += f"; or {_ranges(others)} bits" if others else ""
    more = [scales[scale] for scale in target.bias_scales if scale != target.bias.scale]
    return text + (f"; or {', '.join(more)}" if more else "")


def _ranges(widths: Sequence[int]) -> str:
    """`2-8, 16` of sorted widths."""
    parts: list[list[int]] = []
    for width in sorted(widths):
        if parts and width == parts[-1][-1] + 1:
            parts[-1].append(width)
        else:
            parts.append([width])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)

"""`qbench targets`: the table, everything of one target, and the page that holds the table."""

from __future__ import annotations

from pathlib import Path

import pytest

from qbench.report.targets import target_details, target_table
from qbench.report.text import WIDTH
from qbench.targets import TARGETS, Target, get

PAGE = Path(__file__).parents[2] / "docs" / "targets.md"
TABLE = target_table(TARGETS)


def unwrapped(text: str) -> str:
    return " ".join(text.split())


def test_the_page_holds_the_table_as_it_is_printed() -> None:
    assert f"```text\n{TABLE}\n```\n" in PAGE.read_text(encoding="utf-8"), (
        "docs/targets.md is not what `qbench targets` prints: put its output into the text block at the end"
    )


def plain(text: str) -> str:
    return unwrapped(text.replace("·", "*").replace("…", "to"))


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_the_table_says_of_every_target_where_its_rules_are_from(target: Target) -> None:
    assert sum(line.startswith(f"{target.name} ") for line in TABLE.splitlines()) == 1
    text = unwrapped(TABLE)
    for rule, source in target.sources.items():
        assert plain(f"{rule}: {source}") in text
    assert plain(f"not verified: {target.unverified}") in text and plain(f"verified: {target.verified}") in text


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_everything_of_one(target: Target) -> None:
    text = unwrapped(target_details(target))
    for piece in (target.description, target.requantization, target.verified, target.unverified, *target.sources):
        assert plain(piece) in text
    assert ("integer program none" in text) is (target.arithmetic is None)


@pytest.mark.parametrize("text", [TABLE, *map(target_details, TARGETS)], ids=["table", *map(str, TARGETS)])
def test_lines_fit_and_every_terminal_has_their_characters(text: str) -> None:
    for line in text.splitlines():
        # An address or a path is never broken.
        assert len(line) <= WIDTH or " " not in line.strip()
        assert line == line.rstrip()
    text.encode("ascii")


@pytest.mark.parametrize(
    ("name", "cells"),
    [
        ("vitis", ["int8 sym", "int8 sym 2^n", "int8 own 2^n", "shift by 0 to"]),
        ("tflite_16x8", ["int16 sym", "int8 sym", "int64 s_in*s_w", "fixed-point"]),
        ("vulkan", ["float", "int8 sym", "float", "none"]),
        ("snpe", ["uint8 asym;", "uint8 asym", "int32 s_in*s_w; or", "not public"]),
    ],
)
def test_rows(name: str, cells: list[str]) -> None:
    line = next(line for line in TABLE.splitlines() if line.startswith(f"{name} "))
    assert [cell.strip() for cell in line.split("  ") if cell.strip()] == [name, *cells]


def test_details_show_the_limits() -> None:
    assert "requantization 0 to 16, bias up to 16" in target_details(get("vitis"))
    assert "only Linear" in target_details(get("vulkan"))
    assert "layers at 8 bits at least" in target_details(get("academic"))

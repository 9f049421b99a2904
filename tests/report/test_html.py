"""report.html: what it says, that it needs nothing else, and how a browser reads it."""

from __future__ import annotations

import dataclasses
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from qbench.report import LayerComparison, RunSummary, plots
from qbench.report.figures import ActivationFigures, BiasFigures, LayerFigures, WeightFigures, sqnr
from qbench.report.html import report_page

VOID = {"meta", "link", "wbr", "br", "rect", "path"}
REASON = "xnnpack: 5.op (aten.hardswish) stays in float"


def summary() -> RunSummary:
    rows = (
        LayerComparison("conv1", 900_000, 0),
        LayerComparison("layer1.<0>.act", 1000, 7, 2, REASON),
        LayerComparison("output", 10, 1, 1, REASON),
    )
    return RunSummary(
        model="resnet18",
        data="digits",
        target="xnnpack",
        float_top1=0.98,
        qat_top1=0.975,
        deployed_top1={"executorch": 0.9725},
        mismatches={"parameters": 0, "eval_vs_program": 0, "program_vs_executorch": 3, "integer_vs_executorch": 8},
        codes_compared=7,
        seconds={"float": 1.5, "total": 90.0},
        compared={
            "parameters": 11,
            "eval_vs_program": 12,
            "program_vs_executorch": 13,
            "integer_vs_executorch": 901_010,
        },
        largest_steps={"program_vs_executorch": 1, "integer_vs_executorch": 2},
        held_out=450,
        promises={"parameters": True, "eval_vs_program": True, "integer_vs_executorch": True},
        by_layer={"integer_vs_executorch": tuple(map(dataclasses.asdict, rows))},
        cpu=("avx2",),
        notes=("a <note> & more",),
        files={"model.pte": 1000},
        settings={"lr": 0.1},
        versions={"torch": "2"},
    )


def figures(count: int = 3) -> tuple[LayerFigures, ...]:
    counts = tuple(max(0, 90 - abs(code - 120)) for code in range(256))
    layers = [
        LayerFigures(
            f"features.{i}.block.conv",
            BiasFigures(0.4375, 0.00123, 0.0005, 16 * (i + 1)),
            WeightFigures(-0.7 - i, 0.9, 0.001, 0.004, 41.23),
            ActivationFigures(-1.5, 3.25, -2.0, 3.0, counts, 5, 33.4),
        )
        for i in range(count)
    ]
    pool = LayerFigures("pool", activation=ActivationFigures(0.0, 0.0, -1.0, 1.0, (0,) * 256, 0, math.inf))
    return (*layers, pool)


class Reader(HTMLParser):
    """Text, tags and attributes of a page; every element must be closed in its order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_every_figure_stands_in_the_page() -> None:
    reader = Reader(report_page(summary(), figures(), notes=("a later note",)))
    said = re.sub(r"\s+", " ", "".join(reader.text))
    for words in (
        "resnet18 on digits for xnnpack",
        "All 3 promised zeros are zero",
        "98.00 %",
        "-0.75",
        "901,010",
        "kept where promised ✓",
        "by 2 at most",
        f"none: {REASON}",
        "layer1.<0>.act",
        "features.2.block.conv",
        "0.438",
        "0.0500 %",
        "41.2 dB",
        "33.4 dB",
        "no noise",
        "-1.5 … 3.25",
        "-2 … 3",
        "179 of 256 codes used",
        "CPU features: avx2",
        "a <note> & more",
        "a later note",
    ):
        assert words in said, words


def test_it_needs_nothing_but_itself() -> None:
    page = report_page(summary(), figures())
    tags = Reader(page).tags
    assert not [tag for tag, _ in tags if tag in {"script", "img", "iframe", "object", "base"}]
    assert [a["href"] for tag, a in tags if tag == "link"] == ["data:,"]
    assert "http" not in page and "url(" not in page and "@import" not in page


def test_it_can_be_read_without_seeing_it() -> None:
    tags = Reader(report_page(summary(), figures())).tags
    assert all(a["role"] == "img" and a["aria-label"] for tag, a in tags if tag == "svg")
    assert all(a.get("scope") in ("row", "col") for tag, a in tags if tag == "th")
    assert sum(tag == "caption" for tag, _ in tags) == sum(tag == "table" for tag, _ in tags) >= 8
    ids = [a["id"] for tag, a in tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert {a["aria-labelledby"] for tag, a in tags if tag == "section"} <= set(ids)


def test_a_broken_promise_is_said_first() -> None:
    broken = dataclasses.replace(summary(), promises={"parameters": True, "integer_vs_executorch": False})
    page = report_page(broken, figures())
    assert "A promised zero is not zero: integer program vs ExecuTorch" in page
    assert "broken ✗" in page and "promised zeros are zero" not in page


def test_without_figures_their_sections_are_left_out() -> None:
    page = report_page(summary())
    assert "Bias error" not in page and "Code histograms" not in page and "Mismatches by layer" in page


@pytest.mark.parametrize(
    ("value", "largest", "width"), [(0.5, 2.0, 25), (3.0, 2.0, 100), (-1.0, 2.0, 0), (math.nan, 2.0, 0), (1.0, 0.0, 0)]
)
def test_a_bar_is_as_long_as_its_value(value: float, largest: float, width: float) -> None:
    widths = re.findall(r'class="ink" x="0.00" y="1" width="([\d.]+)"', plots.bar(value, largest, "a value"))
    assert widths == [f"{width:.2f}"]


def test_an_interval_lies_on_its_axis() -> None:
    svg = plots.interval((-1.0, 1.0), (-2.0, 2.0), (-2.0, 2.0), "a <range>")
    assert 'class="ink" x="25.00" y="2.5" width="50.00"' in svg
    assert 'class="soft" x="0.00" y="0" width="100.00"' in svg
    assert 'aria-label="a &lt;range&gt;"' in svg


def test_a_histogram_has_a_column_for_every_code_that_occurs() -> None:
    svg = plots.histogram([0, 1, 0, 3], "counts")
    assert svg.count("M") == 2
    heights = [float(v) for v in re.findall(r"v-([\d.]+)", svg)]
    assert heights == pytest.approx([plots.TALL / 2, plots.TALL], abs=0.01)
    assert plots.histogram([1] * 256, "counts").count("M") == 128
    assert "M" not in plots.histogram([], "nothing")


@pytest.mark.parametrize(("signal", "noise", "expected"), [(100, 1, 20), (1, 0, math.inf), (0, 1, -math.inf)])
def test_sqnr(signal: float, noise: float, expected: float) -> None:
    assert sqnr(signal, noise) == pytest.approx(expected)


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine (Debian: apt-get install chromium)")
def test_a_browser_reads_it_and_complains_of_nothing(tmp_path: Path) -> None:
    """In a window of a phone's width: nothing is wider than the page, and every heading and row is there."""
    page = report_page(summary(), figures())
    # Put in by the test alone: the page itself has no script.
    probe = (
        "<script>addEventListener('load', () => { const root = document.documentElement; const wide = "
        "[...document.querySelectorAll('main *')].filter(e => !e.closest('.frame') && "
        "e.getBoundingClientRect().right > root.clientWidth + 1).length; "
        "document.title = 'wide ' + wide + ' scroll ' + (root.scrollWidth - root.clientWidth); });</script></body>"
    )
    (tmp_path / "report.html").write_text(page.replace("</body>", probe), encoding="utf-8")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --enable-logging=stderr --window-size=500,900 --dump-dom"
    done = subprocess.run(
        [
            str(BROWSER),
            *flags.split(),
            f"--user-data-dir={tmp_path / 'profile'}",
            (tmp_path / "report.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    dom = done.stdout
    assert "<title>wide 0 scroll 0</title>" in dom, re.findall("<title>.*</title>", dom)
    assert re.findall(r"<h2[^>]*>([^<]*)", dom) == [
        "Accuracy",
        "Mismatches",
        "Mismatches by layer",
        "Bias error",
        "Weights",
        "Activations",
        "Code histograms",
        "About this run",
    ]
    assert dom.count('<th scope="row"') == page.count('<th scope="row"') > 20
    assert dom.count("<svg") == page.count("<svg") > 10
    assert "CONSOLE" not in done.stderr

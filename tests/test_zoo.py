"""The zoo: what it holds, how it goes on where it stopped, and what its page says."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("onnxruntime")

from benchmarks.zoo import measure, run
from benchmarks.zoo.networks import SEGMENTATION, build, names
from benchmarks.zoo.table import page

ROW: dict[str, Any] = {
    "model": "resnet18",
    "image_size": 224,
    "parameters": 11_689_512,
    "batch_norms": 20,
    "folded": 20,
    "layers": 21,
    "quantized_layers": 21,
    "linked_layers": 20,
    "compared": {"eval_vs_program": 2000, "integer_vs_onnxruntime": 5_000_000},
    "different": {"eval_vs_program": 0, "integer_vs_onnxruntime": 7},
    "inexact": {"integer_vs_onnxruntime": ["softmax"]},
    "total_seconds": 61.2,
    "peak_mib": 2048,
}


def test_every_classifier_is_in_it_and_has_a_size() -> None:
    listed = names()
    assert len(listed) == len(set(listed)) == 80 + len(SEGMENTATION) + 7
    ssdlite = "ssdlite320_mobilenet_v3_large/backbone+head"
    for name in ("squeezenet1_1", "inception_v3", "lraspp_mobilenet_v3_large", ssdlite):
        model, size = build(name)
        assert size == {"inception_v3": 299, ssdlite: 320}.get(name, 224)
        assert any(True for _ in model.parameters())


def test_the_page_says_what_was_found() -> None:
    failed = {"model": "vit_h_14", "failed": "train: MemoryError: no | space", "total_seconds": 3.0}
    text = page([ROW, failed], 93)
    assert "1 of 93 networks go through (2 measured)" in text
    cells = ("resnet18", "224", "11.7", "100.0 %", "100.0 %", "95.2 %", "**0** of 2,000", "7 of 5,000,000", "61", "2.0")
    assert f"| {' | '.join(cells)} | codes differ behind softmax |" in text
    assert "| vit_h_14 |  |  | – | – | – | – | – | 3 |  | **failed** at train: MemoryError: no \\| space |" in text


def test_it_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "zoo.jsonl"
    rows = [{"model": "alexnet", "failed": "x", "total_seconds": 1.0}, ROW]
    out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked: list[str] = []

    def found(name: str, memory_gib: int, hours: float) -> dict[str, Any]:
        asked.append(name)
        return {**ROW, "model": name}

    monkeypatch.setattr(run, "measured", found)
    common = ["run", "--models", "alexnet", "resnet18", "vgg11", "--out", str(out), "--page", str(tmp_path / "zoo.md")]
    monkeypatch.setattr(sys, "argv", common)
    run.main()
    assert asked == ["vgg11"]
    monkeypatch.setattr(sys, "argv", [*common, "--again", "failed"])
    run.main()
    assert asked == ["vgg11", "alexnet"]
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["model"] for row in rows] == ["alexnet", "resnet18", "vgg11"] and "failed" not in rows[0]
    assert "3 of 93 networks go through (3 measured)" in (tmp_path / "zoo.md").read_text()


def test_a_network_that_needs_too_much_is_a_row_with_the_reason() -> None:
    row = run.measured("squeezenet1_1", memory_gib=0, hours=0.1)
    assert row["model"] == "squeezenet1_1" and row["failed"].startswith("process ended with")


def test_a_step_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise ValueError("no such\nnetwork")

    monkeypatch.setattr(measure, "build", broken)
    monkeypatch.setattr(sys, "argv", ["measure", "nothing", str(tmp_path / "row.json")])
    with pytest.raises(ValueError, match="no such"):
        measure.main()
    row = json.loads((tmp_path / "row.json").read_text())
    assert row["failed"] == "build: ValueError: no such network" and row["peak_mib"] > 0


@pytest.mark.slow
def test_a_small_network_goes_the_whole_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["measure", "squeezenet1_1", str(tmp_path / "row.json")])
    measure.main()
    row = json.loads((tmp_path / "row.json").read_text())
    assert "failed" not in row and row["fuse_is_exact"] and row["biases"] == {"quantized": 26, "refused": 0}
    assert row["compared"]["integer_vs_onnxruntime"] > 8_000_000 and row["fewest_distinct_codes"] >= 50
    assert {key: row["different"][key] for key in ("parameters", "eval_vs_program", "integer_vs_onnxruntime")} == {
        "parameters": 0,
        "eval_vs_program": 0,
        "integer_vs_onnxruntime": 0,
    }

"""The benchmark of the training step: forms that can be made, those that cannot, and its table."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.speed import train_step, variants
from benchmarks.speed.train_step import Setting, measure, table

SETTING = Setting(batch=2, px=64, layout="contiguous", amp=False, device="cpu")


def rows(*forms: str) -> dict[str, dict[str, Any]]:
    return {row["form"]: row for row in measure("squeezenet1_1", ["float", *forms], SETTING, rounds=2)}


def test_ratios_are_over_the_float_network() -> None:
    found = rows("qbench plain", "qbench low memory")
    assert found["float"]["ratio"] == found["float"]["saved_ratio"] == 1.0
    plain = found["qbench plain"]
    assert plain["ratio"] > 0 and plain["start_seconds"] > plain["seconds"]
    assert plain["over"]["float"][1] == plain["ratio"] and plain["over"]["qbench plain"] == [1.0, 1.0, 1.0]
    assert found["qbench low memory"]["saved_mib"] < found["qbench plain"]["saved_mib"]


def test_a_form_that_cannot_be_made_is_named() -> None:
    found = rows("torch.ao")
    assert "torchvision has no quantizable form" in found["torch.ao"]["refused"]
    assert "torchvision has no quantizable form" in table(list(found.values()))


def test_the_float_twin_has_the_activations_that_every_form_can_fuse() -> None:
    model = variants.float_network("mobilenet_v2")
    kinds = {type(module) for module in model.modules()}
    assert torch.nn.ReLU in kinds
    assert torch.nn.ReLU6 not in kinds


def test_the_command_writes_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "step.json"
    options = ["--models", "squeezenet1_1", "--sizes", "1x64", "--layouts", "contiguous", "--forms", "float"]
    monkeypatch.setattr(sys, "argv", ["train_step", *options, "--rounds", "2", "--json", str(path)])
    said: list[str] = []
    train_step.main(said.append)
    assert '"ratio": 1.0' in path.read_text(encoding="utf-8")
    assert any("| squeezenet1_1 | 1 × 64 | contiguous | float | 1.00 |" in line for line in said)

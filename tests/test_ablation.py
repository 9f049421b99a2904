"""The machinery of the ablation, on settings of seconds: what is switched off and what is not, resuming, statistics."""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import qbench
from qbench.errors import ConfigError
from qbench.preparation import quantized_modules

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import ablation  # noqa: E402
import ablation_report as report  # noqa: E402

PLAN = ablation.Plan(float_epochs=1, qat_epochs=1, onnx_seeds=0)
TINY = ["--nets", "dense", "--bits", "8", "--biases", "8 own", "--seeds", "2", "--float-epochs", "1"]
TINY += ["--qat-epochs", "1", "--onnx-seeds", "0"]


def cell(bias: str = "8 own", *, aware: bool, net: str = "dense", bits: int = 8) -> ablation.Cell:
    return ablation.Cell(net, bits, bias, aware, seed=0)


def parameters(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *(buffer for name, buffer in model.named_buffers() if "quantizer" not in name)]


def equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def pixels() -> Tensor:
    return next(iter(qbench.data.batches(ablation.images_of(8, 0).held_out, 64)))[0]


@pytest.mark.parametrize("net", list(ablation.NETS))
def test_blind_training_does_not_see_the_width_of_the_bias_and_aware_training_does(net: str) -> None:
    blind = [ablation.trained(cell(bias, aware=False, net=net), PLAN) for bias in ("8 own", "16 own")]
    aware = [ablation.trained(cell(bias, aware=True, net=net), PLAN) for bias in ("8 own", "16 own")]
    assert equal(*map(parameters, blind))
    assert not equal(*map(parameters, aware))
    assert not equal(parameters(aware[0]), parameters(blind[0]))


def test_float_bias_changes_the_bias_of_eval_and_nothing_else() -> None:
    model = ablation.trained(cell(aware=True), PLAN)
    layer = next(module for _, module in quantized_modules(model) if isinstance(module, ablation.QatLayer))
    images = pixels()
    codes, before = layer.parameter_codes(), ablation.layer_outputs(model, images)
    with ablation.float_bias(model), torch.no_grad():
        inside = ablation.layer_outputs(model, images)
        grid, bias, _ = layer.quantized_parameters()
        conv = nn.functional.conv2d(layer.quantized_inputs((images,))[0], grid.folded(), bias, padding=1)
        expected = layer.output_quantizer(conv.relu())
        assert torch.equal(layer.parameter_codes().weight, codes.weight)
        assert torch.equal(layer.parameter_codes().bias, codes.bias)
    assert ablation.different(inside[0], expected) == 0
    assert ablation.different(inside[0], before[0]) > 0
    assert equal(ablation.layer_outputs(model, images), before)


def test_float_bias_adds_no_error_where_batch_statistics_normalise() -> None:
    model = ablation.trained(cell(aware=True), PLAN)
    layer = next(module for _, module in quantized_modules(model) if isinstance(module, ablation.QatLayer))
    images = pixels()
    model.apply(qbench.update_bn_stats).apply(qbench.disable_observer).train()
    bn = layer.bn
    momentum, bn.momentum = bn.momentum, 0.0  # so that both forwards start from the same running statistics
    with torch.no_grad():
        aware = layer(images)
        with ablation.float_bias(model):
            blind = layer(images)
        grid, _, _ = layer.quantized_parameters()
        conv = nn.functional.conv2d(layer.quantized_inputs((images,))[0], grid.unfolded(), layer.bias, padding=1)
        expected = layer.output_quantizer(bn(conv).relu())
    bn.momentum = momentum
    assert ablation.different(blind, expected) == 0
    assert ablation.different(blind, aware) > 0


def test_hooks_are_gone_when_the_block_raises() -> None:
    model = ablation.trained(cell(aware=True), PLAN)
    before = ablation.layer_outputs(model, pixels())
    with pytest.raises(ZeroDivisionError), ablation.float_bias(model):
        raise ZeroDivisionError
    assert equal(ablation.layer_outputs(model, pixels()), before)


@pytest.mark.parametrize("aware", [True, False])
def test_a_cell_counts_what_deployment_changes(aware: bool) -> None:
    row = ablation.measure(cell(aware=aware), dataclasses.replace(PLAN, onnx_seeds=1))
    assert row["eval_vs_program"] == 0
    assert row["output_codes"] == 450 * 10
    assert row["codes"] > 10 * row["output_codes"]
    assert 0 < row["bias_error"] < 1
    assert (row["changed"] == 0 and row["view"] == row["deployed"]) if aware else row["changed"] > 0
    assert 0 <= row["onnxruntime"]["changed"] < row["output_codes"] / 2


def test_an_interrupted_run_goes_on_and_keeps_what_it_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "cells.jsonl"
    ablation.main([*TINY, "--out", str(out)])
    first = out.read_text()
    assert capsys.readouterr().out.count("seed") == 4
    lines = first.splitlines(keepends=True)
    out.write_text("".join(lines[:4]) + lines[4][:30])
    ablation.main([*TINY, "--out", str(out)])
    assert capsys.readouterr().out.count("seed") == 1
    assert out.read_text().splitlines(keepends=True)[:4] == lines[:4]
    again, before = json.loads(out.read_text().splitlines()[4]), json.loads(lines[4])
    assert {**again, "seconds": 0} == {**before, "seconds": 0}
    summary = json.loads(out.with_suffix(".json").read_text())
    assert [one["seeds"] for one in summary["conditions"]] == [[0, 1]]


def test_cells_of_another_plan_are_refused(tmp_path: Path) -> None:
    ablation.Results(tmp_path / "cells.jsonl", PLAN)
    with pytest.raises(ConfigError, match="--out"):
        ablation.Results(tmp_path / "cells.jsonl", ablation.Plan())


@pytest.mark.parametrize("seeds", ["1", "21"])
def test_a_number_of_seeds_without_statistics_is_refused(seeds: str) -> None:
    with pytest.raises(SystemExit):
        ablation.parse(["--seeds", seeds])


@pytest.mark.parametrize(
    ("differences", "p"),
    [([1.0, 1.0, 1.0], 0.25), ([0.0, 0.0], 1.0), ([1.0, -1.0], 1.0), ([0.0, 2.0, 1.0], 0.5), ([-3.0] * 10, 2 / 1024)],
)
def test_sign_flip_p(differences: list[float], p: float) -> None:
    assert report.sign_flip_p(differences) == p


def test_sign_flip_p_against_all_patterns_one_by_one() -> None:
    differences = torch.randn(9, generator=torch.Generator().manual_seed(3)).double().add(0.4).tolist()
    patterns = list(itertools.product((1, -1), repeat=9))
    sums = [abs(sum(sign * d for sign, d in zip(signs, differences, strict=True))) for signs in patterns]
    reached = sum(value >= abs(sum(differences)) - 1e-12 for value in sums)
    assert report.sign_flip_p(differences) == reached / len(patterns)
    assert 0 < reached / len(patterns) < 1


def test_holm() -> None:
    assert report.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert report.holm([0.9, 0.8]) == [1.0, 1.0]
    assert report.holm([]) == []


def test_the_page_holds_the_tables_of_the_committed_figures() -> None:
    conditions = json.loads((ROOT / "docs" / "ablation.json").read_text(encoding="utf-8"))["conditions"]
    page = (ROOT / "docs" / "ablation.md").read_text(encoding="utf-8")
    assert len(conditions) == 16
    assert min(len(one["seeds"]) for one in conditions) >= 5
    for draw in report.TABLES:
        assert draw(conditions) in page, draw.__name__

"""The benchmark suite: jobs go on where they stopped, crashes are rows, parts measure, targets are computed."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.speed import around, deployed, images, memory, parts, run, train_step
from benchmarks.speed.page import page
from benchmarks.speed.parts import PARTS, Options
from benchmarks.speed.passes import Passes, passes_alone
from benchmarks.speed.rows import Job, Row, append, command, key, machine, read
from benchmarks.speed.targets import checks

STEP = Job("step", ("float", "qbench plain", "Brevitas"), "resnet18", 8, 128, "contiguous")
ABOUT = {"machine": "a processor", "torch": "2", "command": "python"}


def step_row(form: str, **found: Any) -> Row:
    """A row of the part `step` with everything in it."""
    ratio = found.pop("ratio", 1.0)
    over = {"float": [ratio] * 3, "float compiled": [ratio] * 3, "qbench fast": [ratio] * 3}
    about = {"seconds": 1.0, "ratio": ratio, "quartiles": [ratio, ratio], "over": over, "saved_mib": 1.0}
    return {**STEP.row(form), **ABOUT, **about, "saved_ratio": 0.7, **found}


def small(name: str) -> nn.Module:
    torch.manual_seed(0)
    head = [nn.Conv2d(3, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.ReLU()]
    return nn.Sequential(*head, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 1000)).train()


@pytest.fixture
def small_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every network is a small one."""
    for module in (around, deployed, images, train_step):
        monkeypatch.setattr(module, "float_network", small)


def test_what_is_known_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, asked = tmp_path / "rows.jsonl", []
    append(out, [step_row("float"), step_row("qbench plain", ratio=9.0)])

    def measured(job: Job, memory_gib: int, hours: float) -> Iterator[Row]:
        asked.append((job.part, job.model, job.layout, job.forms))
        yield from ({**step_row(form), **job.setting(), "form": form} for form in job.forms)

    monkeypatch.setattr(run, "measured", measured)
    monkeypatch.setattr(run.signal, "signal", lambda *_: None)
    options = ["--parts", "step", "--models", "resnet18", "--sizes", "8x128", "--threads", "1"]
    common = ["run", *options, "--layouts", "contiguous", "--forms", "float", "qbench plain", "qbench lsq"]
    common += ["--out", str(out), "--page", str(tmp_path / "page.md")]
    monkeypatch.setattr(sys, "argv", common)
    run.main()
    assert asked == [("step", "resnet18", "contiguous", ("qbench lsq",))]
    assert "| 9.00 |" in (tmp_path / "page.md").read_text(encoding="utf-8")
    monkeypatch.setattr(sys, "argv", [*common, "--again"])
    run.main()
    assert asked[1][3] == ("float", "qbench plain", "qbench lsq")
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [(row["form"], row["ratio"]) for row in rows] == [("float", 1), ("qbench plain", 1), ("qbench lsq", 1)]


def test_a_process_that_dies_is_repeated_form_by_form(monkeypatch: pytest.MonkeyPatch) -> None:
    processes = []

    def process(job: Job, memory_gib: int, hours: float) -> tuple[list[Row], str]:
        processes.append(job.forms)
        died = "Brevitas" in job.forms
        return [] if died else [step_row(form) for form in job.forms], "the process ended with -9: "

    monkeypatch.setattr(run, "_process", process)
    rows = list(run.measured(STEP, 20, 1.0))
    assert processes == [STEP.forms, ("float",), ("qbench plain",), ("Brevitas",)]
    assert [row["form"] for row in rows if "refused" in row] == ["Brevitas"]
    assert "the process ended with -9" in page([{**row, **ABOUT} for row in rows])


def test_parts_that_need_it_get_a_process_a_form(monkeypatch: pytest.MonkeyPatch) -> None:
    processes: list[tuple[str, ...]] = []

    def process(job: Job, memory_gib: int, hours: float) -> tuple[list[Row], str]:
        processes.append(job.forms)
        return [job.row(form) for form in job.forms], ""

    monkeypatch.setattr(run, "_process", process)
    job = Job("peak", ("float", "torch.ao"), "resnet18", 8, 128, "contiguous")
    assert len(list(run.measured(job, 20, 1.0))) == 2
    assert processes == [("float",), ("torch.ao",)]


def test_a_process_without_memory_is_a_row_with_the_reason() -> None:
    job = Job("slope", ("passes",))
    (row,) = run.measured(job, memory_gib=0, hours=0.1)
    assert row["form"] == "passes" and row["refused"].startswith("the process ended with")


def test_jobs_are_every_network_size_and_layout() -> None:
    options = Options(models=("resnet18", "resnet50"), sizes=("8x128", "16x224"), forms=("float",), threads=3, rounds=5)
    found = run.jobs(list(PARTS), options)
    steps = [(job.model, job.batch, job.px, job.layout) for job in found if job.part == "step"]
    assert len(set(steps)) == len(steps) == 8
    assert {(job.threads, job.rounds, job.device) for job in found} == {(3, 5, "cpu")}
    assert [job.part for job in run.jobs(list(PARTS), Options(device="cuda", models=("resnet50",)))].count("step") == 4
    assert len({key(job.row(form)) for job in found for form in job.forms}) == sum(len(job.forms) for job in found)


def test_the_command_of_a_row_asks_for_the_same_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", command(STEP.setting()).split()[2:])
    options = run._parsed()
    assert (options.parts, options.models, options.sizes) == (["step"], ["resnet18"], ["8x128"])
    assert (options.layouts, options.threads, options.again, options.amp) == (["contiguous"], 1, True, False)


def test_a_worker_measures_a_job_and_says_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "PARTS", {"step": parts.Part(lambda job: iter([job.row("float", ratio=1.0)]), list)})
    (tmp_path / "job.json").write_text(json.dumps({**STEP.setting(), "forms": ["float"]}), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["parts", str(tmp_path / "job.json"), str(tmp_path / "out.jsonl")])
    threads = torch.get_num_threads()
    try:
        parts.main()
    finally:
        torch.set_num_threads(threads)
    (row,) = read(tmp_path / "out.jsonl").values()
    assert row["ratio"] == 1.0 and row["torch"] == torch.__version__ and "--parts step" in row["command"]
    assert row["machine"] == machine("cpu")["machine"]


ON_GPU = step_row("qbench plain", model="resnet50", device="cuda", batch=128, saved_ratio=2)
LIMITS = [
    (step_row("qbench plain", ratio=1.20), {"step over float": True, "saved over float": True}),
    (step_row("qbench plain", ratio=1.21), {"step over float": False, "saved over float": True}),
    (step_row("qbench plain", ratio=1.34, layout="channels_last"), {"step over float": True, "saved over float": True}),
    (step_row("qbench plain", ratio=1.16, px=224), {"step over float": False, "saved over float": True}),
    (step_row("qbench low memory", ratio=1.11), {"step over the fast path's": False, "saved over float": True}),
    (step_row("qbench low memory", saved_ratio=0.76), {"step over the fast path's": True, "saved over float": False}),
    (step_row("qbench compiled", ratio=1.06), {"step over compiled float": False}),
    (step_row("torch.ao", ratio=2.0), {}),
    (ON_GPU, {"step over float": True, "saved over float": False}),
    (step_row("qbench plain", refused="no"), {}),
]


@pytest.mark.parametrize(("row", "expected"), LIMITS)
def test_a_target_is_met_or_not(row: Row, expected: dict[str, bool]) -> None:
    assert {check.what: check.met for check in checks(row, [row])} == expected


@pytest.mark.parametrize(("plain", "limits"), [(1.09, ["step over float"]), (1.2, [])])
def test_learned_scales_have_a_limit_where_fixed_ones_are_fast(plain: float, limits: list[str]) -> None:
    row = step_row("qbench lsq", ratio=1.2)
    assert [check.what for check in checks(row, [row, step_row("qbench plain", ratio=plain)])] == limits


def test_targets_around_the_step() -> None:
    imported = Job("import", ("import qbench",)).row("import qbench", seconds=0.31)
    assert [check.met for check in checks(imported, [])] == [False]
    seconds = {"fuse": 1.0, "prepare_qat": 0.9, "convert": 4.0, "quantize_bias": 0.5, "fuse_qdq": 0.6}
    flow = Job("flow", (), "resnet50").row("", seconds=seconds)
    assert [(check.what, check.met) for check in checks(flow, [])] == [
        ("fuse + prepare", True),
        ("convert + bias pass + Q/DQ fusion", False),
    ]
    few, many = (Job("streaming").row(n, peak_mib=peak, processes_mib=1.0) for n, peak in (("8", 100.0), ("64", 106.0)))
    assert not list(checks(few, [few, many]))
    assert [str(check) for check in checks(many, [few, many])] == ["≤ 1.05: **not met**"]
    fast = Job("deployed").row("int8 ONNX Runtime", float_nodes=["Conv a"], speed={"float eager": 3.0})
    slow = Job("deployed").row("int8 weights, default session", float_nodes=[], speed={"float eager": 2.0})
    saturates = {**slow, "different": 1, "speed": {"float eager": 9.0}}
    executorch = Job("deployed").row("int8 ExecuTorch", float_nodes=[], speed={"float eager": 9.0})
    rows = [Job("deployed").row("float eager", speed={}), fast, slow, saturates, executorch]
    found = [[(check.what, check.met) for check in checks(row, rows)] for row in rows]
    in_float, speed = "float operators", "speed over float eager"
    assert found == [[], [(in_float, False), (speed, True)], *[[(in_float, True)]] * 3], "of the fastest exact file"


def test_the_page_counts_operators_that_stay_in_float() -> None:
    row = Job("deployed", (), "efficientnet_b0").row("int8 ONNX Runtime", float_nodes=["Mul a", "Mul b"], seconds=1.0)
    text = page([{**row, **ABOUT, "speed": {"float eager": 2.0}}])
    assert "| Mul ×2 |" in text and "float operators 2.00, ≤ 0: **not met**" in text


def test_the_page_names_targets_and_escapes_reasons() -> None:
    rows = [step_row("float"), step_row("qbench plain", ratio=1.5), {**STEP.row("Brevitas", refused="a | b"), **ABOUT}]
    text = page(rows)
    assert "## a processor, 1 threads, PyTorch 2" in text and "1 of 2 targets are met." in text
    assert "step over float 1.50, ≤ 1.2: **not met**" in text and "not measured: a \\| b |" in text


def test_passes_alone_train() -> None:
    layers = nn.Conv2d(3, 600, 3, bias=False), nn.BatchNorm2d(600), nn.ReLU(), nn.Conv2d(600, 60, 3, bias=False)
    model = nn.Sequential(*layers, nn.BatchNorm2d(60), nn.Conv2d(60, 9, 1), nn.BatchNorm2d(9), nn.Flatten())
    images = torch.randn(4, 3, 8, 8)
    for form in (torch.contiguous_format, torch.channels_last):
        alone = passes_alone(model).to(memory_format=form)  # type: ignore[call-overload]
        assert sum(isinstance(module, Passes) for module in alone.modules()) == 2
        alone(images.to(memory_format=form)).square().mean().backward()
        grads = [parameter.grad for parameter in alone.parameters()]
        assert all(grad is not None and grad.isfinite().all() for grad in grads)


@pytest.mark.usefixtures("small_networks")
def test_the_peak_is_above_what_was_there_before(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str, model: nn.Module, batch: tuple[torch.Tensor, ...]) -> nn.Module:
        raise ValueError(f"no {name}")

    monkeypatch.setitem(train_step.FORMS, "broken", broken)
    job = Job("peak", ("float", "broken"), "resnet18", 32, 128, "contiguous")
    found, refused = train_step.peaks(job)
    activations = 32 * 8 * 63 * 63 * 4 / 2**20  # of the first convolution
    assert activations < found["above_mib"] < found["peak_mib"]
    assert refused["refused"] == "ValueError: no resnet18" and "peak_mib" not in refused


def test_the_peak_follows_allocations() -> None:
    memory.reset_peak()
    before = memory.peak()
    torch.ones(16, 2**20)
    assert 63 < memory.peak() - before < 80
    memory.reset_peak()
    assert memory.peak() - before < 32


@pytest.mark.usefixtures("small_networks")
def test_a_runtime_that_refuses_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise ValueError("not here")

    monkeypatch.setattr(deployed.qbench.export, "to_executorch", refuse)
    monkeypatch.setattr(deployed.qbench.export, "to_onnx", refuse)
    monkeypatch.setattr(torch.onnx, "export", refuse)
    job = Job("deployed", tuple(deployed.FORMS), "small", 1, 32, rounds=1)
    rows = {row["form"]: row for row in deployed.deployed(job)}
    assert rows["float eager"]["speed"] == {"float eager": 1.0}
    assert {row.get("refused") for row in rows.values()} == {None, "ValueError: not here"}


@pytest.mark.slow
@pytest.mark.usefixtures("small_networks")
def test_deployed_files_are_timed_and_have_no_float_operator() -> None:
    job = Job("deployed", tuple(deployed.FORMS), "small", 1, 32, rounds=1)
    rows = {row["form"]: row for row in deployed.deployed(job)}
    assert list(rows) == list(deployed.FORMS)
    assert rows["int8 weights, default session"]["compared"] == 1000
    assert rows["float eager"]["speed"]["float eager"] == 1.0
    for form in list(deployed.FORMS)[2:]:
        assert rows[form]["float_nodes"] == [] and rows[form]["speed"]["float ONNX Runtime"] > 0


@pytest.mark.slow
@pytest.mark.usefixtures("small_networks")
def test_images_are_verified_from_a_folder() -> None:
    (row,) = images.streaming(Job("streaming", ("4",), "small", 2, 32))
    assert row["exact"]["eval_vs_program"] and row["processes_mib"] > 0 < row["peak_mib"]


@pytest.mark.usefixtures("small_networks")
def test_waiting_for_images_is_a_share_of_the_time() -> None:
    (row,) = images.loading(Job("loading", ("0",), "small", 2, 32, rounds=2))
    assert 0 < row["share"] < 1 and row["rates"]["loaded"] > 0
    assert sum(row["stages"].values()) == pytest.approx(1) and min(row["stages"].values()) > 0


@pytest.mark.usefixtures("small_networks")
def test_the_steps_of_the_flow_are_timed() -> None:
    seconds = around.flow("small", 32, torch.get_num_threads())
    assert list(seconds) == ["fuse", "prepare_qat", "convert", "quantize_bias", "fuse_qdq"]
    assert min(seconds.values()) > 0


def test_slopes_of_the_passes() -> None:
    (row,) = around.slopes(Job("slope", ("passes",)), layers=(5, 10))
    assert [chain["layers"] for chain in row["seconds"]] == [5, 10]
    assert set(row["slope"]) == {"remove_redundant_qdq", "quantize_bias", "fuse_qdq"}

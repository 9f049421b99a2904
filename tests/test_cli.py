"""The console command: what it refuses, with which line and code, and one whole run."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import qbench
from qbench import cli, data, job, targets, training
from qbench.errors import DataError, VerificationError
from qbench.job import Job
from qbench.models import build_model
from qbench.report import RunSummary
from qbench.report.targets import target_details, target_table
from qbench.report.text import run_table

pytest.importorskip("sklearn.datasets")

NETS = """
from torch import nn

def tiny(num_classes):
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Flatten(), nn.Linear(512, num_classes),
    )
"""


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("models") / "nets.py"
    file.write_text(NETS)
    return file


@pytest.fixture(autouse=True)
def keep_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def quick(nets: Path, out: Path, *more: str) -> list[str]:
    """A command line that trains a tiny model on 8 px digits for a moment."""
    model = ["--model", f"{nets}:tiny", "--image-size", "8", "--epochs", "1", "--qat-epochs", "0.5", "--threads", "1"]
    return ["train", "--out", str(out), *model, *more]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            ["--target", "onnxruntme"],
            "target 'onnxruntme' is unknown; expected one of onnxruntime, xnnpack, neutron, tosa, ",
        ),
        (
            ["--model", "resnet19"],
            "model 'resnet19' is neither a torchvision classification model nor file.py:function",
        ),
        (["--model", "no/nets.py:tiny"], "model file no/nets.py does not exist"),
        (
            ["--data", "digts"],
            "data 'digts' is unknown; expected one of: digits, imagefolder:DIR (did you mean digits?)",
        ),
        (["--data", "imagefolder:no/such"], "no/such is not a folder"),
        (["--weight-bits", "16"], "target onnxruntime has"),
        (["--bias-bits", "64"], "a bias of 64 bits"),
        (["--bias-scale", "their_own"], "their_own"),
        (["--target", "vulkan"], "target vulkan leaves activations in float, and a run compares their codes"),
        (["--epochs", "-1"], "epochs=-1.0: expected a number from 0 on"),
        (["--qat-epochs", "0"], "0 QAT epochs of 1347 images in batches of 64 are no step"),
        (["--qat-epochs", "0.01"], "0.01 QAT epochs of 1347 images in batches of 64 are no step"),
        (["--qat-lr", "0"], "lr=0.0: expected a number above 0"),
        (["--batch-size", "1"], "batch_size=1: expected at least 2"),
        (["--image-size", "0"], "image size 0: expected at least 1 pixel"),
        (["--freeze-bn-at", "60"], "freeze_bn_at=60.0: expected a share of the run in [0, 1]"),
        (["--threads", "0"], "threads 0: expected at least 1"),
        (["--max-batch", "0"], "max batch 0: expected at least 1"),
        (["--runtimes", "onnxruntime,tflite"], "there is no runtime 'tflite'; use one of 'onnxruntime', 'executorch'"),
    ],
)
def test_a_refusal_is_one_line_and_code_2(
    options: list[str], says: str, nets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(quick(nets, tmp_path / "runs" / "demo", *options)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("qbench: error: ")
    assert says in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_targets_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["targets"]) == 0
    out, err = capsys.readouterr()
    assert out == target_table(targets.TARGETS) + "\n" and err == ""


def test_one_target_is_told_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["targets", "vitis"]) == 0
    assert capsys.readouterr().out == target_details(targets.get("vitis")) + "\n"
    assert cli.main(["targets", "vits"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.endswith("did you mean 'vitis'?\n") and err.count("\n") == 1


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    command = f"{sys.executable} -m qbench targets | head -n 1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("target ")


def test_refusals_come_before_training(nets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An output folder that holds another run, or a bad width, must not cost an hour of training first."""

    def no_training(*args: object, **kwargs: object) -> None:
        raise AssertionError("training started")

    monkeypatch.setattr(training, "fit", no_training)
    earlier = tmp_path / "demo"
    earlier.mkdir()
    (earlier / "summary.json").write_text("{}")
    assert cli.main(quick(nets, earlier)) == 2
    assert cli.main(quick(nets, tmp_path / "other", "--weight-bits", "16")) == 2


def test_an_output_folder_that_holds_a_run_is_kept(
    nets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "summary.json").write_text("{}")
    assert cli.main(quick(nets, tmp_path)) == 2
    assert "already holds a run (summary.json); choose another --out, or add --overwrite" in capsys.readouterr().err
    assert (tmp_path / "summary.json").read_text() == "{}"


@pytest.mark.parametrize(
    "argv", [[], ["train"], ["train", "--out"], ["trian"], ["train", "--out", "x", "--epochs", "a"]]
)
def test_a_command_line_that_is_none_exits_with_2(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        cli.main(argv)
    assert raised.value.code == 2


def test_defaults_of_the_parser_are_those_of_the_job() -> None:
    arguments = cli.build_parser().parse_args(["train", "--out", "runs/demo"])
    assert cli.job_of(arguments) == Job(out=Path("runs/demo"))


@pytest.mark.parametrize("target", [name for name in targets.names() if name != "vulkan"])
def test_widths_that_nobody_asks_for_are_the_target_s_own(target: str, tmp_path: Path) -> None:
    parsed = cli.build_parser().parse_args(["train", "--out", str(tmp_path), "--target", target])
    assert qbench.get_qconfig(target, **job._widths(cli.job_of(parsed))) == qbench.get_qconfig(target)


def test_every_option_arrives_in_the_job() -> None:
    line = (
        "train --out o --model m --data d --target xnnpack --weight-bits 4 --activation-bits 5 --bias-bits 16 "
        "--bias-scale own --epochs 0.5 --lr 1 --qat-epochs 0.25 --qat-lr 2 --freeze-observers-at 0.1 "
        "--freeze-bn-at 0.2 --batch-size 7 --image-size 9 --seed 3 --threads 2 --workers 1 --max-batch 4 "
        "--verify-images 5 --runtimes executorch --overwrite"
    )
    made = cli.job_of(cli.build_parser().parse_args(line.split()))
    assert made == Job(
        out=Path("o"),
        model="m",
        data="d",
        target="xnnpack",
        weight_bits=4,
        activation_bits=5,
        bias_bits=16,
        bias_scale="own",
        float_training=training.Settings(epochs=0.5, lr=1.0, label_smoothing=0.1, batch_size=7, seed=3, workers=1),
        qat_training=training.Settings(
            epochs=0.25,
            lr=2.0,
            schedule="cosine",
            label_smoothing=0.1,
            freeze_observers_at=0.1,
            freeze_bn_at=0.2,
            batch_size=7,
            seed=3,
            workers=1,
        ),
        image_size=9,
        seed=3,
        threads=2,
        max_batch=4,
        verify_images=5,
        runtimes=("executorch",),
        overwrite=True,
    )


def test_an_error_from_a_reading_process_is_one_line() -> None:
    wrapped = DataError(
        "Caught DataError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File …\n"
        "qbench.errors.DataError: a/0.png cannot be decoded (OSError: truncated); remove it\n"
    )
    assert cli._message(wrapped) == "a/0.png cannot be decoded (OSError: truncated); remove it"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_or_terminated_it_tidies_up(
    number: signal.Signals,
    nets: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    seen: list[str] = []

    def interrupt(*args: object, **kwargs: object) -> None:
        seen.extend(path.name for path in (tmp_path / "runs").glob(".demo.*/*"))
        signal.raise_signal(number)

    monkeypatch.setattr(job, "verify", interrupt)
    if number == signal.SIGINT:  # a shell starts what it puts in the background with this one ignored
        restored = signal.signal(number, signal.default_int_handler)
        request.addfinalizer(lambda: signal.signal(number, restored))
    before = signal.getsignal(signal.SIGTERM)
    options = ["--epochs", "0.1", "--qat-epochs", "0.1", "--runtimes", "onnxruntime"]
    assert cli.main(quick(nets, tmp_path / "runs" / "demo", *options)) == 130
    assert sorted(seen) == ["model.onnx", "model.pt2", "qat.pt"]
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.fixture(scope="module")
def finished(nets: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """One whole run in a process of its own, and the folder that it made."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("executorch")
    out = tmp_path_factory.mktemp("runs") / "tiny"
    line = [sys.executable, "-m", "qbench", *quick(nets, out, "--epochs", "2", "--qat-epochs", "1")]
    return out, subprocess.run(line, capture_output=True, text=True, timeout=600)


def test_a_whole_run_prints_its_table_and_nothing_else(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    out, done = finished
    assert (done.returncode, done.stderr) == (0, ""), done.stderr  # quiet: stderr is no terminal
    assert done.stdout.strip() == run_table(summary_of(out), str(out))
    assert "(bits: weight 8, activation 8, bias 32)" in " ".join(done.stdout.split())
    assert max(map(len, done.stdout.replace(str(out), "runs/tiny").splitlines())) <= 80


def summary_of(out: Path) -> RunSummary:
    return RunSummary.from_json((out / "summary.json").read_text())


def test_a_whole_run_leaves_these_files_and_nothing_beside_them(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    out, _ = finished
    names = ["model.onnx", "model.pt2", "model.pte", "qat.pt", "report.html", "summary.json"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert [path.name for path in out.parent.iterdir()] == ["tiny"]
    sizes = {path.name: path.stat().st_size for path in out.iterdir() if path.name.startswith(("model", "qat"))}
    assert summary_of(out).files == sizes


def test_the_summary_says_what_was_promised(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    out, _ = finished
    fields = json.loads((out / "summary.json").read_text())
    assert fields["float_top1"] >= 0.95
    assert fields["qat_top1"] >= 0.95
    assert set(fields["deployed_top1"]) == {"onnxruntime", "executorch"}
    assert all(abs(top1 - fields["float_top1"]) <= 0.01 for top1 in fields["deployed_top1"].values())
    assert fields["mismatches"]["parameters"] == 0
    assert fields["mismatches"]["eval_vs_program"] == 0
    assert set(fields["mismatches"]) == {
        "parameters",
        "eval_vs_program",
        "program_vs_onnxruntime",
        "program_vs_executorch",
        "integer_vs_onnxruntime",
        "integer_vs_executorch",
    }
    assert fields["mismatches"]["integer_vs_onnxruntime"] == fields["mismatches"]["integer_vs_executorch"] == 0
    kept = ("parameters", "eval_vs_program", "integer_vs_onnxruntime", "integer_vs_executorch")
    assert fields["promises"] == dict.fromkeys(kept, True)
    weights = 16 * 27 + 16 + 32 * 144 + 32 + 512 * 10 + 10
    assert fields["compared"] == {
        "parameters": weights,
        "eval_vs_program": 4500,
        "program_vs_onnxruntime": 4500,
        "program_vs_executorch": 4500,
        # Codes of the image, of both convolutions and of the classifier, and the reals that the files return.
        "integer_vs_onnxruntime": 450 * (3 * 64 + 16 * 64 + 32 * 16 + 10 + 10),
        "integer_vs_executorch": 450 * (3 * 64 + 16 * 64 + 32 * 16 + 10 + 10),
    }
    rows = fields["by_layer"]["integer_vs_executorch"]
    assert [row["name"] for row in rows] == ["0.inputs.0", "0", "3", "7", "output"]
    assert fields["codes_compared"] == sum(fields["compared"].values())
    assert set(fields["seconds"]) == {"float", "qat", "convert", "export", "verify", "score", "report", "total"}
    assert fields["held_out"] == 450
    layers = fields["layers"]
    assert [layer["codes"] for layer in layers.values()] == [16 * 27 + 16, 32 * 144 + 32, 512 * 10 + 10]
    assert all(layer["different"] == 0 and layer["accumulator"] < 2**31 for layer in layers.values())
    assert min(spread["distinct"] for spread in fields["spread"].values()) >= 50
    assert fields["settings"]["bn_frozen_at_step"] > fields["settings"]["observers_frozen_at_step"] > 0


def test_qat_weights_are_tensors_that_load_alone(
    finished: tuple[Path, subprocess.CompletedProcess[str]], nets: Path
) -> None:
    """`qat.pt` goes back into a freshly prepared model, which then ranks every image as the run's model did."""
    out, _ = finished
    state = torch.load(out / "qat.pt", weights_only=True)
    assert state
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    images = data.load("digits", image_size=8)
    example = (images.example,)
    fresh = qbench.fuse(build_model(f"{nets}:tiny", 10).eval(), example_inputs=example)
    model = qbench.prepare_qat(fresh.train(), qconfig=qbench.get_qconfig(), example_inputs=example)
    model.load_state_dict(state)
    score = training.evaluate(model, data.batches(images.held_out, 64))
    assert score.top1 == summary_of(out).qat_top1


def test_a_failure_in_the_middle_leaves_nothing(
    nets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Verification fails after the files were written: neither they nor the folders made for them stay."""
    seen: list[str] = []

    def fail(*args: object, **kwargs: object) -> None:
        seen.extend(path.name for path in (tmp_path / "runs").glob(".demo.*/*"))
        raise VerificationError("the two sides differ in shape")

    monkeypatch.setattr(job, "verify", fail)
    options = ["--epochs", "0.2", "--qat-epochs", "0.2", "--runtimes", "onnxruntime"]
    assert cli.main(quick(nets, tmp_path / "runs" / "demo", *options)) == 2
    assert sorted(seen) == ["model.onnx", "model.pt2", "qat.pt"]
    assert capsys.readouterr().err == "qbench: error: the two sides differ in shape\n"
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def run_folder(finished: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path) -> Path:
    """A copy of the whole run, to be changed."""
    return Path(shutil.copytree(finished[0], tmp_path / "run"))


def test_the_report_of_a_run_says_what_the_run_says(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    page = (finished[0] / "report.html").read_text(encoding="utf-8")
    assert "All 4 promised zeros are zero" in page
    assert f"{summary_of(finished[0]).compared['integer_vs_onnxruntime']:,}" in page
    for heading in ("Bias error", "Weights", "Activations", "Code histograms"):
        assert f">{heading}</h2>" in page


def test_a_run_is_verified_again(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_folder / "report.html").unlink()
    before = summary_of(run_folder)
    assert cli.main(["verify", str(run_folder)]) == 0
    out, err = capsys.readouterr()
    assert "every promised 0 is 0" in out and err == ""
    assert "integer program vs ExecuTorch" in out and "was not rebuilt" not in out
    page = (run_folder / "report.html").read_text(encoding="utf-8")
    assert "Bias error" in page and f"{before.compared['integer_vs_executorch']:,}" in page
    assert summary_of(run_folder) == before


def test_a_model_that_is_not_of_its_files_ends_with_1(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A weight of the QAT model was changed after the run, and one runtime's file is gone."""
    (run_folder / "model.pte").unlink()
    state = torch.load(run_folder / "qat.pt", weights_only=True)
    state["3.weight"][5] *= -1
    torch.save(state, run_folder / "qat.pt")
    assert cli.main(["verify", str(run_folder), "--verify-images", "64"]) == 1
    out, _ = capsys.readouterr()
    assert "a promised 0 is not 0" in out and "3.weight: " in out and "ExecuTorch" not in out
    page = (run_folder / "report.html").read_text(encoding="utf-8")
    assert "A promised zero is not zero: trained codes vs converted codes" in page


def test_without_its_weights_a_run_is_verified_as_far_as_it_goes(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run_folder / "qat.pt").unlink()
    (run_folder / "model.pte").unlink()
    assert cli.main(["verify", str(run_folder), "--verify-images", "64"]) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert "the QAT model was not rebuilt, so parameters, QAT eval and figures are left out" in words
    assert "Bias error" not in (run_folder / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("summary", "says"),
    [(None, "holds no run (no summary.json); qbench train --out"), ("{", "is not the summary of a run")],
)
def test_a_folder_without_a_run_is_refused(
    summary: str | None, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if summary is not None:
        (tmp_path / "summary.json").write_text(summary)
    assert cli.main(["verify", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and says in err and err.count("\n") == 1

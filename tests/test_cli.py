"""The console command: what it refuses, with which line and code, and one whole run."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from qbench import cli, job, training
from qbench.errors import DataError
from qbench.job import Job
from qbench.report import RunSummary

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
            "target 'onnxruntme' is unknown; expected one of onnxruntime, xnnpack, neutron; did",
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
        (["--bias-bits", "64"], "target onnxruntime has"),
        (["--bias-scale", "their_own"], "their_own"),
        (["--epochs", "-1"], "epochs=-1.0: expected a number from 0 on"),
        (["--qat-lr", "0"], "lr=0.0: expected a number above 0"),
        (["--batch-size", "1"], "batch_size=1: expected at least 2"),
        (["--image-size", "0"], "image size 0: expected at least 1 pixel"),
        (["--freeze-bn-at", "60"], "freeze_bn_at=60.0: expected a share of the run in [0, 1]"),
        (["--threads", "0"], "threads 0: expected at least 1"),
        (["--deploy-batch", "0"], "deploy batch 0: expected at least 1"),
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


def test_every_option_arrives_in_the_job() -> None:
    line = (
        "train --out o --model m --data d --target xnnpack --weight-bits 4 --activation-bits 5 --bias-bits 16 "
        "--bias-scale own --epochs 0.5 --lr 1 --qat-epochs 0.25 --qat-lr 2 --freeze-observers-at 0.1 "
        "--freeze-bn-at 0.2 --batch-size 7 --image-size 9 --seed 3 --threads 2 --workers 1 --deploy-batch 4 --verify-images 5 "
        "--runtimes executorch --overwrite"
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
        deploy_batch=4,
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


def test_interrupting_ends_with_130(nets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "fit", interrupt)
    assert cli.main(quick(nets, tmp_path / "demo")) == 130
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("size", "count"), [(1, 5), (2, 3), (5, 1), (4, 2), (8, 1)])
def test_fill_makes_every_batch_full(size: int, count: int) -> None:
    pixels = torch.arange(5.0).view(5, 1)
    filled = [job.fill(part, size) for part in pixels.split(size)]
    assert [len(part) for part in filled] == [size] * count
    assert torch.equal(torch.cat(filled)[:5], pixels)
    assert (torch.cat(filled)[5:] == 4).all()

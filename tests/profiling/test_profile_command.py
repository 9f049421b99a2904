"""`qbench profile`: what it prints and writes, and what it refuses in one line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from qbench import cli
from qbench.report.profile import TrainingProfile

NETS = """
from torch import nn

def tiny(num_classes):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes),
    )"""


@pytest.fixture
def nets(tmp_path: Path) -> str:
    (tmp_path / "nets.py").write_text(NETS)
    return str(tmp_path / "nets.py")


@pytest.fixture(autouse=True)
def keep_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def line(nets: str, *more: str) -> list[str]:
    return ["profile", "--model", f"{nets}:tiny", "--batch-size", "2", "--image-size", "8", "--rounds", "1", *more]


def test_it_prints_a_table_and_writes_json(nets: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "profile.json"
    options = ["--order", "model", "--top", "2", "--json", str(file), "--low-memory", "--channels-last", "--fast-path"]
    assert cli.main(line(nets, *options, "--threads", "1", "--target", "xnnpack", "--method", "lsq")) == 0
    out, err = capsys.readouterr()
    profile = TrainingProfile.from_json(file.read_text(encoding="utf-8"))
    assert out == profile.table("model", 2) + "\n" and err == ""
    assert [row.path for row in profile.layers] == ["0", "3", "4", "5"] and "2 more layers" in out
    assert profile.settings["threads"] == 1 and profile.settings["inputs"] == "(2, 3, 8, 8)"


def test_top_0_shows_all(nets: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(line(nets, "--top", "0", "--autocast", "bfloat16")) == 0
    out, _ = capsys.readouterr()
    assert "more layer" not in out and "bfloat16" in out


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--model", "resnet19"], "model 'resnet19' is neither a torchvision classification model nor"),
        (["--target", "onnxruntme"], "target 'onnxruntme' is unknown"),
        (["--method", "lsqq"], "lsqq"),
        (["--image-size", "2"], "profile_qat: the float model cannot take a training step on inputs (2, 3, 2, 2)"),
        (["--json", "no/such/file.json"], "--json no/such/file.json: there is no folder no/such"),
    ],
)
def test_a_refusal_is_one_line_and_code_2(
    options: list[str], says: str, nets: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(line(nets, *options)) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("qbench: error: ") and says in err and err.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_is_refused_where_there_is_none(nets: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(line(nets, "--device", "cuda")) == 2
    assert "device 'cuda': expected cpu, or cuda where PyTorch finds a GPU" in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--rounds", "0"], ["--top", "-1"], ["--order", "size"], ["--batch-size", "x"]])
def test_options_out_of_range_get_the_usage(options: list[str], nets: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(line(nets, *options))

"""Models by name: torchvision's behind the import shim, and functions in files of the user's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from qbench.errors import ConfigError
from qbench.models import build_model, check_outputs

NETS = """
import torch
from torch import nn
from helper import width

def tiny(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(width, num_classes))

def tiny_of_three():
    return nn.Sequential(nn.Flatten(), nn.Linear(width, 3))

def broken(num_classes):
    return nn.Linear(-1, "x")

def no_model():
    return 7

constant = 3
"""


@pytest.fixture
def nets(tmp_path: Path) -> Path:
    (tmp_path / "helper.py").write_text("width = 12")
    (tmp_path / "nets.py").write_text(NETS)
    return tmp_path / "nets.py"


def test_torchvision_imports_or_is_repaired_in_a_fresh_process() -> None:
    pytest.importorskip("torch")
    code = (
        "import warnings; warnings.simplefilter('error')\n"
        "from qbench._torchvision import import_torchvision\n"
        "torchvision = import_torchvision()\n"
        "import torch, sys, torchvision.models, torchvision.ops\n"
        "assert import_torchvision() is torchvision is sys.modules['torchvision']\n"
        "assert torchvision.extension is sys.modules['torchvision.extension']\n"
        "print(torchvision.models.resnet18(num_classes=3)(torch.zeros(2, 3, 32, 32)).shape)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["torch.Size([2,", "3])"], done.stderr


def test_the_repair_acts_on_that_error_alone(tmp_path: Path) -> None:
    """A torchvision that fails for another reason keeps its own error."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::roi does not exist')"
    )
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from qbench import _torchvision\n"
        "try:\n"
        "    _torchvision.import_torchvision()\n"
        "except RuntimeError as error:\n"
        "    print(error, len(_torchvision._libraries))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "operator torchvision::roi does not exist 0", done.stderr


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "squeezenet1_1"])
def test_torchvision_models_get_the_number_of_classes(name: str) -> None:
    pytest.importorskip("PIL")
    model = build_model(name, 7).eval()
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 7)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("resnet19", r"'resnet19' is neither .* near names: .*resnet18"),
        ("Mobilenet-V2", "near names: .*mobilenet_v2"),
        ("zzzz", "near names: resnet18, mobilenet_v2"),
        ("nets.py", "expected file.py:function"),
        ("nets:tiny", "expected file.py:function"),
        ("missing.py:tiny", r"missing\.py does not exist"),
    ],
)
def test_unknown_models(spec: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        build_model(spec, 10)


@pytest.mark.parametrize(("name", "classes"), [("tiny", 5), ("tiny_of_three", 3)])
def test_a_function_of_a_file_builds_the_model(nets: Path, name: str, classes: int) -> None:
    model = build_model(f"{nets}:{name}", 5)
    assert model(torch.zeros(2, 3, 2, 2)).shape == (2, classes)
    assert str(nets.parent) not in sys.path


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("tinny", r"nets\.py has no function 'tinny'; near names: tiny"),
        ("constant", "has no function 'constant'"),
        ("broken", r"broken failed: \w+: .* \(line 13\)"),
        ("no_model", r"returned int; expected a torch\.nn\.Module"),
    ],
)
def test_a_function_that_does_not_build_a_model(nets: Path, name: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        build_model(f"{nets}:{name}", 5)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("x = 1\nraise OSError('no weights here')", r"cannot be imported: OSError: no weights here \(line 2\)"),
        ("def tiny(:\n", "cannot be imported: SyntaxError in line 1"),
        ("import no_such_package_of_mine", "ModuleNotFoundError: No module named 'no_such_package_of_mine'"),
    ],
)
def test_a_file_that_cannot_be_imported(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "nets.py").write_text(text)
    with pytest.raises(ConfigError, match=says):
        build_model(f"{tmp_path / 'nets.py'}:tiny", 5)
    assert str(tmp_path) not in sys.path


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (nn.Flatten(), r"returned shape \(2, 48\); expected a tensor of shape \(2, 10\)"),
        (nn.Linear(5, 10), r"cannot run on images of shape \(2, 3, 4, 4\): .* another --image-size"),
    ],
)
def test_outputs_of_the_wrong_shape(model: nn.Module, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        check_outputs(model, "m", torch.zeros(2, 3, 4, 4), 10)
    assert model.training


def test_outputs_that_are_no_tensor() -> None:
    class Pair(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x, x

    with pytest.raises(ConfigError, match="returned tuple; expected a tensor"):
        check_outputs(Pair(), "m", torch.zeros(2, 10), 10)


def test_a_part_that_is_frozen_stays_so() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3).eval(), nn.Flatten(), nn.Linear(48, 10))
    check_outputs(model, "m", torch.zeros(2, 3, 4, 4), 10)
    assert [module.training for module in model.modules()] == [True, False, True, True]

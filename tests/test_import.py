"""`import qbench` needs torch and numpy, says nothing and pulls in no extra; a missing extra gives the pip command."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

import qbench

EXTRAS = ["torchvision", "onnx", "onnxruntime", "onnxscript", "executorch", "torchao", "sklearn", "PIL", "tqdm"]

# A process in which the extras are not to be found, as where they are not installed: a finder that raised instead would
# also break libraries that only look whether something is there.
WITHOUT_EXTRAS = f"""
import sys
from importlib.machinery import PathFinder

class Hiding:
    @staticmethod
    def find_spec(name, path=None, target=None):
        hidden = name.partition(".")[0] in {EXTRAS!r}
        return None if hidden else PathFinder.find_spec(name, path, target)

assert PathFinder in sys.meta_path
sys.meta_path[:] = [Hiding if finder is PathFinder else finder for finder in sys.meta_path]
"""

USE_WITHOUT_EXTRAS = """
import json
import torch
from torch import nn
import qbench, qbench.cli, qbench.data, qbench.models

torch.manual_seed(0)
x = torch.randn(2, 3, 8, 8)
model = qbench.fuse(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))
model = qbench.prepare_qat(model, qconfig=qbench.get_qconfig("onnxruntime"), example_inputs=(x,))
model(x)
program = qbench.convert(model.eval(), (x,))
found = qbench.verify(model, program, (x,))

def message(call):
    try:
        call()
    except qbench.errors.MissingDependencyError as error:
        return str(error)

print(json.dumps({
    "exact": found.exact,
    "notes": found.notes,
    "biases": len(qbench.passes.quantize_bias(qbench.convert(model, (x,))).quantized),
    "onnx": message(lambda: qbench.export.to_onnx(program, "model.onnx")),
    "executorch": message(lambda: qbench.export.to_executorch(program, "model.pte")),
    "data": message(lambda: qbench.data.load("digits")),
    "vision": message(lambda: qbench.models.build_model("resnet18", 10)),
    "command": qbench.cli.main(["train", "--out", "run"]),
}))
"""


def run_python(code: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=300)


@lru_cache(maxsize=1)
def modules_that_qbench_adds() -> frozenset[str]:
    """Names in sys.modules after qbench and all that is public, that `import torch, numpy` alone does not bring."""
    done = run_python(
        "import sys, torch, numpy; before = set(sys.modules)\n"
        "import qbench; [getattr(qbench, name) for name in qbench.__all__]\n"
        "print(*sorted(set(sys.modules) - before), sep='\\n')"
    )
    assert done.returncode == 0, done.stderr
    return frozenset(done.stdout.split())


def test_what_training_does_not_need_is_imported_when_it_is_named() -> None:
    done = run_python(
        "import sys, json, qbench\n"
        "later = ['export', 'passes', 'ptq', 'conversion', 'verification', 'checkpoints', 'profiling', 'one_call']\n"
        "early = [name for name in later if f'qbench.{name}' in sys.modules]\n"
        "found = {name: getattr(qbench, name).__name__ for name in [*qbench.__all__, *later]}\n"
        "print(json.dumps([early, found, sorted(set(found) - set(dir(qbench)))]))"
    )
    assert done.returncode == 0, done.stderr
    early, found, undiscovered = json.loads(done.stdout)
    assert not early and not undiscovered
    assert found["ptq"] == "qbench.ptq" and found["verification"] == "qbench.verification"
    assert found["convert"] == "convert" and found["load_program"] == "load_program"


def test_a_name_that_is_none_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'qbench' has no attribute 'quantise'"):
        qbench.quantise  # noqa: B018


def test_import_pulls_in_no_extra() -> None:
    added = modules_that_qbench_adds()
    assert "qbench.conversion" in added
    assert {name for name in added if name.split(".")[0] in EXTRAS} == set()


def test_import_pulls_in_nothing_of_torch_ao() -> None:
    assert {name for name in modules_that_qbench_adds() if name.startswith("torch.ao")} == set()


def test_import_says_nothing_and_warns_of_nothing() -> None:
    # torch first, with its own warnings allowed: only what qbench adds is under test
    done = run_python("import torch, numpy, warnings; warnings.simplefilter('error'); import qbench")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.fixture(scope="module")
def without_extras(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process says that has torch and numpy only, and goes the whole way from float to Q/DQ program."""
    # the package is found wherever this process finds it, installed or not
    import qbench

    found = f"import sys; sys.path.insert(0, {str(Path(qbench.__file__).parents[1])!r})\n"
    done = run_python(found + WITHOUT_EXTRAS + USE_WITHOUT_EXTRAS, tmp_path_factory.mktemp("without_extras"))
    assert done.returncode == 0, done.stderr
    return {**json.loads(done.stdout), "stderr": done.stderr}


def test_the_way_to_a_program_needs_no_extra(without_extras: dict[str, Any]) -> None:
    assert without_extras["exact"] == {"parameters": True, "eval_vs_program": True}
    assert without_extras["biases"] == 1


@pytest.mark.parametrize(
    ("extra", "package"),
    [("onnx", "onnx"), ("executorch", "executorch"), ("data", "sklearn"), ("vision", "torchvision")],
)
def test_missing_extra_gives_the_pip_command(without_extras: dict[str, Any], extra: str, package: str) -> None:
    message = without_extras[extra]
    assert message.startswith(f"{package} is needed to ")
    assert message.endswith(f"pip install 'qbench[{extra}]'")


def test_runtimes_that_are_not_installed_are_noted(without_extras: dict[str, Any]) -> None:
    noted = [note for note in without_extras["notes"] if "pip install" in note]
    assert [note.split()[0] for note in noted] == ["onnxruntime", "executorch"]


def test_the_command_refuses_before_it_trains(without_extras: dict[str, Any]) -> None:
    assert without_extras["command"] == 2
    assert "pip install 'qbench[" in without_extras["stderr"]
    assert "Traceback" not in without_extras["stderr"]

"""`import qbench` needs torch and numpy, says nothing, and pulls in no extra; a missing extra gives the pip command."""

from __future__ import annotations

import subprocess
import sys

import pytest

EXTRAS = ["torchvision", "onnx", "onnxruntime", "onnxscript", "executorch", "torchao", "sklearn", "PIL", "tqdm"]

BLOCK = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocker())
"""


def run_python(code: str, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *flags, "-c", code], capture_output=True, text=True, timeout=300)


def modules_that_qbench_adds() -> set[str]:
    """Names in sys.modules after `import qbench` that `import torch, numpy` alone does not bring."""
    code = (
        "import sys, torch, numpy; before = set(sys.modules)\n"
        "import qbench; print(*sorted(set(sys.modules) - before), sep='\\n')"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_import_pulls_in_no_extra() -> None:
    added = modules_that_qbench_adds()
    assert "qbench" in added
    assert {name for name in added if name.split(".")[0] in EXTRAS} == set()


def test_import_pulls_in_nothing_of_torch_ao() -> None:
    assert {name for name in modules_that_qbench_adds() if name.startswith("torch.ao")} == set()


def test_import_says_nothing_and_warns_of_nothing() -> None:
    # torch first, with its own warnings allowed: only what qbench adds is under test
    done = run_python("import torch, numpy, warnings; warnings.simplefilter('error'); import qbench")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_import_works_where_no_extra_is_installed() -> None:
    done = run_python(BLOCK.format(blocked=set(EXTRAS)) + "import qbench, qbench.cli")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("module", "extra"),
    [("onnxruntime", "onnx"), ("onnx", "onnx"), ("executorch", "executorch"), ("torchvision", "vision")],
)
def test_missing_extra_gives_the_pip_command(module: str, extra: str) -> None:
    code = BLOCK.format(blocked={module}) + (
        "from qbench.errors import require, MissingDependencyError\n"
        "try:\n"
        f"    require('{module}', extra='{extra}', purpose='do this')\n"
        "except MissingDependencyError as error:\n"
        "    print(error)\n"
    )
    done = run_python(code)
    assert f"pip install 'qbench[{extra}]'" in done.stdout, done.stderr
    assert module in done.stdout


def test_a_fault_inside_an_extra_is_not_called_missing() -> None:
    """sklearn is there but one of its own imports is not: the real error must reach the user."""
    code = BLOCK.format(blocked={"scipy"}) + (
        "from qbench.errors import require, MissingDependencyError\n"
        "try:\n"
        "    require('sklearn.datasets', extra='data', purpose='load digits')\n"
        "except ModuleNotFoundError as error:\n"
        "    print(type(error).__name__, error.name)\n"
    )
    done = run_python(code)
    assert done.stdout.split()[:1] == ["ModuleNotFoundError"], done.stderr

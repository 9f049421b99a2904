"""Every error of qbench is a QBenchError, and `require` tells a missing package from a broken one."""

from __future__ import annotations

import builtins
import inspect
import sys
from pathlib import Path

import pytest

from qbench import errors
from qbench.errors import MissingDependencyError, QBenchError, QBenchWarning, require

KINDS = {
    "ConfigError": ValueError,
    "NumericsError": ValueError,
    "FusionError": ValueError,
    "PreparationError": RuntimeError,
    "LinkError": RuntimeError,
    "ConversionError": RuntimeError,
    "PassError": RuntimeError,
    "ExportError": RuntimeError,
    "VerificationError": RuntimeError,
    "DataError": ValueError,
    "MissingDependencyError": ImportError,
}


def exceptions_of_the_module() -> dict[str, type[Exception]]:
    found = inspect.getmembers(errors, lambda value: inspect.isclass(value) and issubclass(value, Exception))
    return {name: kind for name, kind in found if kind.__module__ == errors.__name__}


def package(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, **files: str) -> None:
    """A package that can be imported in this test only; `inner="…"` is its file inner.py."""
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(files.pop("init", ""))
    for module, text in files.items():
        (folder / name / f"{module}.py").write_text(text)
    monkeypatch.syspath_prepend(folder)
    for module in [name, *(f"{name}.{module}" for module in files)]:
        monkeypatch.delitem(sys.modules, module, raising=False)


def test_the_table_lists_every_kind() -> None:
    assert set(exceptions_of_the_module()) == {*KINDS, "QBenchError", "QBenchWarning"}


@pytest.mark.parametrize(("name", "builtin"), KINDS.items())
def test_a_kind_is_caught_as_qbench_error_and_as_the_builtin(name: str, builtin: type[Exception]) -> None:
    kind = getattr(errors, name)
    for caught in (QBenchError, builtin, Exception):
        with pytest.raises(caught, match="the message"):
            raise kind("the message")
    others = {getattr(errors, other) for other in KINDS if other != name}
    assert not any(issubclass(kind, other) for other in others)
    assert inspect.getdoc(kind) and inspect.getdoc(kind) != inspect.getdoc(builtin)


def test_no_kind_hides_a_builtin() -> None:
    assert not set(exceptions_of_the_module()) & set(dir(builtins))


def test_the_warning_is_no_error() -> None:
    assert issubclass(QBenchWarning, UserWarning)
    assert not issubclass(QBenchWarning, QBenchError)


# require --------------------------------------------------------------------------------------------------------------


def test_require_returns_the_module_that_was_asked_for() -> None:
    assert require("json", extra="none", purpose="test") is sys.modules["json"]
    assert require("json.decoder", extra="none", purpose="test") is sys.modules["json.decoder"]


@pytest.mark.parametrize("module", ["qbench_absent", "qbench_absent.inner.deeper"])
def test_a_missing_package_gives_the_pip_command(module: str) -> None:
    with pytest.raises(MissingDependencyError) as caught:
        require(module, extra="onnx", purpose="write a file")
    assert str(caught.value) == (
        "qbench_absent is needed to write a file and is not installed: pip install 'qbench[onnx]'"
    )
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


def test_a_package_that_misses_another_is_not_itself_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(tmp_path, monkeypatch, "qbench_needy", init="import qbench_absent.inner")
    with pytest.raises(ModuleNotFoundError) as caught:
        require("qbench_needy", extra="onnx", purpose="test")
    assert not isinstance(caught.value, QBenchError)
    assert caught.value.name == "qbench_absent"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("raise RuntimeError('two copies of a registry')", RuntimeError),
        ("from json import nothing_of_that_name", ImportError),
        ("import json.nothing_of_that_name", ModuleNotFoundError),
        ("def", SyntaxError),
    ],
)
def test_a_broken_module_in_a_package_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, error: type[Exception]
) -> None:
    package(tmp_path, monkeypatch, "qbench_broken", inner=text)
    with pytest.raises(error) as caught:
        require("qbench_broken.inner", extra="onnx", purpose="test")
    assert not isinstance(caught.value, QBenchError)


@pytest.mark.parametrize("text", ["import qbench_partial.gone", None])
def test_a_package_without_one_of_its_own_modules_is_not_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None
) -> None:
    """A broken installation, or a version that moved the module: the package is there, so it is not to be installed."""
    package(tmp_path, monkeypatch, "qbench_partial", **({} if text is None else {"inner": text}))
    with pytest.raises(ModuleNotFoundError) as caught:
        require("qbench_partial.inner", extra="onnx", purpose="test")
    assert not isinstance(caught.value, MissingDependencyError)

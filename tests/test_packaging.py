"""The project's own files agree with each other: extras, tested versions, make targets, checks."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = SETTINGS["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
MAKEFILE = (ROOT / "Makefile").read_text()


def package_name(requirement: str) -> str:
    """`"codespell[toml]>=2 ; marker"` -> `"codespell"`."""
    return re.match(r"[A-Za-z0-9._-]+", requirement.strip())[0].lower().replace("_", "-")  # type: ignore[index]


def constrained() -> set[str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {package_name(line) for line in lines if line and not line.startswith("#")}


def test_every_dependency_has_a_tested_version() -> None:
    named = [*PROJECT["dependencies"], *(name for names in EXTRAS.values() for name in names)]
    assert {package_name(name) for name in named} - {"qbench"} - constrained() == set()


def test_all_is_every_extra_but_dev() -> None:
    inside = re.fullmatch(r"qbench\[(.*)\]", EXTRAS["all"][0])
    assert inside is not None
    assert set(inside[1].split(",")) == set(EXTRAS) - {"all", "dev"}


def test_every_extra_that_an_error_names_exists() -> None:
    named = {
        (path.relative_to(ROOT).as_posix(), extra)
        for path in (ROOT / "qbench").rglob("*.py")
        for extra in re.findall(r"""\bextra=["']([a-z]+)["']""", path.read_text())
    }
    assert named, "no file of the package asks for an extra: this test has lost its subject"
    assert {entry for entry in named if entry[1] not in EXTRAS} == set()


def test_every_pip_install_is_constrained() -> None:
    installs = [line for line in MAKEFILE.splitlines() if " install " in line and "PIP" in line]
    assert installs
    assert [line for line in installs if "-c constraints.txt" not in line] == []


@pytest.mark.parametrize("target", ["demo", "test", "test-all", "lint", "clean", "help"])
def test_make_target_exists_and_expands(target: str) -> None:
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"\n{target}:" in MAKEFILE


def test_ci_runs_the_same_as_a_person() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text().splitlines()[-1] == "make test"


def test_console_script_points_at_a_function() -> None:
    module, _, function = PROJECT["scripts"]["qbench"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_package_is_typed() -> None:
    assert (ROOT / "qbench" / "py.typed").is_file()


def test_files_that_are_not_python_are_part_of_the_package() -> None:
    patterns = SETTINGS["tool"]["setuptools"]["package-data"]["qbench"]
    packed = {path for pattern in patterns for path in (ROOT / "qbench").glob(pattern)}
    others = {path for path in (ROOT / "qbench").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert {path for path in others if path.suffix != ".py"} == packed
    assert len(packed) > 1

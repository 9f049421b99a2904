"""Files import only downwards: the floors of CONTRIBUTING.md, from the ground up."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "qbench"

FLOORS = (
    ("errors",),
    ("attributes",),
    ("modes",),
    ("numerics",),
    ("graph",),
    ("observers",),
    ("fake_quantize",),
    ("targets",),
    ("qconfig",),
    ("overrides",),
    ("report",),
    ("nn",),
    ("mappings",),
    ("torch_ao",),
    ("attention",),
    ("tracing",),
    ("fusion",),
    ("grouping",),
    ("linking",),
    ("preparation",),
    ("one_call",),
    ("checkpoints",),
    ("coverage",),
    ("conversion",),
    ("ops",),
    ("passes",),
    ("evaluation",),
    ("export",),
    ("verification",),
    ("ptq",),
    ("_torchvision", "folders"),
    ("data", "models"),
    ("training", "profiling"),
    ("job",),
    ("past_runs",),
    ("cli",),
    ("__main__",),
)
LEVEL = {name: level for level, floor in enumerate(FLOORS) for name in floor}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def floor_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Parts of qbench that a file imports, inside functions too; the public face `import qbench` is left out."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module == "qbench":
            names = [f"qbench.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("qbench.")}
    return found


def test_every_part_of_the_package_has_a_floor() -> None:
    assert {floor_of(path) for path in FILES} == set(LEVEL)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_downwards(path: Path) -> None:
    here = floor_of(path)
    above = {name for name in imported(path) if LEVEL[name] >= LEVEL[here] and name != here}
    assert not above, f"{here} imports {sorted(above)}, which are not below it"


def test_only_the_commands_import_the_public_face() -> None:
    users = {floor_of(path) for path in FILES if "\nimport qbench\n" in path.read_text(encoding="utf-8")}
    assert users <= {"training", "job", "cli", "models"}

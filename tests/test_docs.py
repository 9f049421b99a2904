"""The documentation is run: its Python, its commands, its links.

In README.md and docs/*.md every ```python block is executed, the blocks of one file in order and in one namespace. A
block that cannot be run here follows a comment `<!-- not run: reason -->`; the reason is required. Each line of a
```console block that starts with `qbench` or `make` must be a command that exists.
"""

from __future__ import annotations

import re
import runpy
import shlex
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from qbench import mappings
from qbench.cli import build_parser

ROOT = Path(__file__).parents[1]
RUN = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKED = [*RUN, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
MAKE_TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))

BLOCK = re.compile(r"^```(?P<kind>[a-z]*)\n(?P<text>.*?)^```$", flags=re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"<!-- not run:(?P<reason>[^>]*)-->\s*\Z")
LINK = re.compile(r"(?<!\\)\]\((?P<target>[^)\s]+)\)|<img[^>]* src=\"(?P<image>[^\"]+)\"")


@dataclass(frozen=True)
class Block:
    """One fenced block. `skip` is the reason why it is not run, None where it is run; `line` counts from 1."""

    kind: str
    text: str
    line: int
    skip: str | None


def blocks(text: str, kind: str) -> list[Block]:
    """The fenced blocks of one kind, in order."""
    found = []
    for match in BLOCK.finditer(text):
        before = text[: match.start()]
        marker = NOT_RUN.search(before)
        skip = None if marker is None else marker["reason"].strip()
        found.append(Block(match["kind"], match["text"], before.count("\n") + 2, skip))
    return [block for block in found if block.kind == kind]


def run_blocks(path: Path, text: str) -> dict[str, Any]:
    """Execute the python blocks of `text` in one module; tracebacks show the file's own line numbers."""
    module = types.ModuleType(f"docs_{path.stem}")
    sys.modules[module.__name__] = module  # so that what the page defines can be pickled and inspected
    for block in blocks(text, "python"):
        if block.skip is None:
            code = compile("\n" * (block.line - 1) + block.text, str(path), "exec")
            exec(code, module.__dict__)
    return module.__dict__


def commands(text: str) -> list[list[str]]:
    """The command lines of the console blocks, without prompt, comment and continuation."""
    lines = "\n".join(block.text for block in blocks(text, "console")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line.removeprefix("$ "), comments=True))]


def anchors(text: str) -> set[str]:
    """The names that headings get when the page is shown: lower case, spaces as hyphens, punctuation dropped."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", text), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def links(text: str) -> list[str]:
    """Targets of the links and images that point inside the repository."""
    targets = [match["target"] or match["image"] for match in LINK.finditer(BLOCK.sub("", text))]
    return [target for target in targets if "://" not in target]


def ids(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", [path for path in RUN if blocks(path.read_text(), "python")], ids=ids)
def test_python_of_the_page_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mappings, "_REGISTERED", [])  # a pattern that the page registers ends with the page
    run_blocks(path, path.read_text())


@pytest.mark.parametrize("path", RUN, ids=ids)
def test_a_block_that_is_not_run_says_why(path: Path) -> None:
    assert [block.line for block in blocks(path.read_text(), "python") if block.skip == ""] == []


@pytest.mark.parametrize("path", [path for path in LINKED if commands(path.read_text())], ids=ids)
def test_commands_of_the_page_exist(path: Path) -> None:
    for words in commands(path.read_text()):
        if words[0] == "qbench":
            build_parser().parse_args(words[1:])  # exits, with its usage, on what it does not know
        elif words[0] == "make":
            assert set(words[1:]) <= MAKE_TARGETS, words


@pytest.mark.parametrize("path", LINKED, ids=ids)
def test_links_of_the_page_resolve(path: Path) -> None:
    for target in links(path.read_text()):
        file, _, anchor = target.partition("#")
        page = (path.parent / file).resolve() if file else path
        assert page.exists(), f"{ids(path)} links to {target}"
        if anchor:
            assert anchor in anchors(page.read_text()), f"{ids(path)} links to {target}"


@pytest.mark.parametrize("path", LINKED, ids=ids)
def test_make_targets_named_in_the_page_exist(path: Path) -> None:
    assert set(re.findall(r"`make ([a-z-]+)`", path.read_text())) <= MAKE_TARGETS


def test_the_two_commands_stand_in_the_readme() -> None:
    named = [words[1] for words in commands((ROOT / "README.md").read_text()) if words[0] == "make"]
    assert {"demo", "test"} <= set(named)


def test_figures_are_those_that_the_scripts_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    images = ROOT / "docs" / "images"
    monkeypatch.syspath_prepend(images)  # the scripts share what draws
    figures: dict[str, Any] = {}
    for script in images.glob("*.py"):
        figures |= runpy.run_path(str(script))["FIGURES"]
    assert {path.stem for path in images.glob("*.svg")} == set(figures)
    for name, draw in figures.items():
        assert draw().svg() == (images / f"{name}.svg").read_text(encoding="utf-8"), name


# The checks above are themselves checked: each must see the fault that it is there for.

PAGE = """# A page, of two parts
```python
x = 1
```
<!-- not run: needs a GPU -->
```python
raise RuntimeError
```
<!-- not run: -->
```python
raise RuntimeError
```
```console
$ qbench train --model resnet18 \\
    --data digits   # a comment
make demo
```
[there](page.md#a-page-of-two-parts) ![picture](images/a.svg) [away](https://example.org)
```python
y = x + 1
```
"""


def test_blocks_share_a_namespace_and_skipped_ones_do_not_run() -> None:
    namespace = run_blocks(Path("page.md"), PAGE)
    assert namespace["y"] == 2


def test_a_failing_block_is_reported_at_its_line_of_the_page() -> None:
    with pytest.raises(ZeroDivisionError) as raised:
        run_blocks(Path("page.md"), "text\n\n```python\nx = 1\nx / 0\n```\n")
    assert raised.traceback[-1].lineno + 1 == 5


def test_page_is_read_as_meant() -> None:
    assert [block.skip for block in blocks(PAGE, "python")] == [None, "needs a GPU", "", None]
    assert commands(PAGE) == [["qbench", "train", "--model", "resnet18", "--data", "digits"], ["make", "demo"]]
    assert links(PAGE) == ["page.md#a-page-of-two-parts", "images/a.svg"]
    assert anchors(PAGE) == {"a-page-of-two-parts"}

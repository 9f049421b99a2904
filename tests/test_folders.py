"""A folder of results is there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qbench.errors import ExportError
from qbench.folders import check_output, output_folder

MARKER = "summary.json"


def tree(folder: Path) -> dict[str, str]:
    """Every file below a folder with its text."""
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def earlier_run(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / MARKER).write_text("old")
    (folder / "model.onnx").write_text("old model")
    return folder


@pytest.mark.parametrize("out", ["demo", "runs/of/today/demo"])
@pytest.mark.parametrize("is_empty_already", [False, True])
def test_the_folder_appears_when_the_block_ends(tmp_path: Path, out: str, is_empty_already: bool) -> None:
    if is_empty_already:
        (tmp_path / out).mkdir(parents=True)
    with output_folder(tmp_path / out, marker=MARKER) as folder:
        (folder / MARKER).write_text("new")
        assert tree(tmp_path / out) == {} if is_empty_already else not (tmp_path / out).exists()
    assert tree(tmp_path) == {f"{out}/{MARKER}": "new"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_is_left_after_an_exception_not_even_parents(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), output_folder(tmp_path / "runs" / "demo", marker=MARKER) as folder:
        (folder / "model.onnx").write_text("half")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_run_survives_a_failure_and_is_replaced_by_a_success(tmp_path: Path) -> None:
    out = earlier_run(tmp_path / "demo")
    before = tree(tmp_path)
    with pytest.raises(ValueError), output_folder(out, marker=MARKER, overwrite=True) as folder:
        (folder / MARKER).write_text("new")
        raise ValueError
    assert tree(tmp_path) == before
    with output_folder(out, marker=MARKER, overwrite=True) as folder:
        (folder / MARKER).write_text("new")
    assert tree(tmp_path) == {f"demo/{MARKER}": "new"}


def test_an_earlier_run_is_not_replaced_unasked(tmp_path: Path) -> None:
    out = earlier_run(tmp_path / "demo")
    with pytest.raises(ExportError, match=r"already holds a run \(model\.onnx, summary\.json\).*--overwrite"):
        check_output(out, marker=MARKER, overwrite=False)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_other_things_is_never_replaced(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ExportError, match=r"holds files that are not of a run \(thesis\.tex\)"):
        check_output(tmp_path, marker=MARKER, overwrite=overwrite)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "demo").write_text("")
    with pytest.raises(ExportError, match="is a file; give a folder"):
        check_output(tmp_path / "demo", marker=MARKER, overwrite=True)
    with pytest.raises(ExportError, match="is not a folder that may be written to"):
        check_output(tmp_path / "demo" / "run", marker=MARKER, overwrite=True)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_parent_that_may_not_be_written_to(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(ExportError, match="may be written to; choose another --out"):
            check_output(tmp_path / "demo", marker=MARKER, overwrite=False)
    finally:
        tmp_path.chmod(0o700)


def test_a_run_that_appeared_meanwhile_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    with pytest.raises(ExportError, match="already holds a run"), output_folder(out, marker=MARKER) as folder:
        (folder / MARKER).write_text("new")
        earlier_run(out)
    assert tree(tmp_path) == {"demo/model.onnx": "old model", f"demo/{MARKER}": "old"}

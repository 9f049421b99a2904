from __future__ import annotations

import os
from pathlib import Path

import pytest

from qbench.errors import ExportError, QBenchError
from qbench.export.files import atomic_path, check_destination, write_bytes, write_text


def test_a_file_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "model.onnx"
    with atomic_path(target) as aside:
        assert aside.parent == tmp_path and aside.suffix == ".onnx"
        aside.write_bytes(b"half")
        assert not target.exists()
    assert target.read_bytes() == b"half" and os.listdir(tmp_path) == ["model.onnx"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, ExportError, OSError])
def test_after_an_exception_everything_is_as_before(tmp_path: Path, error: type[BaseException]) -> None:
    target = write_text(tmp_path / "summary.json", "old")
    with pytest.raises((error, ExportError)), atomic_path(target) as aside:
        aside.write_text("new, hal")
        raise error("no space left")
    assert target.read_text() == "old" and os.listdir(tmp_path) == ["summary.json"]


def test_a_new_file_has_the_permissions_of_any_other(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    written = write_bytes(tmp_path / "atomic", b"")
    assert written.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_writing_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="nothing was written"), atomic_path(tmp_path / "a"):
        pass


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing/model.onnx", r"does not exist; make it first: Path\(.*missing"),
        ("file/model.onnx", "is not a folder"),
        ("", "is a folder; give the path of a file"),
    ],
)
def test_a_destination_that_cannot_be_written(tmp_path: Path, path: str, message: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ExportError, match=message):
        check_destination(tmp_path / path)


def test_a_folder_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # a superuser may write everywhere
    with pytest.raises(QBenchError, match="may not be written to"):
        write_bytes(tmp_path / "a", b"")

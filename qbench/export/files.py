"""Files that are there whole or not at all.

A file is written beside its place, in the same directory (so that the move stays inside one file system), and moved
into place by `os.replace`, which is atomic. After an exception nothing is left, and what was there before still is.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from qbench.errors import ExportError


def check_destination(path: str | os.PathLike[str]) -> Path:
    """The path as a `Path`, once it is sure that a file may be made there.

    Raises:
        ExportError: `path` is a folder, its folder is missing or is no folder, or nothing may be written into it.
    """
    target = Path(path)
    parent = target.parent
    if target.is_dir():
        raise ExportError(f"{target} is a folder; give the path of a file, such as {target / 'model'}")
    if not parent.exists():
        raise ExportError(
            f"the folder of {target} does not exist; make it first: Path({str(parent)!r}).mkdir(parents=True)"
        )
    if not parent.is_dir():
        raise ExportError(f"{parent} is not a folder, so {target} cannot be written; choose another path")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ExportError(f"the folder {parent} may not be written to; choose another path, or change its permissions")
    return target


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path to write to, in the folder of `path` and with its suffix, that becomes `path` when the block ends.

    Nothing is opened: the block hands the path to whatever writes the file. If the block raises, or writes nothing,
    what was written aside is removed and `path` is as it was.

    Raises:
        ExportError: as `check_destination`; the block wrote no file; the operating system refused to write or move it.
    """
    target = check_destination(path)
    aside = target.with_name(f".{target.stem}.{secrets.token_hex(6)}.part{target.suffix}")
    try:
        yield aside
        if not aside.is_file():
            raise ExportError(f"nothing was written for {target}: expected a file at {aside}")
        os.replace(aside, target)
    except OSError as error:
        raise ExportError(f"{target} could not be written: {error}") from error
    finally:
        aside.unlink(missing_ok=True)


def write_bytes(path: str | os.PathLike[str], data: bytes) -> Path:
    """Write `data` whole or not at all; errors as `atomic_path`."""
    with atomic_path(path) as aside:
        aside.write_bytes(data)
    return Path(path)


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write `text` in UTF-8, whole or not at all; errors as `atomic_path`."""
    return write_bytes(path, text.encode("utf-8"))

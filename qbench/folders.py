"""A folder of results that is there whole or not at all.

It is filled beside its place, as `.NAME.XXXX.part` in the same parent (so that the move stays inside one file system),
and moved into place at the end. After an exception nothing is left, and what was there before still is.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from qbench.errors import ExportError


def check_output(out: Path, *, marker: str, overwrite: bool) -> None:
    """Make sure that `output_folder` will be able to put a folder at `out`.

    Args:
        out: Where it is to be; it may be missing or empty.
        marker: A file that every folder of results holds.
        overwrite: Whether a folder that holds `marker` may be replaced. One with other contents never is.

    Raises:
        ExportError: `out` is a file, holds another run or something else, or its parent may not be written to.
    """
    if out.exists() and not out.is_dir():
        raise ExportError(f"{out} is a file; give a folder, such as --out {out.with_suffix('')}-run")
    names = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    if names and marker not in names:
        raise ExportError(f"{out} holds files that are not of a run ({_some(names)}); choose another --out")
    if names and not overwrite:
        raise ExportError(f"{out} already holds a run ({_some(names)}); choose another --out, or add --overwrite")
    parent = next(path for path in out.absolute().parents if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ExportError(
            f"{out} cannot be made: {parent} is not a folder that may be written to; choose another --out"
        )


@contextlib.contextmanager
def output_folder(out: Path, *, marker: str, overwrite: bool = False) -> Iterator[Path]:
    """An empty folder that becomes `out` when the block ends; removed, with the parents made for it, if it raises.

    Raises:
        ExportError: as `check_output`, before the block and once more after it; the operating system refused.
    """
    check_output(out, marker=marker, overwrite=overwrite)
    missing = [path for path in out.absolute().parents if not path.exists()]
    aside = out.absolute().with_name(f".{out.absolute().name}.{secrets.token_hex(4)}.part")
    try:
        aside.mkdir(parents=True)
        yield aside
        check_output(out, marker=marker, overwrite=overwrite)
        _move(aside, out)
    except OSError as error:
        raise ExportError(f"{out} could not be written: {error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        for path in missing:  # innermost first; a parent that holds the result is not empty and stays
            with contextlib.suppress(OSError):
                path.rmdir()


def _move(aside: Path, out: Path) -> None:
    """Put `aside` at `out`; an earlier run steps aside first and is deleted once the new one stands."""
    earlier = aside.with_suffix(".old")
    if out.exists():
        os.replace(out, earlier)
    try:
        os.replace(aside, out)
    except OSError:
        if earlier.exists():
            os.replace(earlier, out)
        raise
    shutil.rmtree(earlier, ignore_errors=True)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")

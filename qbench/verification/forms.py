"""The files of every deployed form of a model: those that ship, and the same with taps.

    program        Q/DQ program                 saved
    RUNTIME        the runtime's file
    … with taps    the same, which also put out every activation's codes
    integer        `fuse_qdq` for the runtime's target, with taps, saved
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.export import ExportedProgram

from qbench.errors import ConfigError, ExportError, NumericsError, PassError
from qbench.export.program import copy_program
from qbench.export.runtimes import Runtime
from qbench.export.taps import Tapped, tap_program
from qbench.passes import fuse_qdq

#: Codes that one form puts out at once, at most (unless a single image has more).
CODES_AT_ONCE = 1 << 25


@dataclass(frozen=True)
class TappedFile:
    """A file with taps, and what they are."""

    path: Path
    tapped: Tapped


@dataclass(frozen=True)
class RuntimeForms:
    """What a runtime is compared by.

    Attributes:
        runtime: The runtime.
        file: Its file as it ships.
        tapped: The same with taps; None where it could not be made.
        integer: The integer program for its target, with taps; None where there is none.
        notes: Why something is missing.
    """

    runtime: Runtime
    file: Path
    tapped: TappedFile | None
    integer: TappedFile | None
    notes: tuple[str, ...]


def save_tapped(program: ExportedProgram, path: Path) -> TappedFile:
    """Write the tapped Q/DQ program."""
    tapped = tap_program(program)
    torch.export.save(tapped.program, path)
    return TappedFile(path, tapped)


def make_forms(
    runtime: Runtime, program: ExportedProgram, folder: Path, given: Mapping[str, str | os.PathLike[str]]
) -> RuntimeForms:
    """Write what a runtime is compared by into `folder`; the file that ships only where none was given.

    Raises:
        MissingDependencyError: the runtime is not installed.
        ExportError: it refuses the program.
    """
    file = Path(given.get(runtime.name, folder / f"model{runtime.suffix}"))
    if runtime.name not in given:
        runtime.export(program, file)
    notes = []
    tapped = integer = None
    try:
        taps = tap_program(program, runtime.codes)
        runtime.export(taps.program, folder / f"tapped{runtime.suffix}")
        tapped = TappedFile(folder / f"tapped{runtime.suffix}", taps)
    except ExportError as error:
        notes.append(f"codes inside {runtime.name} were not compared: {error}")
    try:
        integer = _integer_program(runtime, program, folder / f"integer-{runtime.name}.pt2")
    except (ConfigError, NumericsError, PassError) as error:
        notes.append(f"no integer program was compared with {runtime.name}: {error}")
    return RuntimeForms(runtime, file, tapped, integer, tuple(notes))


def _integer_program(runtime: Runtime, program: ExportedProgram, path: Path) -> TappedFile:
    integer = copy_program(program)
    report = fuse_qdq(integer, target=runtime.target)
    reasons = {left.node: f"{runtime.target}: {left}" for left in report.left_float}
    tapped = tap_program(integer, left_float=reasons)
    torch.export.save(tapped.program, path)
    return TappedFile(path, tapped)


def images_at_once(program: ExportedProgram, taps: Tapped) -> int | None:
    """How many images a tapped form may be given at once; None where it takes only the batch of the program."""
    names = set(program.graph_signature.user_inputs)
    first = [node.meta["val"].shape[:1] for node in program.graph.nodes if node.name in names]
    sizes = {str(shape[0]) if shape and not isinstance(shape[0], int) else "" for shape in first}
    if len(sizes) != 1 or "" in sizes:
        return None
    return max(1, CODES_AT_ONCE // max(1, sum(tap.per_image for tap in taps.taps)))

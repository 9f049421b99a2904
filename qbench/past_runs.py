"""What `qbench verify DIR` does: a folder that `qbench train` wrote is verified again, and its report written anew.

    summary.json  ─▶ settings, accuracies            model.pt2, model.onnx, model.pte  ─▶ compared as they are
    qat.pt        ─▶ the QAT model, prepared as the run prepared it; what needs it is left out where that fails
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qbench import data as data_sets
from qbench.data import ImageData
from qbench.errors import DataError, QBenchError, VerificationError
from qbench.export.files import write_text
from qbench.export.program import load_program
from qbench.export.runtimes import RUNTIMES
from qbench.job import (
    PROGRAM_FILE,
    REPORT_FILE,
    SUMMARY_FILE,
    WEIGHTS_FILE,
    Job,
    Say,
    figure_inputs,
    held_out_inputs,
    model_file,
    prepare_model,
)
from qbench.report.data import RunSummary, Verification
from qbench.report.html import report_page
from qbench.report.text import doubt_notes
from qbench.verification import layer_figures, verify_files


@dataclass(frozen=True)
class PastRun:
    """A run's folder, read.

    Attributes:
        folder: Where it is.
        summary: What its `summary.json` says.
        images: The data that it is verified on.
        model: The QAT model, in eval mode; None where it could not be rebuilt.
        notes: Why not.
    """

    folder: Path
    summary: RunSummary
    images: ImageData
    model: nn.Module | None
    notes: tuple[str, ...]


def verify_again(
    folder: Path, *, data: str | None = None, images: int | None = None, say: Say = lambda doing: None
) -> tuple[Verification, RunSummary]:
    """Verify the files of a run and write its `report.html` anew; `summary.json` stays as the run left it.

    Args:
        folder: What `qbench train --out` named.
        data: A spec of `qbench.data.load`; the default is that of the run.
        images: Held-out images, at most; the default is that of the run.
        say: Told what starts.

    Returns:
        What was found, and the run's summary with it.

    Raises:
        QBenchError: no such run, or something in it cannot be read or run.
    """
    say("read the run")
    summary = read_summary(folder)
    with _threads(summary.settings.get("threads")):
        past = read_run(folder, summary, data)
        count = images or int(summary.settings.get("verify_images", 512))
        program = load_program(folder / PROGRAM_FILE)
        runtimes = [name for name in RUNTIMES if model_file(folder, name).is_file()]
        files = {"program": folder / PROGRAM_FILE, **{name: model_file(folder, name) for name in runtimes}}
        inputs = held_out_inputs(past.images, count, int(summary.settings.get("max_batch", 1)))
        say("verify")
        found = verify_files(program, inputs, runtimes, files=files, model=past.model)
        say("write the report")
        figures = () if past.model is None else layer_figures(past.model, figure_inputs(past.images, count))
    notes = (*past.notes, *doubt_notes(found), *found.notes)
    found = replace(found, notes=(*past.notes, *found.notes))
    summary = replace(summary, **found.summary_fields(), notes=notes)
    write_text(folder / REPORT_FILE, report_page(summary, figures))
    return found, summary


def read_summary(folder: Path) -> RunSummary:
    """The summary of a run.

    Raises:
        VerificationError: there is no such folder, or it holds no run.
    """
    file = folder / SUMMARY_FILE
    if not file.is_file():
        raise VerificationError(
            f"{folder} holds no run (no {SUMMARY_FILE}); qbench train --out {folder} makes one, qbench verify {folder} "
            "verifies it again"
        )
    try:
        return RunSummary.from_json(file.read_text(encoding="utf-8"))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise VerificationError(f"{file} is not the summary of a run: {error}; train again with --overwrite") from error


def read_run(folder: Path, summary: RunSummary, data: str | None = None) -> PastRun:
    """The data of a run and, where it can be rebuilt, its QAT model.

    Raises:
        QBenchError: the data cannot be loaded.
    """
    settings = summary.settings
    images = data_sets.load(data or summary.data, settings.get("image_size"))
    if "classes" in settings and data is None and len(images.classes) != settings["classes"]:
        raise DataError(
            f"{summary.data} has {len(images.classes)} classes, and {folder} was trained on {settings['classes']}; "
            "give the data of the run with --data"
        )
    try:
        return PastRun(folder, summary, images, _rebuild(folder, settings, images), ())
    except (QBenchError, OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        note = f"the QAT model was not rebuilt, so parameters, QAT eval and figures are left out: {reason}"
        return PastRun(folder, summary, images, None, (note,))


def _rebuild(folder: Path, settings: Any, images: ImageData) -> nn.Module:
    known = {field.name for field in fields(Job)} - {"float_training", "qat_training", "out", "runtimes"}
    job = Job(out=folder, **{name: value for name, value in settings.items() if name in known})
    model = prepare_model(job, int(settings["classes"]), images.example)
    model.load_state_dict(torch.load(folder / WEIGHTS_FILE, weights_only=True))
    return model.eval()


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """The run's number of threads, on which the floats of the QAT model depend."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)

"""`verify`: every form of a model on the same inputs, batch by batch, each deployed form in a fresh process."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from qbench.errors import MissingDependencyError, VerificationError
from qbench.export.processes import FileRunner
from qbench.export.program import load_program
from qbench.export.runtimes import get_runtime
from qbench.export.taps import Tap
from qbench.modes import evaluating
from qbench.nn.qat.layer import QatLayer
from qbench.numerics.qparams import QParams
from qbench.preparation import quantized_modules
from qbench.report.data import CodeSpread, Comparison, LayerComparison, Verification
from qbench.verification.counting import Count, check_shapes
from qbench.verification.forms import RuntimeForms, TappedFile, images_at_once, make_forms, save_tapped
from qbench.verification.parameters import compare_parameters, output_grids
from qbench.verification.trained import counting_codes, outputs_of

Inputs = tuple[Tensor, ...] | Iterable[tuple[Tensor, ...]]


def verify(
    model: nn.Module,
    program: torch.export.ExportedProgram,
    inputs: Inputs,
    runtimes: Sequence[str] = ("onnxruntime", "executorch"),
    *,
    files: Mapping[str, str | os.PathLike[str]] | None = None,
) -> Verification:
    """Compare a QAT model, the program that `convert` made of it, its integer programs and the files of runtimes.

    Args:
        model: The QAT model, on the CPU; its modes are put back afterwards.
        program: What `convert(model, …)` returned, without further passes.
        inputs: One tuple of tensors, or an iterable of them, of the shapes that the program takes; one of them is held
            at a time.
        runtimes: Names of `qbench.export.RUNTIMES`; one that is not installed is noted in the result.
        files: Files that exist already, to check those that ship instead of writing others: by name of a runtime, and
            `"program"` for what `torch.export.save` wrote.

    Returns:
        Counts of compared and different codes; `print` shows a table.

    Raises:
        VerificationError: the model was not prepared, the inputs are not tuples of tensors, or the program is not of
            this model.
        ExportError: a runtime refuses the file.
    """
    layers = {path: m for path, m in quantized_modules(model) if isinstance(m, QatLayer)}
    if not layers:
        raise VerificationError("verify: the model has no QAT layer; its first argument is what convert was given")
    return verify_files(program, inputs, runtimes, files=files, model=model)


def verify_files(
    program: torch.export.ExportedProgram,
    inputs: Inputs,
    runtimes: Sequence[str] = ("onnxruntime", "executorch"),
    *,
    files: Mapping[str, str | os.PathLike[str]] | None = None,
    model: nn.Module | None = None,
) -> Verification:
    """`verify`, also without the QAT model: then nothing is said about what was trained."""
    started = time.perf_counter()
    batches = _checked(inputs)
    for runtime in runtimes:
        get_runtime(runtime)
    given = dict(files or {})
    with tempfile.TemporaryDirectory(prefix="qbench-verify-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        saved = Path(given.get("program", folder / "model.pt2"))
        if "program" not in given:
            torch.export.save(program, saved)
        reloaded = load_program(saved)
        parameters: tuple[Comparison, ...] = ()
        if model is not None:
            found = {path: m for path, m in quantized_modules(model) if isinstance(m, QatLayer)}
            parameters = compare_parameters(found, reloaded)
        forms, notes = _make_all(runtimes, program, folder, given)
        session = _Session(saved, program, forms, folder, output_grids(reloaded), stack)
        spread = session.compare(batches, model)
        return Verification(
            parameters=Comparison.total("parameters", parameters),
            eval_vs_program=session.eval_vs_program.comparison("eval_vs_program"),
            runtimes=tuple(side.outputs.comparison(side.name) for side in session.sides),
            integer=tuple(side.integer_total() for side in session.sides if side.integer),
            layers=parameters,
            by_layer={key: rows for side in session.sides for key, rows in side.by_layer().items()},
            spread=spread,
            doubts={key: why for side in session.sides for key, why in side.doubts().items()},
            timings=session.timings(),
            cpu=session.programs.cpu,
            notes=(*notes, *(note for side in session.sides for note in side.notes())),
            seconds=time.perf_counter() - started,
        )


def _make_all(
    runtimes: Sequence[str],
    program: torch.export.ExportedProgram,
    folder: Path,
    given: Mapping[str, str | os.PathLike[str]],
) -> tuple[list[RuntimeForms], list[str]]:
    forms, notes = [], []
    for name in runtimes:
        try:
            forms.append(make_forms(get_runtime(name), program, folder, given))
        except MissingDependencyError as error:
            notes.append(f"{name} was not compared: {error}")
    return forms, notes


def _checked(inputs: Inputs) -> Iterator[tuple[Tensor, ...]]:
    """The batches, one at a time; the first is looked at now, so that nothing starts in vain."""
    if isinstance(inputs, Tensor):
        raise VerificationError("verify: inputs is a tensor, expected a tuple of tensors: verify(model, program, (x,))")
    batches = map(_check_batch, [inputs] if isinstance(inputs, tuple) else inputs)
    first = next(batches, None)
    if first is None:
        raise VerificationError("verify: no inputs were given; a zero over no codes says nothing")
    return _after(deque([first]), batches)


def _after(first: deque[tuple[Tensor, ...]], rest: Iterator[tuple[Tensor, ...]]) -> Iterator[tuple[Tensor, ...]]:
    yield first.popleft()  # itertools.chain would hold it to the end
    yield from rest


def _check_batch(batch: object) -> tuple[Tensor, ...]:
    if not isinstance(batch, tuple) or not all(isinstance(value, Tensor) for value in batch):
        raise VerificationError(
            f"verify: a batch is {type(batch).__name__}, expected a tuple of tensors: verify(model, program, [(x,), …])"
        )
    return batch


class _Session:
    """All processes of one verification, and what they have found so far."""

    def __init__(
        self,
        saved: Path,
        program: torch.export.ExportedProgram,
        forms: Sequence[RuntimeForms],
        folder: Path,
        grids: list[QParams | None],
        stack: contextlib.ExitStack,
    ) -> None:
        self.threads = torch.get_num_threads()
        self.eval_vs_program = Count()
        self.reference = save_tapped(program, folder / "tapped.pt2") if any(f.tapped for f in forms) else None
        programs = [saved, *([self.reference.path] if self.reference else [])]
        integers = [form.integer for form in forms if form.integer is not None]
        self.programs = stack.enter_context(
            FileRunner("program", [*programs, *(integer.path for integer in integers)], threads=self.threads)
        )
        self.at_once = None if self.reference is None else images_at_once(program, self.reference.tapped)
        self.sides = []
        position = len(programs)
        for form in forms:
            paths = [form.file, *([form.tapped.path] if form.tapped else [])]
            runner = stack.enter_context(FileRunner(form.runtime.name, paths, threads=self.threads))
            self.sides.append(_Side(form, runner, grids, None if form.integer is None else position))
            position += form.integer is not None

    def compare(self, batches: Iterable[tuple[Tensor, ...]], model: nn.Module | None) -> tuple[CodeSpread, ...]:
        """Compare every form on every batch; returns how varied the model's codes were."""
        if model is None:
            for batch in batches:
                self._compare_deployed(batch, self.programs.run(batch))
            return ()
        with counting_codes(model) as codes:
            for batch in batches:
                with evaluating(model):
                    trained = outputs_of(model, batch)
                outputs = self.programs.run(batch)
                check_shapes(trained, outputs)
                for one, other in zip(trained, outputs, strict=True):
                    self.eval_vs_program.add_values(one, other)
                self._compare_deployed(batch, outputs)
        return tuple(counts.spread(path) for path, counts in codes.items())

    def _compare_deployed(self, batch: tuple[Tensor, ...], outputs: list[np.ndarray]) -> None:
        shipped = {side.name: side.compare_outputs(batch, outputs) for side in self.sides}
        for start, part in _parts(batch, self.at_once):
            reference = None if self.reference is None else self.programs.run(part, file=1)
            for side in self.sides:
                integer = None if side.position is None else self.programs.run(part, file=side.position)
                side.compare_part(start, part, shipped[side.name], self.reference, reference, integer)

    def timings(self) -> dict[str, float]:
        """Seconds that each form ran."""
        found = {"program": self.programs.seconds[0]}
        for side in self.sides:
            found[side.name] = side.runner.seconds[0]
            if side.position is not None:
                found[f"integer/{side.name}"] = self.programs.seconds[side.position]
        return found


def _parts(batch: tuple[Tensor, ...], size: int | None) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
    """A batch in parts of at most `size` images, each with the index of its first one."""
    count = len(batch[0]) if batch and batch[0].ndim else 0
    if size is None or count <= size:
        yield 0, batch
        return
    for start in range(0, count, size):
        yield start, tuple(value[start : start + size] for value in batch)


class _Side:
    """One runtime: its process, and what was counted against it."""

    def __init__(
        self, form: RuntimeForms, runner: FileRunner, grids: list[QParams | None], position: int | None
    ) -> None:
        self.form, self.runner, self.grids, self.position = form, runner, grids, position
        self.name = form.runtime.name
        self.outputs = Count()  # Q/DQ program against the file that ships
        self.tapped_outputs = Count()  # the file with taps against the file that ships
        self.program_taps: dict[str, Count] = {}
        self.integer_taps: dict[str, Count] = {}
        self.integer_outputs = [Count() for _ in grids]

    @property
    def integer(self) -> TappedFile | None:
        """The integer program, where there is one."""
        return self.form.integer

    def compare_outputs(self, batch: tuple[Tensor, ...], outputs: list[np.ndarray]) -> list[np.ndarray]:
        """Count the outputs of the shipped file against those of the Q/DQ program; returns the former."""
        shipped = self.runner.run(batch)
        check_shapes(outputs, shipped)
        for index, (one, other) in enumerate(zip(outputs, shipped, strict=True)):
            self.outputs.add_on_grid(one, other, self._grid(index))
        return shipped

    def compare_part(
        self,
        start: int,
        part: tuple[Tensor, ...],
        shipped: list[np.ndarray],
        reference: TappedFile | None,
        reference_outputs: list[np.ndarray] | None,
        integer_outputs: list[np.ndarray] | None,
    ) -> None:
        """Count what some images of a batch give with taps, from the image with the index `start` on."""
        whole = len(part[0]) == len(shipped[0]) if part and shipped and shipped[0].ndim else True
        mine = shipped if whole else [value[start : start + len(part[0])] for value in shipped]
        if integer_outputs is not None:
            for index, value in enumerate(mine):
                self.integer_outputs[index].add_on_grid(integer_outputs[index], value, self._grid(index))
        if self.form.tapped is None:
            return
        codes = self.runner.run(part, file=1)
        check_shapes(mine, codes[: len(mine)])
        for one, other in zip(mine, codes, strict=False):
            self.tapped_outputs.add_values(one, other)
        if reference is not None and reference_outputs is not None:
            _add_taps(self.program_taps, reference, reference_outputs, self.form.tapped, codes)
        if self.integer is not None and integer_outputs is not None:
            _add_taps(self.integer_taps, self.integer, integer_outputs, self.form.tapped, codes)

    def by_layer(self) -> dict[str, tuple[LayerComparison, ...]]:
        """The rows of the comparisons that look inside, by their key."""
        rows: dict[str, tuple[LayerComparison, ...]] = {}
        if self.form.tapped is not None:
            counted = self.program_taps
            taps = [tap for tap in self.form.tapped.tapped.taps if tap.name in counted]
            rows[f"program_vs_{self.name}"] = tuple(counted[tap.name].layer(tap.label) for tap in taps)
        if self.integer is not None:
            tapped = self.integer.tapped
            inside = [tap for tap in tapped.taps if tap.name in self.integer_taps]
            rows[f"integer_vs_{self.name}"] = (
                *(self.integer_taps[tap.name].layer(tap.label, tap.inexact) for tap in inside),
                *(
                    count.layer("output" if len(self.integer_outputs) == 1 else f"output {index}", why)
                    for index, (count, why) in enumerate(zip(self.integer_outputs, tapped.inexact, strict=True))
                ),
            )
        return rows

    def integer_total(self) -> Comparison:
        """The integer program against the runtime: outputs and every tap."""
        return Comparison.total(self.name, self.by_layer()[f"integer_vs_{self.name}"])

    def doubts(self) -> dict[str, str]:
        """Why a zero of this runtime is not called exact."""
        reasons = []
        missing = [s for s in self.form.runtime.exact_settings if s not in self.runner.settings[0]]
        if missing and not _has_vnni(self.runner.cpu):
            reasons.append(f"the session runs without {', '.join(missing)} on a CPU without VNNI")
        if self.tapped_outputs.different:
            found = self.tapped_outputs.comparison("the file with taps against the file that ships")
            reasons.append(f"taps change what it computes ({found})")
        keys = [f"program_vs_{self.name}", *([f"integer_vs_{self.name}"] if self.integer else [])]
        return {key: "; ".join(reasons) for key in keys} if reasons else {}

    def notes(self) -> list[str]:
        """What ran it, whether taps changed anything, what is missing."""
        cpu = ", ".join(self.runner.cpu) or "an unknown CPU"
        settings = "".join(f" with {setting}" for setting in self.runner.settings[0])
        notes = [f"{self.name} {self.runner.version} on {cpu}{settings}", *self.form.notes]
        if self.form.tapped is not None and not self.tapped_outputs.different:
            notes.append(
                f"{self.name}: the file whose codes were read gives the outputs of the one that ships: 0 of "
                f"{self.tapped_outputs.compared:,} differ"
            )
        return notes

    def _grid(self, index: int) -> QParams | None:
        return self.grids[index] if index < len(self.grids) else None


def _add_taps(
    counts: dict[str, Count],
    first: TappedFile,
    first_outputs: list[np.ndarray],
    second: TappedFile,
    second_outputs: list[np.ndarray],
) -> None:
    """Count, tap by tap, what two tapped forms of a program put out."""
    other = {tap.name: (tap, codes) for tap, codes in _taps(second, second_outputs)}
    for tap, codes in _taps(first, first_outputs):
        if tap.name in other:
            its, its_codes = other[tap.name]
            check_shapes([codes], [its_codes])
            counts.setdefault(tap.name, Count()).add_codes(codes, its_codes, (tap.zero, its.zero))


def _taps(file: TappedFile, outputs: list[np.ndarray]) -> list[tuple[Tap, np.ndarray]]:
    taps = file.tapped.taps
    return list(zip(taps, outputs[len(outputs) - len(taps) :], strict=True))


def _has_vnni(cpu: Sequence[str]) -> bool:
    return any(feature.endswith("vnni") for feature in cpu) or not any(f.startswith("avx") for f in cpu)

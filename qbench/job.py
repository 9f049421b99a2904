"""The job of `qbench train`, without a command line: a `Job` goes in, a folder and a `RunSummary` come out.

    load ─▶ train float ─▶ fuse, prepare ─▶ train QAT ─▶ convert ─▶ export ─▶ verify ─▶ score the files ─▶ folder

Whatever can be refused early is refused before training starts. The folder is written aside and moved into place when
the last step has passed: a run is there whole or not at all.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from qbench import data as data_sets
from qbench import training
from qbench.conversion import conversion_report, convert
from qbench.data import ImageData
from qbench.errors import ConfigError, ConversionError, require
from qbench.export.processes import FileRunner
from qbench.export.runtimes import RUNTIMES, get_runtime
from qbench.folders import check_output, output_folder
from qbench.fusion import fuse
from qbench.models import build_model, check_outputs
from qbench.nn.qat import enable_fast_path, training_paths
from qbench.one_call import prepare_by_target
from qbench.preparation import preparation_report
from qbench.qconfig import get_qconfig
from qbench.report.conversion import ConversionReport
from qbench.report.data import Comparison, RunSummary, Verification
from qbench.report.html import report_page
from qbench.report.text import doubt_notes
from qbench.training import FitResult, Score, Settings
from qbench.verification import layer_figures, verify

PROGRAM_FILE, WEIGHTS_FILE, SUMMARY_FILE, REPORT_FILE = "model.pt2", "qat.pt", "summary.json", "report.html"
FLOAT_TRAINING = Settings(epochs=5, lr=0.02, label_smoothing=0.1)
QAT_TRAINING = Settings(
    epochs=2, lr=0.002, schedule="cosine", label_smoothing=0.1, freeze_observers_at=0.5, freeze_bn_at=0.6
)
REQUIRED = {
    "onnxruntime": ("onnx", ("onnx", "onnxscript", "onnxruntime")),
    "executorch": ("executorch", ("executorch",)),
}
FAST_PATHS = ("auto", "on", "off")
# Compiling takes about as long as a few hundred small steps gain by it.
WORTH_COMPILING = 1000
_SCORE_BATCH = 64
_FIGURE_IMAGES, _FIGURE_BATCH = 128, 16  # enough for ranges and histograms; activations of a batch are held
_DISTRIBUTIONS = ("torch", "torchvision", "numpy", "onnx", "onnxscript", "onnxruntime", "executorch", "scikit-learn")

Say = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """Everything that `qbench train` is told.

    Attributes:
        out: Folder that the run is written to.
        model: A torchvision classification name, or `file.py:function`.
        data: A spec of `qbench.data.load`.
        target: Name of a target.
        weight_bits: Width of weight codes; `"target"` here and below for the target's own choice.
        activation_bits: Width of activation codes.
        bias_bits: Width of bias codes.
        bias_scale: `"input_weight"`, `"own"` or `"own_pow2"`.
        float_training: How the float model is trained.
        qat_training: How the prepared model is trained.
        image_size: Height and width in pixels; None takes the data's own.
        seed: Of the model's first weights.
        threads: Threads of torch; None leaves them as they are.
        max_batch: The files take batches of 1 to so many images; 1 is for models that fix their batch.
        verify_images: Held-out images, at most, that every form of the model is compared on.
        runtimes: Runtimes that files are written for, and that are verified and scored.
        fast_path: Whether QAT trains by generated code, one of `FAST_PATHS`: `"auto"` where the run has at least
            `WORTH_COMPILING` steps.
        overwrite: Replace an earlier run in `out`.

    Raises:
        ConfigError: a number below 1, an unknown runtime, or an unknown choice of the fast path.
    """

    out: Path
    model: str = "resnet18"
    data: str = "digits"
    target: str = "onnxruntime"
    weight_bits: int | str = "target"
    activation_bits: int | str = "target"
    bias_bits: int | str = "target"
    bias_scale: str = "target"
    float_training: Settings = FLOAT_TRAINING
    qat_training: Settings = QAT_TRAINING
    image_size: int | None = None
    seed: int = 0
    threads: int | None = None
    max_batch: int = 64
    verify_images: int = 512
    runtimes: tuple[str, ...] = tuple(RUNTIMES)
    fast_path: str = "auto"
    overwrite: bool = False

    def __post_init__(self) -> None:
        for name in ("max_batch", "verify_images", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name.replace('_', ' ')} {value}: expected at least 1")
        for runtime in self.runtimes:
            get_runtime(runtime)
        if self.fast_path not in FAST_PATHS:
            raise ConfigError(f"fast_path={self.fast_path!r}: expected one of {', '.join(FAST_PATHS)}")


@dataclass(frozen=True)
class Trained:
    """What training made: the QAT model in eval mode, and both scores on the held-out images."""

    model: nn.Module
    float_score: Score
    qat_score: Score
    fitted: FitResult


@dataclass
class Clock:
    """Wall-clock time by step; says what starts."""

    say: Say
    seconds: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)

    @contextlib.contextmanager
    def __call__(self, step: str, doing: str) -> Iterator[None]:
        """Time the block as `step`, and say that it starts."""
        self.say(doing)
        started = time.perf_counter()
        yield
        self.seconds[step] = time.perf_counter() - started

    def rounded(self) -> dict[str, float]:
        """Every step and the total so far, to the millisecond."""
        return {
            **{k: round(v, 3) for k, v in self.seconds.items()},
            "total": round(time.perf_counter() - self.started, 3),
        }


def run(job: Job, say: Say = lambda doing: None) -> RunSummary:
    """Do the job.

    Args:
        job: What to do.
        say: Told what starts, a few words each time.

    Returns:
        What is in `summary.json`.

    Raises:
        QBenchError: whatever a step refuses; no file is left behind then.
    """
    clock = Clock(say)
    check_output(job.out, marker=SUMMARY_FILE, overwrite=job.overwrite)
    for runtime in job.runtimes:
        extra, modules = REQUIRED[runtime]
        for module in modules:
            require(module, extra=extra, purpose=f"write and score files for {runtime}")
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    images = data_sets.load(job.data, job.image_size)
    check_steps(job, images)
    trained = train(job, images, clock)
    with clock("convert", "convert"):
        program = to_program(job, images, trained.model)
    with output_folder(job.out, marker=SUMMARY_FILE, overwrite=job.overwrite) as folder:
        verification, deployed = deploy(job, folder, images, trained.model, program, clock)
        with clock("report", "report"):
            figures = layer_figures(trained.model, figure_inputs(images, job.verify_images))
        summary = summarize(job, folder, images, trained, verification, deployed, clock)
        (folder / SUMMARY_FILE).write_text(summary.to_json(), encoding="utf-8")
        (folder / REPORT_FILE).write_text(report_page(summary, figures), encoding="utf-8")
    return summary


def check_steps(job: Job, images: ImageData) -> None:
    """Make sure that QAT takes a step at all: a quantizer that saw no data has no range.

    Raises:
        ConfigError: it takes none.
    """
    if _qat_steps(job, images) == 0:
        count = data_sets.samples_in(images.train)
        raise ConfigError(
            f"{job.qat_training.epochs:g} QAT epochs of {count} images in batches of {job.qat_training.batch_size} are "
            f"no step: a quantizer that saw no data has no range; the default is --qat-epochs {QAT_TRAINING.epochs:g}"
        )


def _qat_steps(job: Job, images: ImageData) -> int:
    return training.count_steps(data_sets.samples_in(images.train), job.qat_training)


def train(job: Job, images: ImageData, clock: Clock) -> Trained:
    """Train float, fuse, prepare and train on; the model that comes back is in eval mode."""
    _check_activations(job)
    torch.manual_seed(job.seed)
    model = build_model(job.model, len(images.classes))
    check_outputs(model, job.model, images.example, len(images.classes))
    example = (images.example,)
    _prepare(copy.deepcopy(model), job, example)  # refuses now what it would refuse after an hour of training
    held_out = data_sets.batches(images.held_out, _SCORE_BATCH, workers=job.float_training.workers)
    with clock("float", "train float"):
        training.fit(model, images.train, job.float_training, label="float")
        float_score = training.evaluate(model, held_out)
    with clock("qat", "train QAT"):
        prepared = _prepare(model, job, example)
        if job.fast_path == "on" or (job.fast_path == "auto" and _qat_steps(job, images) >= WORTH_COMPILING):
            prepared.apply(enable_fast_path)
        fitted = training.fit(prepared, images.train, job.qat_training, label="QAT  ")
        clock.say(str(training_paths(prepared)))
        qat_score = training.evaluate(prepared.eval(), held_out)
    return Trained(prepared, float_score, qat_score, fitted)


def prepare_model(job: Job, classes: int, example: Tensor) -> nn.Module:
    """The QAT model of a job as training starts it, with weights that nothing has trained.

    Raises:
        QBenchError: the model cannot be built, or not be prepared.
    """
    return _prepare(build_model(job.model, classes), job, (example,))


def _widths(job: Job) -> dict[str, Any]:
    return {name: getattr(job, name) for name in ("weight_bits", "activation_bits", "bias_bits", "bias_scale")}


def _chosen_widths(job: Job) -> dict[str, int]:
    """Bits of weight, activation and bias codes, the target's own where the job leaves them to it."""
    qconfig = get_qconfig(job.target, **_widths(job))
    return {
        "weight": qconfig.weight_spec.bits,
        "activation": qconfig.make_activation().spec.bits,
        "bias": qconfig.make_bias().spec.bits,
    }


def _check_activations(job: Job) -> None:
    if get_qconfig(job.target, **_widths(job)).weight_only:
        raise ConfigError(
            f"target {job.target} leaves activations in float, and a run compares their codes; in Python, "
            f"qbench.prepare_by_target(model, {job.target!r}) prepares such a model"
        )


def _prepare(model: nn.Module, job: Job, example: tuple[Tensor, ...]) -> nn.Module:
    fuse(model.eval(), example_inputs=example)  # raises where fusing would change an output
    return prepare_by_target(model.train(), job.target, example_inputs=example, **_widths(job))


def to_program(job: Job, images: ImageData, model: nn.Module) -> ExportedProgram:
    """Convert a trained QAT model for batches of 1 to `job.max_batch` images."""
    if job.max_batch == 1:
        return convert(model, (images.example,), target=job.target)
    two = torch.cat([images.example, images.example])  # a batch of one would be taken for a constant
    batch = torch.export.Dim("batch", min=1, max=job.max_batch)
    try:
        return convert(model, (two,), target=job.target, dynamic_shapes=({0: batch},))
    except ConversionError as error:
        raise ConversionError(f"{error}\nA model that fixes the size of its batch needs --max-batch 1.") from error


def deploy(
    job: Job, folder: Path, images: ImageData, model: nn.Module, program: ExportedProgram, clock: Clock
) -> tuple[Verification, dict[str, Score]]:
    """Write every file into `folder`, compare every form of the model, and score the files in their runtimes."""
    with clock("export", "export"):
        torch.save({name: tensor.cpu() for name, tensor in model.state_dict().items()}, folder / WEIGHTS_FILE)
        torch.export.save(program, folder / PROGRAM_FILE)
        for name in job.runtimes:
            get_runtime(name).export(program, model_file(folder, name))
    with clock("verify", "verify"):
        inputs = held_out_inputs(images, job.verify_images, job.max_batch)
        files = {"program": folder / PROGRAM_FILE, **{name: model_file(folder, name) for name in job.runtimes}}
        verification = verify(model, program, inputs, runtimes=job.runtimes, files=files)
    with clock("score", "score"):
        scores = {name: score_file(name, model_file(folder, name), images, job.max_batch) for name in job.runtimes}
    return verification, scores


def held_out_inputs(images: ImageData, count: int, batch: int) -> Iterator[tuple[Tensor]]:
    """The first `count` held-out images (up to the next full batch), one batch at a time."""
    batches = data_sets.batches(images.held_out, batch)
    return ((pixels,) for pixels, _ in itertools.islice(iter(batches), -(-count // batch)))


def figure_inputs(images: ImageData, count: int) -> Iterator[tuple[Tensor]]:
    """The held-out images that the figures of a report are of."""
    return held_out_inputs(images, min(count, _FIGURE_IMAGES), min(count, _FIGURE_BATCH))


def score_file(runtime: str, path: Path, images: ImageData, batch: int) -> Score:
    """Score a file on every held-out image, run by its runtime in a fresh process.

    Args:
        runtime: Name of a runtime.
        path: The file.
        images: Data whose held-out half is scored.
        batch: Images in a batch.
    """
    running = training.RunningScore()
    with FileRunner(runtime, [path], threads=torch.get_num_threads()) as runner:
        for pixels, labels in data_sets.batches(images.held_out, batch):
            scored = torch.from_numpy(runner.run((pixels,))[0])
            running.add(scored, labels, nn.functional.cross_entropy(scored, labels))
    return running.score()


def summarize(
    job: Job,
    folder: Path,
    images: ImageData,
    trained: Trained,
    verification: Verification,
    deployed: dict[str, Score],
    clock: Clock,
) -> RunSummary:
    """Everything that `summary.json` holds."""
    conversion = conversion_report(trained.model, target=job.target)
    return RunSummary(
        model=job.model,
        data=job.data,
        target=job.target,
        float_top1=trained.float_score.top1,
        qat_top1=trained.qat_score.top1,
        deployed_top1={name: score.top1 for name, score in deployed.items()},
        seconds=clock.rounded(),
        held_out=trained.float_score.images,
        layers=_layers(conversion, verification),
        **verification.summary_fields(),
        notes=(*_left_in_float(trained.model), *_floored(conversion), *doubt_notes(verification), *verification.notes),
        files={path.name: path.stat().st_size for path in sorted(folder.iterdir())},
        settings=_settings(job, images, trained.fitted),
        versions=versions(),
    )


def versions() -> dict[str, str]:
    """Versions of Python, qbench and the libraries that take part, where they are installed."""
    found = {"python": platform.python_version()}
    for name in ("qbench", *_DISTRIBUTIONS):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _layers(conversion: ConversionReport, verification: Verification) -> dict[str, dict[str, Any]]:
    """By path of each layer: what of its parameters was compared, and the integers that it deploys."""
    layers: dict[str, dict[str, Any]] = {}
    for layer in conversion.layers:
        parts = [part for part in verification.layers if part.name.rpartition(".")[0] == layer.path]
        total = Comparison.total(layer.path, tuple(parts))
        deployed = {name: value for name, value in asdict(layer).items() if name != "path"}
        layers[layer.path] = {"codes": total.compared, "different": total.different, **deployed}
    return layers


def _floored(conversion: ConversionReport) -> tuple[str, ...]:
    """What the range of the bias codes cost the weights, in words; nothing where it cost nothing."""
    layers = conversion.coarsened
    if not layers:
        return ()
    worst = max(layers, key=lambda layer: layer.largest_coarsening)
    channels = sum(layer.coarsened for layer in layers)
    return (
        f"the range of the bias codes made the weights of {channels} channels in {len(layers)} layers coarser, by "
        f"{worst.largest_coarsening:.3g} at most ({worst.path})",
    )


def _left_in_float(model: nn.Module) -> tuple[str, ...]:
    """What of the model is not quantized, and why."""
    report = preparation_report(model)
    left = [f"{part.path or 'the model'} ({part.kind}) stays in float: {part.reason}" for part in report.left_in_float]
    return (*left, *(f"{path} was not reached by the example input" for path in report.unreached))


def _settings(job: Job, images: ImageData, fitted: FitResult) -> dict[str, Any]:
    """The options of a run as plain values, with what they came to."""
    return {
        **asdict(job),
        "out": str(job.out),
        "widths": _chosen_widths(job),
        "image_size": images.image_size,
        "threads": torch.get_num_threads(),
        "classes": len(images.classes),
        "qat_steps": fitted.steps,
        "observers_frozen_at_step": fitted.observers_frozen_at,
        "bn_frozen_at_step": fitted.bn_frozen_at,
    }


def model_file(folder: Path, runtime: str) -> Path:
    """Where a run's folder holds the file of a runtime."""
    return folder / f"model{get_runtime(runtime).suffix}"

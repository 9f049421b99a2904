"""The one training loop: plain functions over a model, batches and a frozen `Settings`.

The learning rate at step `i` of `n`, with `t = i / n` in [0, 1):

    constant    lr
    cosine      lr · (1 + cos(π t)) / 2
    one_cycle   lr · (0.1 + 0.9 · t / w)                     for t < w = 0.2, the warm-up
                lr · (1 + cos(π (t − w) / (1 − w))) / 2      after it

A quantized model is trained by the same loop; what differs is *when things stand still*. From `freeze_observers_at` on
ranges no longer follow the data, from `freeze_bn_at` on BN normalises by its running statistics: what the last steps
train is then exactly what is deployed. Both are shares of the run, so that a schedule stays itself when the run gets
longer.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from types import TracebackType
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from qbench.data import Sample, batches, samples_in
from qbench.errors import ConfigError, MissingDependencyError, NumericsError, require
from qbench.modes import evaluating

Batch = Sequence[Tensor]  # (images, labels)
ModuleFunction = Callable[[nn.Module], None]  # what `model.apply` takes
SCHEDULES = ("constant", "cosine", "one_cycle")
_WARM_UP = 0.2


@dataclass(frozen=True)
class Settings:
    """How a model is trained; SGD with Nesterov momentum.

    Attributes:
        epochs: Passes over the training data; a fraction stops within a pass. 0 trains nothing.
        lr: The highest learning rate.
        batch_size: Images in a step.
        momentum: In [0, 1).
        weight_decay: Applied to tensors of two and more dimensions only: not to biases, BN or scales.
        schedule: One of `SCHEDULES`.
        label_smoothing: In [0, 1).
        freeze_observers_at: Share of the run after which ranges stand still, in [0, 1]; None never.
        freeze_bn_at: Share of the run after which BN's running statistics stand still, in [0, 1]; None never.
        seed: Of the order of the images and of everything random within the loop.
        workers: Processes that read images.

    Raises:
        ConfigError: a value outside its range.
    """

    epochs: float = 6.0
    lr: float = 0.05
    batch_size: int = 64
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: str = "one_cycle"
    label_smoothing: float = 0.0
    freeze_observers_at: float | None = None
    freeze_bn_at: float | None = None
    seed: int = 0
    workers: int = 0

    def __post_init__(self) -> None:
        expected = {
            "epochs": (0 <= self.epochs < math.inf, "a number from 0 on"),
            "lr": (0 < self.lr < math.inf, "a number above 0"),
            "batch_size": (self.batch_size >= 2, "at least 2 (BN cannot normalise a batch of one)"),
            "momentum": (0 <= self.momentum < 1, "in [0, 1)"),
            "weight_decay": (0 <= self.weight_decay < math.inf, "a number from 0 on"),
            "schedule": (self.schedule in SCHEDULES, f"one of {', '.join(SCHEDULES)}"),
            "label_smoothing": (0 <= self.label_smoothing < 1, "in [0, 1)"),
            "freeze_observers_at": (_is_share(self.freeze_observers_at), "a share of the run in [0, 1], or None"),
            "freeze_bn_at": (_is_share(self.freeze_bn_at), "a share of the run in [0, 1], or None"),
            "workers": (self.workers >= 0, "at least 0"),
        }
        for name, (holds, meaning) in expected.items():
            if not holds:
                raise ConfigError(f"Settings.{name}={getattr(self, name)!r}: expected {meaning}")


@dataclass(frozen=True)
class Score:
    """Loss and accuracy over some images.

    Attributes:
        loss: Mean cross entropy, in nats.
        top1: Share of images whose highest output is their label, in [0, 1].
        images: How many.
    """

    loss: float
    top1: float
    images: int


@dataclass(frozen=True)
class FitResult:
    """What a run of `fit` did.

    Attributes:
        epochs: Training score of each pass (the last one may be partial).
        steps: Optimizer steps taken.
        observers_frozen_at: Step from which ranges stood still; None if they never did.
        bn_frozen_at: Step from which BN's statistics stood still; None if they never did.
        seconds: Wall-clock time.
    """

    epochs: tuple[Score, ...]
    steps: int
    observers_frozen_at: int | None
    bn_frozen_at: int | None
    seconds: float


class Progress(Protocol):
    """What is told of every step: a bar, or nothing."""

    def __enter__(self) -> Progress: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def step(self, running: RunningScore) -> None:
        """One more step was taken; `running` is the score of this pass so far."""


class Silent:
    """A `Progress` that shows nothing."""

    def __enter__(self) -> Silent:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def step(self, running: RunningScore) -> None:
        """Show nothing."""


class RunningScore:
    """Sums of a pass, kept on the device: nothing waits for it until `score` is called."""

    def __init__(self) -> None:
        self.images = 0
        self._loss = torch.zeros((), dtype=torch.float64)
        self._hits = torch.zeros((), dtype=torch.int64)

    def add(self, outputs: Tensor, labels: Tensor, loss: Tensor) -> None:
        """Count a batch: outputs (batch, classes), labels (batch,), and the batch's mean loss."""
        hits = (outputs.detach().argmax(1) == labels).sum()
        self._loss = self._loss.to(loss.device) + loss.detach().double() * len(labels)
        self._hits = self._hits.to(hits.device) + hits
        self.images += len(labels)

    def score(self) -> Score:
        """The mean so far.

        Raises:
            NumericsError: the loss is not finite any more, or no image was counted.
        """
        if not self.images:
            raise NumericsError("no image was seen: the data set is empty or smaller than a batch")
        loss = self._loss.item() / self.images
        if not math.isfinite(loss):
            raise NumericsError(f"the loss became {loss} after {self.images} images: lower the learning rate (--lr)")
        return Score(loss=loss, top1=self._hits.item() / self.images, images=self.images)


def learning_rate(step: int, total: int, settings: Settings) -> float:
    """Learning rate of step `step` of `total`; the equations above."""
    t = step / max(total, 1)
    if settings.schedule == "constant":
        return settings.lr
    if settings.schedule == "one_cycle":
        if t < _WARM_UP:
            return settings.lr * (0.1 + 0.9 * t / _WARM_UP)
        t = (t - _WARM_UP) / (1 - _WARM_UP)
    return settings.lr * (1 + math.cos(math.pi * t)) / 2


def count_steps(images: int, settings: Settings) -> int:
    """Steps of a run over `images` images; `batches` drops an incomplete batch unless it is the only one."""
    per_epoch = max(1, images // settings.batch_size) if images else 0
    return round(per_epoch * settings.epochs)


def make_optimizer(model: nn.Module, settings: Settings) -> torch.optim.SGD:
    """SGD over every trainable parameter, without weight decay on biases, BN and scales."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.SGD(
        [group for group in groups if group["params"]],
        lr=settings.lr,
        momentum=settings.momentum,
        nesterov=settings.momentum > 0,
    )


def train_epoch(
    model: nn.Module,
    data: Iterable[Batch],
    optimizer: torch.optim.Optimizer,
    *,
    criterion: Callable[[Tensor, Tensor], Tensor] | None = None,
    before_step: Callable[[], None] | None = None,
    progress: Progress | None = None,
    autocast: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Score:
    """One pass over `data`, whatever state the model's BN and quantizers are in.

    Args:
        model: In train mode; its device is where batches are moved to.
        data: Batches of (images, labels).
        optimizer: Stepped once a batch.
        criterion: Mean loss of a batch; None is cross entropy.
        before_step: Called before each forward: sets the learning rate, freezes what is due.
        progress: Told of every step.
        autocast: Context of each forward (mixed precision).

    Raises:
        NumericsError: the loss is not finite, or there was no batch.
    """
    compute_loss = criterion or nn.functional.cross_entropy
    device = _device_of(model)
    running = RunningScore()
    for images, labels in data:
        if before_step is not None:
            before_step()
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        with autocast():
            outputs = model(images)
            loss = compute_loss(outputs, labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        running.add(outputs, labels, loss)
        if progress is not None:
            progress.step(running)
    return running.score()


@torch.no_grad()
def evaluate(model: nn.Module | Callable[[Tensor], Tensor], data: Iterable[Batch]) -> Score:
    """Score a model in eval mode, or any function from images (batch, 3, height, width) to outputs (batch, classes).

    A module's train/eval mode is put back afterwards.

    Raises:
        NumericsError: the loss is not finite, or there was no batch.
    """
    running = RunningScore()
    with evaluating(model) if isinstance(model, nn.Module) else nullcontext():
        device = _device_of(model) if isinstance(model, nn.Module) else torch.device("cpu")
        for images, labels in data:
            outputs = model(images.to(device))
            labels = labels.to(outputs.device)
            running.add(outputs, labels, nn.functional.cross_entropy(outputs.float(), labels))
    return running.score()


def fit(
    model: nn.Module,
    data: Dataset[Sample],
    settings: Settings,
    *,
    freeze_observers: ModuleFunction | None = None,
    freeze_bn: ModuleFunction | None = None,
    label: str = "train",
    show_progress: bool | None = None,
) -> FitResult:
    """Train `model` in place on `data`; the same seed, threads and library versions give the same model.

    Args:
        model: Float or prepared model; left in train mode.
        data: Map-style dataset of (image, label).
        settings: Everything that is chosen about the run.
        freeze_observers: Applied to every module at `settings.freeze_observers_at`; None is `qbench.disable_observer`.
        freeze_bn: Applied to every module at `settings.freeze_bn_at`; None is `qbench.freeze_bn_stats`.
        label: In front of the progress bar.
        show_progress: True or False; None shows a bar where stderr is a terminal and tqdm is installed.

    Raises:
        NumericsError: the loss is not finite, or the data is empty.
    """
    started = time.perf_counter()
    total = count_steps(samples_in(data), settings)
    if total == 0:
        return FitResult((), 0, None, None, 0.0)
    loader = batches(data, settings.batch_size, seed=settings.seed, workers=settings.workers)
    schedule = _Schedule(model, make_optimizer(model, settings), settings, total, freeze_observers, freeze_bn)
    criterion = nn.CrossEntropyLoss(label_smoothing=settings.label_smoothing)
    scores: list[Score] = []
    model.train()
    with torch.random.fork_rng(devices=[]), progress_bar(total, label, show_progress) as progress:
        torch.manual_seed(settings.seed)
        while schedule.step < total:
            due = islice(loader, total - schedule.step)
            scores.append(
                train_epoch(
                    model, due, schedule.optimizer, criterion=criterion, before_step=schedule.advance, progress=progress
                )
            )
    return FitResult(
        epochs=tuple(scores),
        steps=schedule.step,
        observers_frozen_at=schedule.observers_frozen_at,
        bn_frozen_at=schedule.bn_frozen_at,
        seconds=time.perf_counter() - started,
    )


class _Schedule:
    """What is due before each step of a run: the learning rate, and what has to stand still from now on."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.SGD,
        settings: Settings,
        total: int,
        freeze_observers: ModuleFunction | None,
        freeze_bn: ModuleFunction | None,
    ) -> None:
        self.model, self.optimizer, self.settings, self.total = model, optimizer, settings, total
        self.step = 0
        self.observers_frozen_at: int | None = None
        self.bn_frozen_at: int | None = None
        self._freeze_observers, self._freeze_bn = freeze_observers, freeze_bn

    def advance(self) -> None:
        """Make everything ready for the next step."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.total, self.settings)
        if self.observers_frozen_at is None and self._is_due(self.settings.freeze_observers_at):
            self.model.apply(self._freeze_observers or _toggle("disable_observer"))
            self.observers_frozen_at = self.step
        if self.bn_frozen_at is None and self._is_due(self.settings.freeze_bn_at):
            self.model.apply(self._freeze_bn or _toggle("freeze_bn_stats"))
            self.bn_frozen_at = self.step
        self.step += 1

    def _is_due(self, share: float | None) -> bool:
        # The first step is never frozen: a range that saw no data quantizes nothing.
        return share is not None and self.step >= max(1, math.ceil(share * self.total))


def progress_bar(total: int, label: str, show: bool | None = None) -> Progress:
    """A tqdm bar on stderr with loss and accuracy; silent where stderr is no terminal or tqdm is not installed.

    Raises:
        MissingDependencyError: `show` is True and tqdm is not installed.
    """
    if show is False or (show is None and not sys.stderr.isatty()):
        return Silent()
    try:
        return _Bar(total, label)
    except MissingDependencyError:
        if show:
            raise
        return Silent()


class _Bar:
    """A `Progress` on tqdm."""

    def __init__(self, total: int, label: str) -> None:
        tqdm = require("tqdm", extra="cli", purpose="show a progress bar")
        self._bar = tqdm.tqdm(total=total, desc=label, unit="step", dynamic_ncols=True, leave=True, file=sys.stderr)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def step(self, running: RunningScore) -> None:
        """Move on by one, with the score of this pass."""
        score = running.score()
        self._bar.set_postfix_str(f"loss {score.loss:.3f}, top-1 {100 * score.top1:.1f} %", refresh=False)
        self._bar.update(1)


def _toggle(name: str) -> ModuleFunction:
    """One of qbench's switches, found when it is due: training float needs none of them."""
    import qbench

    switch: ModuleFunction = getattr(qbench, name)
    return switch


def _device_of(model: nn.Module) -> torch.device:
    """Where a model's parameters (or buffers) lie; the CPU where it has none."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def _is_share(value: float | None) -> bool:
    return value is None or 0 <= value <= 1

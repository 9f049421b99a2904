"""The loop: what it learns, what it repeats, when it freezes, and what it says when it cannot go on."""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset

from qbench import data, training
from qbench.errors import ConfigError, NumericsError
from qbench.training import Settings


def tiny_cnn() -> nn.Module:
    """Two convolutions with BN, for 8 px digits."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 10),
    )


@pytest.fixture(scope="module")
def digits() -> data.ImageData:
    pytest.importorskip("sklearn.datasets")
    return data.load("digits", image_size=8)


def blobs(count: int = 64) -> TensorDataset:
    """Two separable classes of two numbers each."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 2
    return TensorDataset(torch.randn(count, 2, generator=generator) + 4 * labels[:, None], labels)


class Recorder(nn.Linear):
    """A linear layer that notes, at each training step, what it was told to freeze before."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.frozen: set[str] = set()
        self.seen: list[frozenset[str]] = []

    def forward(self, input: Tensor) -> Tensor:
        self.seen.append(frozenset(self.frozen))
        return super().forward(input)


def marks(name: str) -> Callable[[nn.Module], None]:
    def mark(module: nn.Module) -> None:
        if isinstance(module, Recorder):
            module.frozen.add(name)

    return mark


def test_two_epochs_learn_the_digits(digits: data.ImageData) -> None:
    model = tiny_cnn()
    before = training.evaluate(model, data.batches(digits.held_out, 128))
    result = training.fit(model, digits.train, Settings(epochs=2, lr=0.05))
    after = training.evaluate(model, data.batches(digits.held_out, 128))
    assert before.top1 < 0.3
    assert after.top1 >= 0.95
    assert after.loss < before.loss
    assert (after.images, result.steps, len(result.epochs)) == (450, 42, 2)


def test_the_same_seed_gives_the_same_model_bit_for_bit(digits: data.ImageData) -> None:
    few = Subset(digits.train, range(256))
    models = [tiny_cnn() for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        torch.manual_seed(int(torch.randint(1000, ())))  # whatever the state was before does not matter
        training.fit(model, few, Settings(epochs=1, seed=seed))
    first, again, other = (torch.cat([p.flatten() for p in model.parameters()]) for model in models)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_fit_leaves_the_global_random_state_alone() -> None:
    model = nn.Linear(2, 2)
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    training.fit(model, blobs(), Settings(epochs=1, seed=9))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(("epochs", "steps", "passes"), [(0, 0, 0), (0.5, 4, 1), (1, 8, 1), (1.25, 10, 2), (3, 24, 3)])
def test_a_fraction_of_an_epoch_stops_within_it(epochs: float, steps: int, passes: int) -> None:
    result = training.fit(nn.Linear(2, 2), blobs(64), Settings(epochs=epochs, batch_size=8))
    assert (result.steps, len(result.epochs)) == (steps, passes)


@pytest.mark.parametrize(
    ("observers_at", "bn_at", "expected"),
    [
        (None, None, (None, None)),
        (0.5, 0.75, (4, 6)),
        (0.3, None, (3, None)),
        (0.0, 1.0, (1, None)),  # a range that saw nothing cannot stand still; 1.0 is the end: no step is left
    ],
)
def test_freezing_is_applied_at_its_share_of_the_run(
    observers_at: float | None, bn_at: float | None, expected: tuple[int | None, int | None]
) -> None:
    model = Recorder()
    result = training.fit(
        model,
        blobs(64),
        Settings(epochs=1, batch_size=8, freeze_observers_at=observers_at, freeze_bn_at=bn_at),
        freeze_observers=marks("observers"),
        freeze_bn=marks("bn"),
    )
    assert (result.observers_frozen_at, result.bn_frozen_at) == expected
    for step, seen in enumerate(model.seen):
        assert ("observers" in seen) == (expected[0] is not None and step >= expected[0])
        assert ("bn" in seen) == (expected[1] is not None and step >= expected[1])


@pytest.mark.parametrize("schedule", training.SCHEDULES)
def test_learning_rate_stays_within_its_bounds(schedule: str) -> None:
    rates = [training.learning_rate(step, 100, Settings(lr=0.4, schedule=schedule)) for step in range(100)]
    assert max(rates) == pytest.approx(0.4, rel=1e-3)
    assert min(rates) > 0


@pytest.mark.parametrize(
    ("schedule", "step", "expected"),
    [
        ("constant", 0, 1.0),
        ("constant", 99, 1.0),
        ("cosine", 0, 1.0),
        ("cosine", 50, 0.5),
        ("cosine", 100, 0.0),
        ("one_cycle", 0, 0.1),
        ("one_cycle", 10, 0.55),
        ("one_cycle", 20, 1.0),
        ("one_cycle", 60, 0.5),
        ("one_cycle", 100, 0.0),
    ],
)
def test_learning_rate_by_hand(schedule: str, step: int, expected: float) -> None:
    assert training.learning_rate(step, 100, Settings(lr=1.0, schedule=schedule)) == pytest.approx(expected, abs=1e-12)


def test_weight_decay_spares_biases_bn_and_scales() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    model[3].bias.requires_grad_(False)
    decayed, spared = training.make_optimizer(model, Settings(weight_decay=0.1)).param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert {id(p) for p in decayed["params"]} == {id(model[0].weight), id(model[3].weight)}
    assert {id(p) for p in spared["params"]} == {id(model[0].bias), id(model[1].weight), id(model[1].bias)}


def test_evaluate_counts_hits_and_puts_every_mode_back() -> None:
    model = nn.Sequential(nn.Identity(), nn.Dropout(0.9), nn.BatchNorm1d(2))
    model[2].eval()
    outputs = torch.tensor([[2.0, 1.0], [0.0, 3.0], [5.0, 4.0]])
    score = training.evaluate(model, [(outputs, torch.tensor([0, 1, 1]))])
    assert score.top1 == pytest.approx(2 / 3)
    assert [module.training for module in (model, *model)] == [True, True, True, False]


def test_evaluate_takes_any_function_and_weighs_batches_by_their_size() -> None:
    def runtime(images: Tensor) -> Tensor:
        return torch.stack([images[:, 0], -images[:, 0]], dim=1)

    sized = [(torch.ones(3, 1), torch.zeros(3).long()), (torch.ones(1, 1), torch.ones(1).long())]
    score = training.evaluate(runtime, sized)
    hit, miss = math.log1p(math.exp(-2)), math.log1p(math.exp(2))
    assert score.top1 == 0.75
    assert score.loss == pytest.approx((3 * hit + miss) / 4)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"epochs": -1}, "epochs=-1: expected a number from 0 on"),
        ({"epochs": math.nan}, "epochs=nan"),
        ({"lr": 0}, "lr=0: expected a number above 0"),
        ({"batch_size": 1}, "batch of one"),
        ({"momentum": 1.0}, r"momentum=1.0: expected in \[0, 1\)"),
        ({"schedule": "step"}, "expected one of constant, cosine, one_cycle"),
        ({"freeze_bn_at": 1.5}, "freeze_bn_at=1.5: expected a share"),
        ({"freeze_observers_at": -0.1}, "freeze_observers_at=-0.1"),
        ({"workers": -1}, "workers=-1"),
    ],
)
def test_settings_out_of_range(change: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Settings(**change)  # type: ignore[arg-type]


def test_a_diverging_run_says_so() -> None:
    model = nn.Linear(2, 2)
    nn.init.constant_(model.weight, math.inf)
    with pytest.raises(NumericsError, match=r"loss became nan .* lower the learning rate"):
        training.fit(model, blobs(), Settings(epochs=1))


def test_evaluating_nothing_is_an_error() -> None:
    with pytest.raises(NumericsError, match="no image was seen"):
        training.evaluate(nn.Linear(2, 2), [])


class Terminal(io.StringIO):
    """A stderr that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("stream", "show", "shown"), [(io.StringIO, None, False), (Terminal, None, True)])
def test_the_bar_is_shown_on_a_terminal_only(
    stream: type[io.StringIO], show: bool | None, shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tqdm")
    stderr = stream()
    monkeypatch.setattr(sys, "stderr", stderr)
    training.fit(nn.Linear(2, 2), blobs(), Settings(epochs=2, batch_size=8), label="float", show_progress=show)
    assert bool(stderr.getvalue()) == shown
    if shown:
        assert "float" in stderr.getvalue()
        assert "16/16" in stderr.getvalue()
        assert "top-1" in stderr.getvalue()


def test_the_bar_can_be_forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert isinstance(training.progress_bar(3, "x", False), training.Silent)


def test_without_tqdm_the_loop_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    stderr = Terminal()
    monkeypatch.setattr(sys, "stderr", stderr)
    result = training.fit(nn.Linear(2, 2), blobs(), Settings(epochs=1))
    assert (result.steps, stderr.getvalue()) == (1, "")

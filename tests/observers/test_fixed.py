"""Observers whose grid is known before any data: it is what was asked for, to the bit, whatever is seen."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch

from qbench.errors import ConfigError
from qbench.fake_quantize import LSQ, FakeQuantize
from qbench.numerics.qparams import QSpec
from qbench.observers import FixedGridObserver, FixedRangeObserver, MinMaxObserver

INT8 = QSpec(bits=8)
SEEN = [torch.zeros(3), torch.randn(100, generator=torch.Generator().manual_seed(1)) * 50]


@pytest.mark.parametrize("spec", [INT8, QSpec(bits=16), QSpec(bits=8, signed=False), QSpec(bits=4)], ids=str)
@pytest.mark.parametrize("scale", [1 / 256, 1 / 128, 0.1, 1 / 3, 7e-5, 12.3])
def test_a_grid_is_that_grid(spec: QSpec, scale: float) -> None:
    for zero_point in (spec.qmin, 3, spec.qmax):
        observer = FixedGridObserver(spec, scale, zero_point)
        assert observer.known == (float(np.float32(scale)), zero_point)
        for x in SEEN:
            found = observer(x)
            assert (found.scale.item(), found.zero_point.item()) == observer.known
            assert (found.qmin, found.qmax, found.zero_point.dtype) == (spec.qmin, spec.qmax, torch.int32)


def test_a_range_alone_would_not_be_that_grid_to_the_bit() -> None:
    scales = np.float32(np.linspace(0.001, 0.1, 500))
    differ = 0
    for scale in scales:
        grid = FixedGridObserver(INT8, float(scale), 5)
        differ += FixedRangeObserver(INT8, grid.low, grid.high).known[0] != grid.known[0]
    assert differ > 0


@pytest.mark.parametrize(
    ("spec", "low", "high", "known"),
    [
        (INT8, 0.0, 255 / 256, (1 / 256, -128)),
        (QSpec(bits=8, signed=False), 0.0, 255 / 256, (1 / 256, 0)),
        (INT8, -1.0, 127 / 128, (1 / 128, 0)),
        (QSpec(bits=8, symmetric=True), 0.0, 127 / 128, (1 / 128, 0)),
        (QSpec(bits=8, power_of_two=True), 0.0, 0.9, (1 / 256, -128)),
    ],
)
def test_a_range_is_what_the_spec_makes_of_it(
    spec: QSpec, low: float, high: float, known: tuple[float, int]
) -> None:
    observer = FixedRangeObserver(spec, low, high)
    assert observer.known == known
    for x in SEEN:
        found = observer(x)
        assert (found.scale.item(), found.zero_point.item()) == known


def test_a_quantizer_keeps_it_in_training() -> None:
    quantizer = FakeQuantize(INT8, FixedGridObserver(INT8, 0.1, 7)).train()
    for x in SEEN:
        quantizer(x)
        found = quantizer.scale.item(), quantizer.zero_point.item()
        assert quantizer.known_grid == found == (float(np.float32(0.1)), 7)
    out = quantizer(torch.tensor([-100.0, 0.04, 0.06, 100.0]))
    assert torch.allclose(out, torch.tensor([-13.5, 0.0, 0.1, 12.0]))


def test_only_what_stays_is_known() -> None:
    assert FakeQuantize(INT8, MinMaxObserver(INT8)).known_grid is None
    assert LSQ(INT8, FixedGridObserver(INT8, 0.1, 7)).known_grid is None  # where it starts


def test_copies() -> None:
    quantizer = FakeQuantize(INT8, FixedGridObserver(INT8, 0.1, 7)).train()
    quantizer(SEEN[1])
    for made in (copy.deepcopy(quantizer), pickle.loads(pickle.dumps(quantizer))):
        assert made.known_grid == quantizer.known_grid
        assert torch.equal(made(SEEN[1]), quantizer(SEEN[1]))
    fresh = FakeQuantize(INT8, FixedGridObserver(INT8, 0.1, 7))
    fresh.load_state_dict(quantizer.state_dict())
    assert torch.equal(fresh.eval()(SEEN[1]), quantizer(SEEN[1]))


@pytest.mark.parametrize(
    ("spec", "scale", "zero_point", "says"),
    [
        (INT8, 0.0, 0, "positive and finite, 1/256"),
        (INT8, float("inf"), 0, "positive and finite"),
        (INT8, float("nan"), 0, "positive and finite"),
        (INT8, "1/256", 0, "positive and finite"),
        (INT8, 0.1, 128, r"among the codes -128 … 127"),
        (QSpec(bits=8, narrow=True), 0.1, -128, r"among the codes -127 … 127"),
        (INT8, 0.1, 0.5, "among the codes"),
        (QSpec(bits=8, symmetric=True), 0.1, 1, r"has the zero point 0; QSpec\(symmetric=False\)"),
        (QSpec(bits=8, signed=False, symmetric=True), 0.1, 0, "has the zero point 128"),
        (QSpec(bits=8, power_of_two=True), 0.1, 0, "a power of two, .*0.125 is the nearest"),
        (QSpec(bits=8, axis=0), 0.1, 0, r"for a whole tensor.*QSpec\(axis=None\)"),
    ],
)
def test_refused(spec: QSpec, scale: object, zero_point: object, says: str) -> None:
    with pytest.raises(ConfigError, match=f"a grid with scale .*{says}"):
        FixedGridObserver(spec, scale, zero_point)  # type: ignore[arg-type]

"""What takes tensors and numbers gives the same bits for both."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from qbench.numerics.interval import Numbers
from qbench.numerics.qparams import QParams, QSpec
from qbench.observers import MinMaxObserver, MovingAverageMinMaxObserver, Observer

ENDS = [0.0, -0.0, 1e-45, -3e-39, 0.1, -0.7, 6.0, 255.0, -3e38, 3.4e38, math.inf, -math.inf, math.nan]
SPECS = [
    QSpec(),
    QSpec(signed=False),
    QSpec(bits=4, signed=False),
    QSpec(bits=16),
    QSpec(symmetric=True),
    QSpec(symmetric=True, narrow=True),
    QSpec(symmetric=True, signed=False),
]


def bits(value: Tensor) -> Tensor:
    """NaN is equal to NaN, 0 is not −0."""
    return torch.where(value.isnan(), math.nan, value).view(torch.int32)


def assert_same(found: Numbers | None, wanted: QParams, one: Observer, other: Observer) -> None:
    assert found is not None
    assert torch.equal(bits(torch.tensor(found.scale)), bits(wanted.scale))
    assert found[1:] == (int(wanted.zero_point), wanted.qmin, wanted.qmax)
    for ours, theirs in zip(one.state(), other.state(), strict=True):
        assert torch.equal(bits(ours), bits(theirs))


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("kind", [MinMaxObserver, MovingAverageMinMaxObserver])
def test_ranges_move_as_those_of_tensors(kind: type[Observer], spec: QSpec) -> None:
    for first in itertools.product(ENDS, ENDS):
        one, other = kind(spec), kind(spec)
        for low, high in (first, (-0.3, 0.9), (0.0, 5.0), first):
            ends = torch.tensor(low), torch.tensor(high)
            assert_same(one.numbers_of_ends(*ends), other.observe_ends(*ends), one, other)


def test_random_ranges_move_as_those_of_tensors() -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = (MovingAverageMinMaxObserver(QSpec(signed=False)) for _ in range(2))
    for _ in range(2000):
        ends = torch.randn(2, generator=generator).mul(torch.randn(1, generator=generator).exp()).sort().values
        assert_same(one.numbers_of_ends(*ends), other.observe_ends(*ends), one, other)


class Widened(MinMaxObserver):
    """One that was written for tensors."""

    def follow(self, low: Tensor, high: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        low, high, *state = super().follow(low, high, *state)
        return low.mul(1.5), high.mul(1.5), *state


@pytest.mark.parametrize(
    "observer", [Widened(QSpec()), MinMaxObserver(QSpec(power_of_two=True)), MinMaxObserver(QSpec(bits=32))], ids=str
)
def test_what_takes_tensors_gets_tensors(observer: Observer) -> None:
    ends = torch.tensor(-1.0), torch.tensor(2.0)
    assert observer.numbers_of_ends(*ends) is None
    assert torch.isfinite(observer.observe_ends(*ends).scale)


def test_several_uses_take_tensors() -> None:
    observer = MovingAverageMinMaxObserver(QSpec())
    observer.expect(2)
    assert observer.numbers_of_ends(torch.tensor(-1.0), torch.tensor(2.0)) is None

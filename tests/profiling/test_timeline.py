"""Every moment of a step is somebody's: on a clock that only layers move, shares are known to the last tick."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import Calls
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import qbench
from qbench.profiling.timeline import OPTIMIZER, OUTSIDE, HostClock, Watch


class Ticks:
    """A clock that stands still until somebody moves it."""

    def __init__(self) -> None:
        self.time = 0

    def now(self) -> int:
        return self.time

    def settle(self) -> None:
        pass

    def seconds(self, start: int, end: int) -> float:
        return end - start


class Work(torch.autograd.Function):
    """The identity, which takes so long."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, clock: Ticks, forward: int, backward: int) -> Tensor:
        clock.time += forward
        ctx.clock, ctx.backward_ticks = clock, backward
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        ctx.clock.time += ctx.backward_ticks
        return gradients[0], None, None, None


class Layer(nn.Module):
    """Works so long in forward and in backward."""

    def __init__(self, clock: Ticks, forward: int, backward: int) -> None:
        super().__init__()
        self.clock, self.ticks = clock, (forward, backward)
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return Work.apply(x * self.scale, self.clock, *self.ticks)


def chain(m: nn.Module, x: Tensor) -> Tensor:
    return m.b(m.a(x))


def twice(m: nn.Module, x: Tensor) -> Tensor:
    return m.a(m.b(m.a(x)))


def branches(m: nn.Module, x: Tensor) -> Tensor:
    y = m.a(x)
    return y + m.b(y)


def in_place(m: nn.Module, x: Tensor) -> Tensor:
    y = m.a(x)
    y += 1
    return m.b(y).mul_(2)


def between(m: nn.Module, x: Tensor) -> Tensor:
    return m.b(Work.apply(m.a(x), m.a.clock, 100, 1000))


def detached(m: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = m.a(x)
    return m.b(y)


def recomputed(m: nn.Module, x: Tensor) -> Tensor:
    return m.b(checkpoint(lambda y: m.a(y).exp(), x, use_reentrant=False))


def caught(m: nn.Module, x: Tensor) -> Tensor:
    try:
        m.a(x[0, 0], None)
    except TypeError:
        return m.b(x)
    raise AssertionError


A, B = (3, 5), (7, 11)


@pytest.mark.parametrize(
    ("forward", "a", "b", "outside"),
    [
        (chain, A, B, (0, 0)),
        (twice, (6, 10), B, (0, 0)),
        (branches, A, B, (0, 0)),
        (in_place, A, B, (0, 0)),
        (between, A, B, (100, 1000)),
        (detached, (3, 0), B, (0, 0)),
        (recomputed, (3, 3 + 5), B, (0, 0)),
        (caught, (0, 0), B, (0, 0)),
    ],
    ids=lambda value: value.__name__ if callable(value) else None,
)
def test_shares(
    forward: Callable[..., Tensor], a: tuple[int, int], b: tuple[int, int], outside: tuple[int, int]
) -> None:
    clock = Ticks()
    model = Calls(forward, a=Layer(clock, *A), b=Layer(clock, *B))
    layers = {"a": model.a, "b": model.b}
    with Watch(layers, clock) as watch:
        watch.begin("forward")
        loss = model(torch.ones(2, 3, requires_grad=True)).sum()
        watch.follow(loss)
        clock.time += 10_000  # what following takes is nobody's
        watch.begin("backward")
        loss.backward()
        watch.begin("update", OPTIMIZER)
        clock.time += 20
        watch.end()
    found = Counter({key: ticks for key, ticks in watch.shares().items() if ticks})
    owners = {"a": a, "b": b, OUTSIDE: outside}
    expected = {
        (owner, phase): ticks
        for owner, both in owners.items()
        for phase, ticks in zip(("forward", "backward"), both, strict=True)
        if ticks
    }
    assert found == {**expected, (OPTIMIZER, "update"): 20}
    assert sum(found.values()) == clock.time - 10_000


def test_without_layers_the_phases_are_told_apart() -> None:
    clock = Ticks()
    model = nn.Sequential(Layer(clock, *A), Layer(clock, *B))
    with Watch({}, clock) as watch:
        watch.begin("forward")
        loss = model(torch.ones(2)).sum()
        watch.follow(loss)
        watch.begin("backward")
        loss.backward()
        watch.end()
    assert watch.shares() == {(OUTSIDE, "forward"): 10, (OUTSIDE, "backward"): 16}


def test_hooks_are_gone_after_an_error() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match="shapes"), Watch({"": model}, HostClock()) as watch:
        watch.begin("forward")
        model(torch.ones(2, 3))
    assert not model._forward_hooks and not model._forward_pre_hooks


X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def trained_step(watched: bool, **options: Any) -> tuple[Counter[str], list[Tensor]]:
    """Nodes that a step of a QAT model records, and the gradients that it ends with."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 4, 3), nn.Hardswish()
    )
    model = qbench.prepare_qat(qbench.fuse(net), qconfig=qbench.get_qconfig(**options), example_inputs=(X,))
    layers = {path: child for path, child in model.named_children() if watched}
    with Watch(layers, HostClock()) as watch:
        loss = model(X).square().sum()
        watch.follow(loss)
        names: Counter[str] = Counter()
        waiting, seen = [loss.grad_fn], set()
        while waiting:
            node = waiting.pop()
            if node is not None and node not in seen:
                seen.add(node)
                names[node.name()] += 1
                waiting += [source for source, _ in node.next_functions]
        loss.backward()
    return names, [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("method", ["fixed", "lsq"])
def test_watching_changes_neither_what_is_computed_nor_how(method: str) -> None:
    plain, expected = trained_step(False, method=method)
    names, gradients = trained_step(True, method=method)
    assert names == plain
    assert [torch.equal(one, other) for one, other in zip(gradients, expected, strict=True)] == [True] * len(expected)

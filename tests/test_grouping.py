"""Quantizers that meet: one grid for all, unless one of the grids is known and cannot become another."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qbench
from qbench.errors import LinkError
from tests.models import Calls, assert_exact, images, links, train

Way = Callable[[Any, Tensor], Tensor]


def prepared(way: Way) -> nn.Module:
    torch.manual_seed(0)
    model = Calls(
        way, a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(3, 4, 1), p=nn.Softmax(1), q=nn.Softmax(1), cat=qbench.nn.Cat(1),
        outer=qbench.nn.Cat(1), add=qbench.nn.Add(), head=nn.Conv2d(4, 2, 1), last=nn.Conv2d(8, 2, 1),
    )  # fmt: skip
    with torch.no_grad():
        model.b.weight.mul_(20)  # far outside of [0, 1]
    prepared = qbench.prepare_qat(model, qconfig=qbench.get_qconfig(), example_inputs=(images(),))
    for path in qbench.preparation_report(prepared).unreached:
        del prepared._modules[path]
    return prepared


def grid(model: nn.Module, path: str) -> tuple[float, int]:
    quantizer = model.get_submodule(path).output_quantizer
    return float(quantizer.scale), int(quantizer.zero_point)


KNOWN = (1 / 256, -128)
# Way → inputs that are put on another grid.
MEETING: dict[str, tuple[Way, set[tuple[str, int]]]] = {
    "cat of a probability and a layer": (lambda m, x: m.last(m.cat([m.p(m.a(x)), m.b(x)])), {("cat", 0)}),
    "cat, the other way round": (lambda m, x: m.last(m.cat([m.b(x), m.p(m.a(x))])), {("cat", 1)}),
    "cat of a probability and a float": (lambda m, x: m.last(m.cat([m.p(m.a(x)), 9 * m.b(x)])), {("cat", 0)}),
    "cat of cats": (
        lambda m, x: m.outer([m.cat([m.p(m.a(x)), m.q(m.b(x))]), m.b(x)]), {("outer", 0)}
    ),
    "cat of probabilities that meets a layer": (
        lambda m, x: m.add(m.cat([m.p(m.a(x)), m.q(m.b(x))]), m.outer([m.a(x), m.b(x)])), set(),
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:quantizer .* has seen no data:qbench.errors.QBenchWarning")
@pytest.mark.parametrize("name", MEETING)
def test_a_known_grid_stays_and_clips_nothing(name: str) -> None:
    way, expected = MEETING[name]
    model = prepared(way)
    found = qbench.preparation_report(model).requantized
    assert {(again.path, again.index) for again in found} == expected
    assert all({"p", "cat"} & set(again.reads) for again in found)
    x = images()
    train(model, x, steps=3, rate=1e-3)
    assert grid(model, "p") == KNOWN
    shared = model.cat.output_quantizer is model.p.output_quantizer
    assert shared == (not any(path == "cat" for path, _ in expected))
    if ("cat", 0) in expected or ("cat", 1) in expected:
        assert grid(model, "cat") != KNOWN and model(x).isfinite().all()
        scale, zero_point = grid(model, "cat")
        assert (127 - zero_point) * scale > 2  # what the layer puts out is not cut off at 1
    assert_exact(model, qbench.convert(model, (x,)), images(seed=3))


def test_equal_known_grids_are_one() -> None:
    model = prepared(lambda m, x: m.last(m.cat([m.p(m.a(x)), m.q(m.b(x))])))
    assert model.p.output_quantizer is model.q.output_quantizer is model.cat.output_quantizer
    assert not qbench.preparation_report(model).requantized
    train(model, images(), steps=2)
    assert grid(model, "cat") == KNOWN


class Either(nn.Module):
    """A head that reads a probability or a layer's output."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.p, self.b, self.head = nn.Conv2d(3, 4, 1), nn.Softmax(1), nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor, probable: bool) -> Tensor:
        return self.head(self.p(self.a(x)) if probable else self.b(x) * 1)


class EitherLayer(Either):
    def forward(self, x: Tensor, probable: bool) -> Tensor:
        return self.head(self.p(self.a(x)) if probable else self.b(x))


@pytest.mark.parametrize("kind", [Either, EitherLayer], ids=["or a float", "or a layer"])
def test_a_branch_of_a_known_grid(kind: type[Either]) -> None:
    torch.manual_seed(0)
    x = images()
    model = qbench.prepare_qat(
        kind(), qconfig=qbench.get_qconfig(), example_inputs=[(x, True), (x, False)]
    )
    assert links(model)["head"] == ("head.input_quantizers.0",)
    assert "input 0 of head: on another grid there, as that of p" in str(qbench.preparation_report(model))
    for _ in range(3):
        for probable in (True, False):
            model.train()(x, probable)
    assert grid(model, "p") == KNOWN
    model.eval()
    for made in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for probable in (True, False):
            assert torch.equal(made(x, probable), model(x, probable))
            assert_exact(made, qbench.convert(made, (x, probable)), x, probable)


def test_a_producer_that_no_forward_showed_is_still_an_error() -> None:
    x = images()
    model = qbench.prepare_qat(EitherLayer(), qconfig=qbench.get_qconfig(), example_inputs=(x, True))
    model.train()(x, True)
    model.b.connect(model.a.sources, ())
    with pytest.raises(LinkError, match="which no recorded forward showed"):
        model(x, False)

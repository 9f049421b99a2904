"""Observers: the range they keep, against numpy, and the grid that follows."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor

from qbench.numerics.qparams import QSpec
from qbench.observers import LatestMinMaxObserver, MinMaxObserver, MovingAverageMinMaxObserver, Observer

INT8 = QSpec(bits=8)
SHAPE = (4, 3, 5, 6)
ALL = [LatestMinMaxObserver, MinMaxObserver, MovingAverageMinMaxObserver]
KEEPING = [MinMaxObserver, MovingAverageMinMaxObserver]

every = pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
keeping = pytest.mark.parametrize("kind", KEEPING, ids=lambda kind: kind.__name__)
axes = pytest.mark.parametrize("axis", [None, 0, 1, 3], ids=["per tensor", "axis 0", "axis 1", "axis 3"])


def batches(count: int = 6) -> list[Tensor]:
    made = torch.Generator().manual_seed(4)
    return [torch.randn(SHAPE, generator=made) * (1 + step) + 0.2 * step - 0.5 for step in range(count)]


def ranges(x: Tensor, axis: int | None) -> tuple[np.ndarray, np.ndarray]:
    values = x.numpy()
    others = None if axis is None else tuple(dim for dim in range(values.ndim) if dim != axis)
    return values.min(axis=others), values.max(axis=others)


def expected_range(kind: type[Observer], seen: list[Tensor], axis: int | None) -> tuple[np.ndarray, np.ndarray]:
    found = [ranges(x, axis) for x in seen]
    if kind is LatestMinMaxObserver:
        return found[-1]
    if kind is MinMaxObserver:
        return np.min([low for low, _ in found], axis=0), np.max([high for _, high in found], axis=0)
    low, high = found[0]
    for new_low, new_high in found[1:]:
        low = low + np.float32(0.01) * (new_low - low)
        high = high + np.float32(0.01) * (new_high - high)
    return low, high


@every
@axes
class TestRanges:
    def test_the_grid_is_that_of_the_range(self, kind: type[Observer], axis: int | None) -> None:
        observer = kind(QSpec(bits=8, axis=axis))
        seen: list[Tensor] = []
        for x in batches():
            seen.append(x)
            grid = observer(x)
            low, high = (np.asarray(bound, np.float64) for bound in expected_range(kind, seen, axis))
            scale = (np.maximum(high, 0) - np.minimum(low, 0)) / 255
            zero = np.clip(-128 - np.rint(np.minimum(low, 0) / scale), -128, 127)
            np.testing.assert_allclose(grid.scale.numpy(), scale, rtol=1e-6)
            np.testing.assert_array_equal(grid.zero_point.numpy(), zero)
            assert grid.axis == axis and (grid.qmin, grid.qmax) == (-128, 127)
            assert grid.scale.dtype == torch.float32 and grid.zero_point.dtype == torch.int32

    def test_symmetric(self, kind: type[Observer], axis: int | None) -> None:
        observer = kind(QSpec(bits=8, symmetric=True, narrow=True, axis=axis))
        for x in batches():
            grid = observer(x)
        low, high = expected_range(kind, batches(), axis)
        np.testing.assert_allclose(grid.scale.numpy(), np.maximum(-low, high) / 127, rtol=1e-6)
        assert (grid.zero_point == 0).all()

    def test_gradients_and_the_input_are_left_alone(self, kind: type[Observer], axis: int | None) -> None:
        x = batches(1)[0].requires_grad_()
        before = x.detach().clone()
        grid = kind(QSpec(bits=8, axis=axis))(x)
        assert torch.equal(x, before)
        assert not grid.scale.requires_grad

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_other_dtypes(self, kind: type[Observer], axis: int | None, dtype: torch.dtype) -> None:
        x = batches(1)[0].to(dtype)
        grid, plain = kind(QSpec(bits=8, axis=axis))(x), kind(QSpec(bits=8, axis=axis))(x.float())
        assert grid.scale.dtype == torch.float32
        assert torch.equal(grid.scale, plain.scale) and torch.equal(grid.zero_point, plain.zero_point)

    def test_memory_format_does_not_matter(self, kind: type[Observer], axis: int | None) -> None:
        x = batches(1)[0]
        first = kind(QSpec(bits=8, axis=axis))(x)
        second = kind(QSpec(bits=8, axis=axis))(x.to(memory_format=torch.channels_last))
        assert torch.equal(first.scale, second.scale)


class TestMovingAverage:
    def test_the_first_tensor_sets_the_range(self) -> None:
        observer = MovingAverageMinMaxObserver(INT8)
        observer(torch.tensor([-3.0, 5.0]))
        assert (observer.min_val.item(), observer.max_val.item()) == (-3.0, 5.0)

    @pytest.mark.parametrize("constant", [0.01, 0.1, 0.5, 1.0])
    def test_then_it_moves_by_the_constant(self, constant: float) -> None:
        observer = MovingAverageMinMaxObserver(INT8, averaging_constant=constant)
        observer(torch.tensor([-3.0, 5.0]))
        observer(torch.tensor([-1.0, 25.0]))
        assert observer.min_val.item() == pytest.approx(-3 + 2 * constant, rel=1e-6)
        assert observer.max_val.item() == pytest.approx(5 + 20 * constant, rel=1e-6)

    def test_it_settles_on_a_steady_range(self) -> None:
        observer = MovingAverageMinMaxObserver(INT8, averaging_constant=0.1)
        observer(torch.tensor([0.0, 100.0]))
        for _ in range(200):
            observer(torch.tensor([-1.0, 1.0]))
        assert observer.max_val.item() == pytest.approx(1.0, abs=1e-4)
        assert observer.min_val.item() == pytest.approx(-1.0, abs=1e-4)

    def test_a_range_of_one_sign_keeps_zero_representable(self) -> None:
        grid = MovingAverageMinMaxObserver(INT8)(torch.tensor([2.0, 5.0]))
        assert grid.scale.item() == pytest.approx(5 / 255) and grid.zero_point.item() == -128


class TestMinMax:
    def test_it_only_widens(self) -> None:
        observer = MinMaxObserver(INT8)
        widths = []
        for x in batches():
            observer(x)
            observer(torch.zeros(1))
            widths.append((observer.max_val - observer.min_val).item())
        assert widths == sorted(widths)


class TestLatest:
    def test_it_remembers_nothing(self) -> None:
        observer = LatestMinMaxObserver(INT8)
        first = observer(batches()[0])
        observer(batches()[5])
        assert torch.equal(observer(batches()[0]).scale, first.scale)
        assert not observer.state_dict() and observer.stateless


class TestState:
    @keeping
    @axes
    def test_grids_handed_out_do_not_move(self, kind: type[Observer], axis: int | None) -> None:
        observer = kind(QSpec(bits=8, axis=axis))
        first = observer(batches()[0])
        kept = first.scale.clone(), first.zero_point.clone()
        for x in batches():
            observer(x * 3)
        assert torch.equal(first.scale, kept[0]) and torch.equal(first.zero_point, kept[1])

    @keeping
    def test_per_tensor_ranges_stay_in_their_buffers(self, kind: type[Observer]) -> None:
        observer = kind(INT8)
        buffers = observer.min_val, observer.max_val
        for x in batches():
            observer(x)
        assert observer.min_val is buffers[0] and observer.max_val is buffers[1]

    @keeping
    @axes
    def test_copies_go_on_alone(self, kind: type[Observer], axis: int | None) -> None:
        observer = kind(QSpec(bits=8, axis=axis))
        observer(batches()[0])
        for twin in (copy.deepcopy(observer), pickle.loads(pickle.dumps(observer))):
            assert torch.equal(twin(batches()[5]).scale, copy.deepcopy(observer)(batches()[5]).scale)
        assert torch.equal(observer.max_val, torch.as_tensor(ranges(batches()[0], axis)[1]))

    @keeping
    def test_nothing_seen_is_an_empty_range(self, kind: type[Observer]) -> None:
        observer = kind(INT8)
        assert observer.min_val.item() == float("inf") and observer.max_val.item() == float("-inf")


class TestOddTensors:
    @every
    def test_zeros_give_a_usable_grid(self, kind: type[Observer]) -> None:
        grid = kind(INT8)(torch.zeros(4))
        assert grid.scale.item() > 0 and np.isfinite(1 / grid.scale.item())
        grid.check("zeros")

    @every
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    def test_a_value_that_is_not_finite_is_not_hidden(self, kind: type[Observer], value: float) -> None:
        from qbench.errors import NumericsError

        grid = kind(INT8)(torch.tensor([1.0, value]))
        with pytest.raises(NumericsError, match="scales must be positive and finite"):
            grid.check("x")

    def test_one_value(self) -> None:
        grid = LatestMinMaxObserver(INT8)(torch.tensor(3.0))
        assert grid.scale.item() == pytest.approx(3 / 255)


def test_a_subclass_says_how_it_updates() -> None:
    class Mine(Observer):
        pass

    with pytest.raises(NotImplementedError, match=r"Mine must implement follow\(low, high"):
        Mine(INT8)(torch.ones(3))


def test_percentiles_as_a_class_of_ones_own() -> None:
    class Percentile(Observer):
        def update(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return torch.quantile(x, 0.01), torch.quantile(x, 0.99)

    grid = Percentile(INT8)(torch.linspace(0, 100, 101))
    assert grid.scale.item() == pytest.approx(99 / 255)

"""Averaging observers that a forward shows several tensors: the range follows the hull of all of them."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

from qbench.errors import NumericsError
from qbench.fake_quantize import FakeQuantize
from qbench.numerics.qparams import QSpec
from qbench.observers import (
    MovingAverageMinMaxObserver,
    MSEObserver,
    Observer,
    PowerOfTwoObserver,
    QuantileObserver,
)

INT8 = QSpec(bits=8)
AVERAGING = [MovingAverageMinMaxObserver, QuantileObserver, MSEObserver, PowerOfTwoObserver]
averaging = pytest.mark.parametrize("kind", AVERAGING, ids=lambda kind: kind.__name__)

Ranges = list[tuple[float, float]]


def observer(uses: int, constant: float = 0.1, axis: int | None = None) -> MovingAverageMinMaxObserver:
    made = MovingAverageMinMaxObserver(QSpec(bits=8, axis=axis), averaging_constant=constant)
    made.expect(uses)
    return made


def kept(one: Observer) -> tuple[float, float]:
    return one.min_val.item(), one.max_val.item()


def show(one: Observer, ranges: Iterable[tuple[float, float]]) -> Observer:
    for low, high in ranges:
        one(torch.tensor([low, high]))
    return one


def random_ranges(count: int) -> Ranges:
    generator = torch.Generator().manual_seed(3)
    return [(-float(low) * 9, float(high) * 7) for low, high in torch.rand(count, 2, generator=generator)]


def tensors(count: int = 9) -> list[Tensor]:
    """Scales 1, 5 and 25 in turn, (2, 3, 4) each."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(2, 3, 4, generator=generator) * 5.0 ** (step % 3) + 0.1 for step in range(count)]


def expected(ranges: Ranges, uses: int, constant: float) -> tuple[float, float]:
    """The equation, in float64, from the list of everything seen."""
    weight = 1 - (1 - constant) ** (1 / uses)
    low = high = None
    for end in range(1, len(ranges) + 1):
        last = ranges[max(0, end - uses) : end]
        lowest, highest = min(one for one, _ in last), max(one for _, one in last)
        if low is None or high is None or end <= uses:
            low, high = lowest, highest
        else:
            low, high = low + weight * (lowest - low), high + weight * (highest - high)
    assert low is not None and high is not None
    return low, high


class TestRange:
    @pytest.mark.parametrize("count", [1, 2, 3, 4, 17])
    @pytest.mark.parametrize("uses", [1, 2, 3, 5])
    def test_the_equation(self, uses: int, count: int) -> None:
        ranges = random_ranges(count)
        assert kept(show(observer(uses), ranges)) == pytest.approx(expected(ranges, uses, 0.1), rel=1e-5)

    def test_one_use_has_the_bits_of_the_plain_average(self) -> None:
        again = observer(4)
        again.expect(1)
        for one in (MovingAverageMinMaxObserver(INT8, averaging_constant=0.1), observer(1), again):
            low, high = (torch.tensor(end) for end in random_ranges(1)[0])
            for step, (new_low, new_high) in enumerate(random_ranges(40)):
                one(torch.tensor([new_low, new_high]))
                if step:
                    low, high = low + 0.1 * (new_low - low), high + 0.1 * (new_high - high)
                assert torch.equal(one.min_val, low) and torch.equal(one.max_val, high)
            assert set(one.state_dict()) == {"min_val", "max_val"}

    def test_producers_in_turn_get_the_union_and_not_the_mean(self) -> None:
        producers = [(-1.0, 2.0), (-40.0, 10.0), (-3.0, 50.0)]
        steps = [(-1.0, 1.0)] * 3 + producers * 200  # a range to come from
        assert kept(show(observer(3), steps)) == pytest.approx((-40.0, 50.0), rel=1e-4)
        low, high = kept(show(observer(1), steps))
        assert low > -20 and high < 35

    def test_the_first_forward_sets_the_range(self) -> None:
        one = observer(3)
        for count, wanted in ((1, (-1.0, 2.0)), (2, (-40.0, 10.0)), (3, (-40.0, 50.0))):
            fresh = show(copy.deepcopy(one), [(-1.0, 2.0), (-40.0, 10.0), (-3.0, 50.0)][:count])
            assert kept(fresh) == wanted

    @pytest.mark.parametrize("uses", [2, 3, 60])
    @pytest.mark.parametrize("constant", [0.01, 0.5, 1.0])
    def test_one_forward_weighs_what_one_tensor_does(self, uses: int, constant: float) -> None:
        # The hull of n tensors is wide as soon as the first is: all n move the range, together as far as c does.
        one = show(observer(uses, constant), [*[(-1.0, 1.0)] * uses, *[(-3.0, 5.0)] * uses])
        assert kept(one) == pytest.approx((-1 - 2 * constant, 1 + 4 * constant), rel=1e-5)

    def test_more_or_fewer_tensors_than_expected(self) -> None:
        one = observer(3, constant=0.5)
        for count in (1, 4, 2, 3, 7, 1, 1) * 5:
            show(one, [(-1.0, 2.0), (-8.0, 1.0), (-2.0, 9.0), (-4.0, 4.0)][: min(count, 4)])
            assert -8.0 <= one.min_val <= -1.0 and 2.0 <= one.max_val <= 9.0
        assert kept(show(one, [(-1.0, 1.0)] * 200)) == pytest.approx((-1.0, 1.0), rel=1e-4)

    @averaging
    def test_every_kind_covers_what_the_widest_tensor_needs(self, kind: type[MovingAverageMinMaxObserver]) -> None:
        one, apart, wide = kind(INT8), kind(INT8), kind(INT8)
        one.steps = apart.steps = wide.steps = 4  # of MSE: a coarse search is enough
        one.expect(3)
        for step, x in enumerate(tensors(60)):
            one(x)
            apart(x)
            if step % 3 == 2:
                wide(x)
        half = 0.5 if kind is PowerOfTwoObserver else 0.98  # a mean of powers of two may be rounded down
        width = (wide.max_val - wide.min_val).item()
        assert (one.max_val - one.min_val).item() > half * width
        assert (apart.max_val - apart.min_val).item() < 0.6 * (one.max_val - one.min_val).item()

    @averaging
    @pytest.mark.parametrize("axis", [None, 1])
    def test_ranges_per_channel_are_those_of_each(
        self, kind: type[MovingAverageMinMaxObserver], axis: int | None
    ) -> None:
        one = kind(QSpec(bits=8, axis=axis))
        one.expect(2)
        for x in tensors(6):
            grid = one(x)
        assert one.recent.shape == ((2, 2) if axis is None else (2, 2, 3))
        for channel in range(0 if axis is None else 3):
            alone = kind(INT8)
            alone.expect(2)
            for x in tensors(6):
                wanted = alone(x[:, channel])
            torch.testing.assert_close(grid.scale[channel], wanted.scale, rtol=1e-6, atol=0.0)

    def test_ends_that_are_known_give_the_same_bits(self) -> None:
        one, other = observer(3), observer(3)
        assert one.by_ends
        for x in tensors(20):
            found, wanted = one.observe_ends(*torch.aminmax(x)), other(x)
            assert torch.equal(found.scale, wanted.scale) and torch.equal(found.zero_point, wanted.zero_point)
        assert all(map(torch.equal, one.buffers(), other.buffers()))

    @pytest.mark.parametrize("place", range(4))
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    def test_a_value_that_is_not_finite_is_not_hidden(self, value: float, place: int) -> None:
        one = observer(3)
        for step in range(place + 1):
            grid = one(torch.tensor([1.0, value if step == place else 2.0]))
        with pytest.raises(NumericsError, match="scales must be positive and finite"):
            grid.check("x")


class TestState:
    def test_there_is_no_host_sync(self) -> None:
        one = observer(3).to("meta")
        for x in tensors(4):
            one(x.to("meta"))
        assert one.recent.is_meta

    def test_buffers_stay_in_place(self) -> None:
        one = observer(3)
        buffers = dict(one.named_buffers())
        assert set(buffers) == {"min_val", "max_val", "recent"}
        for x in tensors():
            one(x)
        assert all(after is buffers[name] for name, after in one.named_buffers())

    @pytest.mark.parametrize("axis", [None, 1])
    @pytest.mark.parametrize("count", [0, 1, 2, 3, 8])
    def test_copies_and_state_dicts_go_on_as_it_would_have(self, count: int, axis: int | None) -> None:
        one = observer(3, axis=axis)
        for x in tensors(count):
            one(x)
        twins = [copy.deepcopy(one), pickle.loads(pickle.dumps(one))]
        spec = QSpec(bits=8, axis=axis)
        saved = FakeQuantize(spec, copy.deepcopy(one)).state_dict()
        loaded = FakeQuantize(spec, observer(3, axis=axis))  # it makes room for channels
        loaded.load_state_dict(saved, strict=True)
        twins.append(loaded.observer)
        for x in tensors(5):
            wanted = one(x * 1.5)
            assert all(torch.equal(twin(x * 1.5).scale, wanted.scale) for twin in twins)

    @pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
    @pytest.mark.parametrize("before, after", [p for p in itertools.product((1, 2, 5), repeat=2) if p[0] != p[1]])
    def test_of_a_state_dict_with_another_window_the_range_is_taken(self, before: int, after: int, used: bool) -> None:
        saved = show(observer(before), [(-7.0, 3.0)] * 9)
        one = show(observer(after), [(-100.0, 100.0)] * (9 if used else 0))
        state = saved.state_dict()
        keys = list(state)
        result = one.load_state_dict(state, strict=True)
        assert not result.missing_keys and not result.unexpected_keys
        assert kept(one) == kept(saved) and list(state) == keys  # what it was given is left alone
        show(one, [(-1.0, 1.0)] * (after - 1))  # with too few to tell, nothing is lost of what was loaded
        assert after == 1 or kept(one) == (-7.0, 3.0)
        assert kept(show(one, [(-1.0, 1.0)] * 800)) == pytest.approx((-1.0, 1.0), rel=1e-4)

    def test_only_the_window_may_be_missing(self) -> None:
        state = observer(3).state_dict()
        with pytest.raises(RuntimeError, match=r"Missing key.*min_val"):
            observer(3).load_state_dict({"recent": state["recent"], "max_val": state["max_val"]})
        with pytest.raises(RuntimeError, match=r"Unexpected key.*recents"):
            observer(3).load_state_dict({**state, "recents": state["recent"]})

    def test_one_that_was_pickled_by_an_older_version(self) -> None:
        old = MovingAverageMinMaxObserver(INT8)
        assert "uses" not in vars(old)
        assert kept(show(pickle.loads(pickle.dumps(old)), [(-1.0, 2.0)])) == (-1.0, 2.0)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
    def test_other_dtypes(self, dtype: torch.dtype) -> None:
        one = show(observer(2).to(dtype), [(-1.0, 2.0), (-4.0, 1.0), (-1.0, 2.0)])
        assert kept(one) == (-4.0, 2.0) and {buffer.dtype for buffer in one.buffers()} == {dtype}


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo, of its own doing
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("uses", [1, 3])
def test_compiled_once(uses: int) -> None:
    torch.compiler.reset()
    one, other = observer(uses), observer(uses)
    compiled = torch.compile(one, backend="eager", fullgraph=True, dynamic=False)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for x in tensors(12):
            assert torch.equal(compiled(x).scale, other(x).scale)
    assert all(map(torch.equal, one.buffers(), other.buffers()))

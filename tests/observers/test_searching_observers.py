"""Observers that look for a clip, against numpy and brute force, on tensors that are kind and on such as are not."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

import qbench
from qbench.errors import ConfigError, NumericsError
from qbench.numerics.qparams import QParams, QSpec
from qbench.observers import (
    OBSERVERS,
    HistogramObserver,
    KLObserver,
    LatestMeanMagnitudeObserver,
    LatestMSEObserver,
    LatestPowerOfTwoObserver,
    LatestQuantileObserver,
    MagnitudeObserver,
    MeanMagnitudeObserver,
    MSEObserver,
    Observer,
    PercentileObserver,
    PowerOfTwoObserver,
    QuantileObserver,
    find_observer,
)

ASYMMETRIC, SYMMETRIC = QSpec(bits=4), QSpec(bits=4, symmetric=True, narrow=True)
UNSIGNED = QSpec(bits=8, signed=False)
specs = pytest.mark.parametrize("spec", [ASYMMETRIC, SYMMETRIC, UNSIGNED], ids=str)


def values(seed: int = 0, *shape: int) -> Tensor:
    return torch.randn(shape or (6, 4, 9), generator=torch.Generator().manual_seed(seed)) * 1.3 + 0.2


def outlier() -> Tensor:
    x = values(1)
    x.view(-1)[17] = 300.0
    return x


HOSTILE: dict[str, Callable[[], Tensor]] = {
    "normal": values,
    "one outlier": outlier,
    "zeros": lambda: torch.zeros(5, 7),
    "constant": lambda: torch.full((5, 7), 2.5),
    "negative constant": lambda: torch.full((5, 7), -0.3),
    "negative only": lambda: -values(2).abs() - 0.1,
    "positive only": lambda: values(3).abs(),
    "one value": lambda: torch.tensor([1.7]),
    "tiny": lambda: values(4) * 1e-20,
    "huge": lambda: values(5) * 1e18,
}
hostile = pytest.mark.parametrize("name", HOSTILE)


def numpy_error(x: Tensor, grid: QParams) -> np.ndarray:
    """Σ (x̂ − x)² per scale, float64."""
    axis = grid.axis
    wide = [-1 if dim == axis else 1 for dim in range(x.ndim)]
    scale, zero = (v.numpy().astype(np.float64) for v in (grid.scale, grid.zero_point))
    if axis is not None:
        scale, zero = scale.reshape(wide), zero.reshape(wide)
    real = x.numpy().astype(np.float64)
    codes = np.clip(np.rint(real / scale) + zero, grid.qmin, grid.qmax)
    others = None if axis is None else tuple(dim for dim in range(x.ndim) if dim != axis)
    return (((codes - zero) * scale - real) ** 2).sum(axis=others)


def grid_of(low: float, high: float, spec: QSpec) -> QParams:
    """The equations of a grid, in numpy."""
    low, high = min(low, 0.0), max(high, 0.0)
    if spec.symmetric:
        scale, zero = max(-low, high) / spec.qmax, 0
    else:
        scale = (high - low) / (spec.qmax - spec.qmin)
        zero = spec.qmin - np.rint(low / scale) if scale else 0
    return QParams(torch.tensor(scale or 1.0), torch.tensor(int(zero), dtype=torch.int32), spec.qmin, spec.qmax)


ACTIVATION = [kinds[0] for kinds in OBSERVERS.values()]
WEIGHT = [kinds[1] for kinds in OBSERVERS.values() if kinds[1] is not None]
PER_CHANNEL = dict.fromkeys([*WEIGHT, *(kind for kind in ACTIVATION if not issubclass(kind, HistogramObserver))])


class TestEveryObserver:
    @hostile
    @specs
    @pytest.mark.parametrize("kind", ACTIVATION, ids=lambda kind: kind.__name__)
    def test_a_usable_grid_of_any_finite_tensor(self, kind: type[Observer], spec: QSpec, name: str) -> None:
        grid = kind(spec)(HOSTILE[name]())
        grid.check(name)
        assert grid.scale.shape == () and grid.scale.dtype == torch.float32 and grid.zero_point.dtype == torch.int32

    @pytest.mark.parametrize("name", ["normal", "one outlier", "zeros", "negative only"])
    @pytest.mark.parametrize("kind", PER_CHANNEL, ids=lambda kind: kind.__name__)
    def test_a_channel_has_the_grid_that_it_would_have_alone(self, kind: type[Observer], name: str) -> None:
        x = torch.stack([HOSTILE[name]().flatten(), *(values(i, HOSTILE[name]().numel()) for i in range(2))])
        for spec in (QSpec(bits=4, axis=0), QSpec(bits=4, symmetric=True, narrow=True, axis=0)):
            together = kind(spec)(x)
            for channel, row in enumerate(x[:2]):
                alone = kind(QSpec(bits=4, symmetric=spec.symmetric, narrow=spec.narrow))(row)
                # A mean over a row may be summed in another order.
                torch.testing.assert_close(together.scale[channel], alone.scale, rtol=1e-6, atol=0.0)
                assert together.zero_point[channel] == alone.zero_point

    @pytest.mark.parametrize("kind", PER_CHANNEL, ids=lambda kind: kind.__name__)
    @pytest.mark.parametrize("axis", [0, 1])
    def test_axes(self, kind: type[Observer], axis: int) -> None:
        x = values()
        grid = kind(QSpec(bits=8, symmetric=True, axis=axis))(x)
        moved = kind(QSpec(bits=8, symmetric=True, axis=0))(x.movedim(axis, 0))
        assert grid.scale.shape == (x.shape[axis],)
        torch.testing.assert_close(grid.scale, moved.scale, rtol=1e-6, atol=0.0)

    @pytest.mark.parametrize("kind", WEIGHT, ids=lambda kind: kind.__name__)
    def test_groups(self, kind: type[Observer]) -> None:
        x = values(0, 5, 12)
        grid = kind(QSpec(bits=4, symmetric=True, narrow=True, axis=0, group_size=4))(x)
        alone = kind(QSpec(bits=4, symmetric=True, narrow=True, axis=0))(x.reshape(15, 4))
        assert grid.scale.shape == (5, 3)
        torch.testing.assert_close(grid.scale.flatten(), alone.scale, rtol=1e-6, atol=0.0)

    @pytest.mark.parametrize("kind", WEIGHT, ids=lambda kind: kind.__name__)
    def test_those_for_weights_keep_nothing(self, kind: type[Observer]) -> None:
        observer = kind(SYMMETRIC)
        first = observer(values())
        observer(outlier())
        assert observer.stateless and not observer.state_dict()
        assert torch.equal(observer(values()).scale, first.scale)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    @pytest.mark.parametrize("kind", ACTIVATION, ids=lambda kind: kind.__name__)
    def test_what_is_not_finite_is_found_or_bounded(self, kind: type[Observer], bad: float) -> None:
        x = values()
        x.view(-1)[3] = bad
        grid = kind(ASYMMETRIC)(x)
        if kind is QuantileObserver and bad == float("inf"):
            return  # an infinite value may lie outside a quantile like any other
        with pytest.raises(NumericsError, match="must be positive and finite"):
            grid.check("here")

    @pytest.mark.parametrize("kind", ACTIVATION, ids=lambda kind: kind.__name__)
    def test_state_goes_round(self, kind: type[Observer]) -> None:
        one, fresh = kind(ASYMMETRIC), kind(ASYMMETRIC)
        for seed in range(3):
            one(values(seed))
        fresh.load_state_dict(one.state_dict())
        twins = [copy.deepcopy(one), pickle.loads(pickle.dumps(one)), fresh]
        wanted = one(values(7))
        for twin in twins:
            found = twin(values(7))
            assert torch.equal(found.scale, wanted.scale) and torch.equal(found.zero_point, wanted.zero_point)

    @pytest.mark.parametrize("kind", ACTIVATION, ids=lambda kind: kind.__name__)
    def test_there_is_no_host_sync(self, kind: type[Observer]) -> None:
        observer = kind(ASYMMETRIC).to("meta")
        observer.steps = 2  # of MSE: a search of thousands of operators without data takes long
        observer(values().to("meta"))  # a value that is read on the host would raise


class TestQuantile:
    @pytest.mark.parametrize("share", [0.9, 0.99, 1.0])
    def test_against_numpy(self, share: float) -> None:
        x = values()
        low, high = QuantileObserver(ASYMMETRIC, quantile=share).range_of(x)
        wanted = np.quantile(x.numpy().astype(np.float64), [1 - share, share])
        np.testing.assert_allclose([low.item(), high.item()], wanted, rtol=1e-4, atol=1e-5)

    def test_per_channel_against_numpy(self) -> None:
        x = values()
        low, high = LatestQuantileObserver(QSpec(bits=4, axis=1)).range_of(x)
        wanted = np.quantile(x.numpy().astype(np.float64), [0.001, 0.999], axis=(0, 2))
        np.testing.assert_allclose(torch.stack([low, high]).numpy(), wanted, rtol=1e-4, atol=1e-5)

    def test_many_values_are_sampled(self) -> None:
        x = values(0, 3, 2**20)
        low, high = QuantileObserver(ASYMMETRIC).range_of(x)
        wanted = np.quantile(x.numpy(), [0.001, 0.999])
        np.testing.assert_allclose([low.item(), high.item()], wanted, rtol=0.02)

    @pytest.mark.parametrize("share", [0.5, 0.0, 1.1, float("nan")])
    def test_refusals(self, share: float) -> None:
        with pytest.raises(ConfigError, match=r"quantile=.*above 0\.5 and up to 1\.0"):
            QuantileObserver(ASYMMETRIC, quantile=share)


class TestMSE:
    @hostile
    @pytest.mark.parametrize("steps", [8, 32])
    def test_symmetric_is_no_worse_than_brute_force(self, name: str, steps: int) -> None:
        x = HOSTILE[name]()
        found = numpy_error(x, MSEObserver(SYMMETRIC, steps=steps)(x))
        largest = float(x.abs().max())
        tried = [grid_of(-largest * f, largest * f, SYMMETRIC) for f in np.arange(1, steps + 1) / steps]
        least = min(float(numpy_error(x, grid)) for grid in tried)
        assert found <= least * (1 + 1e-4) + 1e-12 * float(x.double().square().sum())

    @pytest.mark.parametrize("name", ["normal", "one outlier", "negative only", "positive only", "constant"])
    def test_asymmetric_comes_close_to_brute_force_over_both_ends(self, name: str) -> None:
        x = HOSTILE[name]()
        found = float(numpy_error(x, MSEObserver(ASYMMETRIC)(x)))
        low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
        factors = np.arange(1, 33) / 32
        least = min(float(numpy_error(x, grid_of(low * f, high * g, ASYMMETRIC))) for f in factors for g in factors)
        assert found <= 1.25 * least + 1e-9
        assert found <= float(numpy_error(x, grid_of(low, high, ASYMMETRIC))) * (1 + 1e-5) + 1e-9

    def test_per_channel_is_no_worse_than_brute_force(self) -> None:
        weight = values(3, 5, 40)
        weight[2, 7] = 30.0
        spec = QSpec(bits=3, symmetric=True, narrow=True, axis=0)
        found = numpy_error(weight, LatestMSEObserver(spec)(weight))
        for row, error in zip(weight, found, strict=True):
            largest = float(row.abs().max())
            flat = QSpec(bits=3, symmetric=True, narrow=True)
            tried = [grid_of(-largest * f, largest * f, flat) for f in np.arange(1, 33) / 32]
            assert error <= min(float(numpy_error(row, grid)) for grid in tried) * (1 + 1e-4)

    def test_it_averages_over_tensors(self) -> None:
        observer = MSEObserver(SYMMETRIC, averaging_constant=0.25)
        ranges = [torch.stack(observer.range_of(values(seed))) for seed in (0, 1)]
        observer(values(0))
        wanted = (ranges[0] + 0.25 * (ranges[1] - ranges[0])).abs().max() / 7
        torch.testing.assert_close(observer(values(1)).scale, wanted, rtol=1e-5, atol=0)

    @pytest.mark.parametrize("steps", [1, 0, 2.5])
    def test_refusals(self, steps: object) -> None:
        with pytest.raises(ConfigError, match=r"expected 2 or more, steps=32"):
            MSEObserver(SYMMETRIC, steps=steps)  # type: ignore[arg-type]


class TestPowerOfTwo:
    @hostile
    @specs
    @pytest.mark.parametrize("kind", [PowerOfTwoObserver, LatestPowerOfTwoObserver], ids=lambda kind: kind.__name__)
    def test_the_scale_is_a_power_of_two(self, kind: type[Observer], spec: QSpec, name: str) -> None:
        observer = kind(spec)
        for _ in range(3):
            assert torch.frexp(observer(HOSTILE[name]()).scale).mantissa == 0.5

    @hostile
    def test_the_best_of_five(self, name: str) -> None:
        x = HOSTILE[name]()
        found = numpy_error(x, LatestPowerOfTwoObserver(SYMMETRIC)(x))
        covering = 2.0 ** np.ceil(np.log2(max(float(x.abs().max()), 2.0**-100) / SYMMETRIC.qmax))
        zero = torch.tensor(0, dtype=torch.int32)
        tried = [QParams(torch.tensor(covering * 0.5**j, dtype=torch.float32), zero, -7, 7) for j in range(5)]
        assert found <= min(float(numpy_error(x, grid)) for grid in tried) * (1 + 1e-4) + 1e-30

    def test_a_mean_over_tensors_rounds_to_the_nearest(self) -> None:
        observer = PowerOfTwoObserver(QSpec(bits=8, symmetric=True), averaging_constant=0.9)
        small, large = torch.linspace(-1, 1, 255) * 127, torch.linspace(-1, 1, 255) * 127 * 4
        assert observer(small).scale == 1.0
        assert observer(large).scale == 4.0  # 1 + 0.9·3 = 3.7

    def test_the_quantizer_says_so(self) -> None:
        config = qbench.get_qconfig(observer="power_of_two", weight_observer="power_of_two")
        for quantizer in (config.make_activation(), config.make_weight(axis=0)):
            assert quantizer.spec.power_of_two and not quantizer.scales_with_tensor


class TestMagnitude:
    @pytest.mark.parametrize("positive", [True, False])
    @pytest.mark.parametrize("spec", [QSpec(bits=4), QSpec(bits=4, signed=False), SYMMETRIC], ids=str)
    def test_one_and_two_sided(self, spec: QSpec, positive: bool) -> None:
        x = values().abs() if positive else values()
        grid, mean = MagnitudeObserver(spec)(x), MeanMagnitudeObserver(spec)(x)
        one_sided = positive and not spec.symmetric
        q_p = spec.qmax - spec.qmin if one_sided else 7
        zero = spec.qmin if one_sided else (0 if spec.signed else 8)
        assert grid.zero_point == mean.zero_point == zero
        assert grid.scale.item() == pytest.approx(x.abs().max().item() / q_p, rel=1e-5)
        assert mean.scale.item() == pytest.approx(2 * x.abs().mean().item() / q_p**0.5, rel=1e-5)

    def test_two_sided_for_good(self) -> None:
        observer = MagnitudeObserver(QSpec(bits=8))
        assert observer(values().abs()).zero_point == -128
        assert observer(values()).zero_point == 0
        assert observer(values().abs()).zero_point == 0

    def test_it_is_that_of_everything_seen(self) -> None:
        for kind, reduce in ((MagnitudeObserver, torch.amax), (MeanMagnitudeObserver, torch.mean)):
            apart, together = kind(SYMMETRIC), kind(SYMMETRIC)
            parts = [values(0, 7), values(1, 300) * 5, values(2, 41)]
            for part in parts:
                found = apart(part)
            everything = torch.cat(parts)
            torch.testing.assert_close(found.scale, together(everything).scale, rtol=1e-5, atol=0)
            torch.testing.assert_close(apart.max_val, reduce(everything.abs(), dim=0), rtol=1e-5, atol=0)

    def test_per_channel(self) -> None:
        weight = values(0, 5, 40)
        spec = QSpec(bits=4, symmetric=True, narrow=True, axis=0)
        wanted = 2 * weight.abs().mean(1) / 7**0.5
        torch.testing.assert_close(LatestMeanMagnitudeObserver(spec)(weight).scale, wanted, rtol=1e-5, atol=0)


class Counting(HistogramObserver):
    """The histogram alone."""

    def range_from(self, counts: Tensor, width: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        return low, high


class TestHistogram:
    @pytest.mark.parametrize(
        "factors", [(1.0,), (1.0, 1.0), (1.0, 50.0), (50.0, 1.0), (1e-6, 1.0, 1e6)], ids=str
    )
    def test_counts_are_those_of_numpy_however_the_range_grew(self, factors: tuple[float, ...]) -> None:
        observer, seen = Counting(QSpec(bits=8)), []
        for seed, factor in enumerate(factors):
            seen.append(values(seed) * factor)
            observer(seen[-1])
        x = torch.cat([part.flatten() for part in seen]).numpy().astype(np.float64)
        bins = len(observer.counts)
        edge = 2.0 ** int(observer.exponent)
        assert edge / 2 <= np.abs(x).max() < edge
        wanted = np.bincount(np.floor(x / edge * (bins // 2)).astype(int) + bins // 2, minlength=bins)
        assert int((observer.counts.numpy() != wanted).sum()) == 0
        assert observer.counts.sum() == len(x)

    def test_an_edge_belongs_to_the_bin_that_begins_there(self) -> None:
        observer = Counting(QSpec(bits=8))
        observer(torch.tensor([0.0, 0.5, -0.5, 0.75]))  # 2^e = 1, w = 1/2048
        assert observer.counts.nonzero().flatten().tolist() == [1024, 2048, 3072, 3584]

    @pytest.mark.parametrize("share", [90.0, 99.0, 99.99, 100.0])
    @pytest.mark.parametrize("name", ["normal", "one outlier", "negative only", "positive only", "zeros", "constant"])
    def test_percentiles_are_within_a_bin_of_numpys(self, share: float, name: str) -> None:
        observer, x = PercentileObserver(ASYMMETRIC, percentile=share), HOSTILE[name]()
        low, high = observer.update(x)
        width = 2.0 ** int(observer.exponent) / (len(observer.counts) // 2)
        inside = np.sort(x.numpy().flatten())
        left_out = int(np.floor(len(inside) * (1 - share / 100)))  # at each end
        assert low.item() == pytest.approx(inside[left_out], abs=1.01 * width)
        assert high.item() == pytest.approx(inside[len(inside) - 1 - left_out], abs=1.01 * width)

    def test_it_remembers_everything(self) -> None:
        apart, together = PercentileObserver(ASYMMETRIC), PercentileObserver(ASYMMETRIC)
        parts = [values(seed) * (1 + seed) for seed in range(4)]
        for part in parts:
            found = apart(part)
        assert torch.equal(found.scale, together(torch.stack(parts)).scale)

    @pytest.mark.parametrize("kind", [PercentileObserver, KLObserver], ids=lambda kind: kind.__name__)
    def test_per_channel_is_refused(self, kind: type[Observer]) -> None:
        with pytest.raises(ConfigError, match=r"a histogram is per tensor; MSEObserver"):
            kind(QSpec(bits=8, axis=0))

    @pytest.mark.parametrize("share", [50.0, 101.0])
    def test_refusals(self, share: float) -> None:
        with pytest.raises(ConfigError, match=r"percentile=.*above 50\.0 and up to 100\.0"):
            PercentileObserver(ASYMMETRIC, percentile=share)


def brute_force_kl(sizes: np.ndarray, levels: int) -> int:
    """The rule as it is told, with loops: how many bins lie below the best threshold."""
    used = int(np.flatnonzero(sizes)[-1]) + 1 if sizes.any() else 0
    best, least = used, np.inf
    for end in range(8, len(sizes) + 1, 8):
        if end < levels or end >= used + 8:
            continue
        p = sizes[:end].astype(np.float64)
        q = np.zeros(end)
        for level in range(levels):
            members = [i for i in range(end) if i * levels // end == level]
            live = [i for i in members if sizes[i]]
            for i in live:
                q[i] = sizes[members].sum() / len(live)
        p[-1] += sizes[end:].sum()
        p, q = p / p.sum(), np.maximum(q / max(q.sum(), 1.0), 2.0**-24)
        divergence = sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a)
        if divergence < least:
            best, least = end, divergence
    return best


class TestKL:
    @pytest.mark.parametrize("levels", [4, 16])
    @pytest.mark.parametrize("kind", ["normal", "outlier", "uniform", "gaps", "empty", "one bin"])
    def test_the_threshold_is_that_of_brute_force(self, kind: str, levels: int) -> None:
        from qbench.observers.kl import best_threshold

        random = np.random.default_rng(5)
        x = np.abs(random.normal(size=3000)) * 16
        x = {"uniform": np.linspace(0, 127.9, 3000), "outlier": np.append(x, 126.0)}.get(kind, x)
        sizes = np.histogram(x, bins=128, range=(0, 128))[0]
        if kind == "gaps":
            sizes[::3] = 0
        if kind in ("empty", "one bin"):
            sizes[:] = 0
            sizes[40] = 9 * (kind == "one bin")
        found = best_threshold(torch.from_numpy(sizes).double(), torch.tensor(levels))
        assert int(found) == brute_force_kl(sizes, levels)

    def test_an_outlier_is_cut_off(self) -> None:
        x = torch.cat([values(0, 20_000), torch.tensor([60.0])])
        low, high = KLObserver(QSpec(bits=8)).update(x)
        assert 2.0 < high.item() < 30.0 and -30.0 < low.item() < -2.0
        assert low.item() >= x.min().item()

    def test_a_tensor_without_negative_values_has_all_codes_above_zero(self) -> None:
        grid = KLObserver(QSpec(bits=8))(values(0, 20_000).abs())
        assert grid.zero_point == -128


class TestNames:
    @pytest.mark.parametrize("name", OBSERVERS)
    def test_each_is_found(self, name: str) -> None:
        activation, weight = OBSERVERS[name]
        assert find_observer(name, "activation") is activation and not activation.stateless
        if weight is not None:
            assert find_observer(name, "weight") is weight and weight.stateless
        assert find_observer(activation, "weight") is activation  # a class is the user's own choice

    @pytest.mark.parametrize("role", ["activation", "weight"])
    def test_an_unknown_name_lists_those_that_work(self, role: str) -> None:
        with pytest.raises(ConfigError, match=rf"no observer of {role}s is called 'mode'.*min_max, .*mse") as error:
            find_observer("mode", role)
        assert ("kl" in str(error.value)) == (role == "activation")

    def test_a_histogram_of_weights_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="no observer of weights is called 'kl'"):
            qbench.get_qconfig(weight_observer="kl")

"""Gradients of every quantizer against the closed form of its paper, written here in numpy and float64.

The rounding residual is held constant in all of them: that is what the straight-through estimator means.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import qbench
from qbench.fake_quantize import DSQ, LSQ, PACT, TQT, DoReFaActivation, DoReFaWeight, FakeQuantize, LSQPlus
from qbench.fake_quantize.learned import positive
from qbench.numerics.qparams import QSpec, dequantize, quantize
from qbench.observers import LatestMinMaxObserver, MagnitudeObserver, MovingAverageMinMaxObserver, Observer

SPECS = {
    "int8": QSpec(bits=8),
    "uint4": QSpec(bits=4, signed=False),
    "int4 symmetric": QSpec(bits=4, symmetric=True, narrow=True),
    "int3 per channel": QSpec(bits=3, symmetric=True, narrow=True, axis=1),
}
specs = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
per_tensor = pytest.mark.parametrize("spec", list(SPECS.values())[:3], ids=list(SPECS)[:3])
SHAPE = (5, 3, 40)


def data(seed: int = 0, positive_only: bool = False) -> Tensor:
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)) * 1.7 + 0.3
    return x.abs() if positive_only else x


def made(kind: type[FakeQuantize], spec: QSpec, observer: type[Observer] = MagnitudeObserver) -> FakeQuantize:
    """A quantizer that has seen data and clips some of it."""
    quantizer = kind(spec, observer(spec))
    quantizer.fit_to(data())
    quantizer.train()
    quantizer(data() * 0.4)
    quantizer.observer_enabled = False
    return quantizer


def backward(quantizer: FakeQuantize, x: Tensor) -> tuple[Tensor, dict[str, np.ndarray], np.ndarray]:
    """Gradients by autograd: to x, to each parameter; and the cotangent."""
    x = x.clone().requires_grad_()
    quantizer.zero_grad()
    out = quantizer(x)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    out.backward(weights)
    found = {name: parameter.grad.double().numpy() for name, parameter in quantizer.named_parameters()}
    return x.grad, found, weights.double().numpy()


def wide(values: Tensor, spec: QSpec) -> np.ndarray:
    shape = [-1 if dim == spec.axis else 1 for dim in range(3)]
    found = values.detach().double().numpy()
    return found if spec.axis is None else found.reshape(shape)


def summed(values: np.ndarray, spec: QSpec) -> np.ndarray:
    return values.sum(axis=None if spec.axis is None else tuple(dim for dim in range(3) if dim != spec.axis))


class Position:
    """Where values lie on a grid, in numpy."""

    def __init__(self, quantizer: FakeQuantize, x: Tensor) -> None:
        spec = quantizer.spec
        self.scale, self.zero = wide(quantizer.scale, spec), wide(quantizer.zero_point, spec)
        self.p = x.double().numpy() / self.scale
        self.code = np.rint(self.p)
        self.low, self.high = spec.qmin - self.zero, spec.qmax - self.zero
        self.inside = (self.code >= self.low) & (self.code <= self.high)
        self.bound = np.clip(self.code, self.low, self.high)


def close(found: np.ndarray | Tensor, wanted: np.ndarray, tolerance: float = 1e-4) -> None:
    found = found.double().numpy() if isinstance(found, Tensor) else found
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, rtol=tolerance, atol=tolerance * max(1e-3, np.abs(wanted).max()))


def some_of_each(at: Position) -> None:
    assert 0.02 < 1 - at.inside.mean() < 0.9


@specs
@pytest.mark.parametrize("kind", [LSQ, TQT, DSQ], ids=lambda kind: kind.__name__)
def test_values_are_those_of_the_codes(kind: type[FakeQuantize], spec: QSpec) -> None:
    quantizer, x = made(kind, spec), data(1)
    grid = quantizer.snapshot()
    out = quantizer(x)
    assert int((out != dequantize(quantize(x, grid), grid)).sum()) == 0


@pytest.mark.parametrize("kind", [LSQPlus, PACT, DoReFaActivation], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("positive_only", [True, False])
def test_values_of_those_for_activations_are_those_of_the_codes(kind: type[FakeQuantize], positive_only: bool) -> None:
    for spec in (SPECS["int8"], SPECS["uint4"]):
        quantizer = kind(spec, MagnitudeObserver(spec)).train()
        quantizer(data(0, positive_only) * 0.5)
        quantizer.eval()
        grid, x = quantizer.deployed_qparams(), data(1, positive_only)
        assert int((quantizer(x) != dequantize(quantize(x, grid), grid)).sum()) == 0


class TestLSQ:
    @specs
    def test_equation_3_times_the_gradient_scale(self, spec: QSpec) -> None:
        quantizer, x = made(LSQ, spec), data(1)
        at = Position(quantizer, x)
        some_of_each(at)
        to_x, found, weights = backward(quantizer, x)
        close(to_x, np.where(at.inside, weights, 0.0))
        slope = np.where(at.inside, at.code - at.p, at.bound)
        sharing = x[0].numel()
        q_p = np.asarray(at.high, dtype=np.float64).reshape(found["change"].shape)
        close(found["change"], summed(slope * weights, spec) / np.sqrt(sharing * q_p))

    @pytest.mark.parametrize("axis", [None, 0])
    def test_the_start_and_n_of_a_weight(self, axis: int | None) -> None:
        weight = data(2)
        config = qbench.get_qconfig(method="lsq", weight_bits=4)
        if axis is None:
            spec = QSpec(bits=4, symmetric=True, narrow=True)
            config = qbench.QConfig(weight=qbench.QuantizerConfig(spec, config.weight.observer, LSQ))
        quantizer = config.make_weight(axis=0, weight=weight).train()
        grid = quantizer.qparams_of(weight)
        sizes = weight.abs() if axis is None else weight.abs().flatten(1)
        torch.testing.assert_close(grid.scale, 2 * sizes.mean(axis and -1 if axis is None else 1) / math.sqrt(7))
        assert quantizer.sharing.item() == (weight.numel() if axis is None else weight[0].numel())

    @pytest.mark.parametrize("positive_only", [True, False])
    def test_the_start_of_an_activation(self, positive_only: bool) -> None:
        x = data(3, positive_only)
        quantizer = qbench.get_qconfig(method="lsq", activation_bits=4).make_activation().train()
        quantizer(x)
        q_p = 15 if positive_only else 7
        assert quantizer.scale.item() == pytest.approx(2 * x.abs().mean().item() / math.sqrt(q_p), rel=1e-5)
        assert quantizer.zero_point.item() == (-8 if positive_only else 0)

    def test_each_use_in_a_step_has_its_own_n(self) -> None:
        quantizer, x = made(LSQ, SPECS["int8"]), data(1)
        alone = [backward(quantizer, part)[1]["change"] for part in (x, x[:, :, :10])]
        quantizer.zero_grad()
        first, second = quantizer(x), quantizer(x[:, :, :10])
        seed = [torch.randn(y.shape, generator=torch.Generator().manual_seed(3)) for y in (first, second)]
        ((first * seed[0]).sum() + (second * seed[1]).sum()).backward()
        close(quantizer.change.grad, alone[0] + alone[1])


class TestScaleInParts:
    """What functions get that hand the gradient to `δ` themselves: `v₀` and `δ`, from the first gradient on."""

    def made(self, axis: int | None = None) -> Any:
        quantizer: Any = made(LSQ, QSpec(symmetric=axis is not None, axis=axis))
        quantizer.fit_to(data())
        quantizer(data())
        return quantizer

    @pytest.mark.parametrize("axis", [None, 0])
    def test_it_is_the_scale_and_has_its_gradient(self, axis: int | None) -> None:
        quantizer = self.made(axis)
        quantizer(data()).sum().backward()
        with torch.no_grad():  # some lie beyond 0: reflected
            share = torch.linspace(1.5, 0.2, quantizer.change.numel()).view_as(quantizer.start)
            quantizer.change.sub_(share * quantizer.start)
        scale = quantizer.learned_scale()
        assert scale.learned is quantizer.change and scale.beside is quantizer.start
        value, slope = scale.resolved()
        assert torch.equal(value, quantizer.scale) and bool((value > 0).all())
        quantizer.zero_grad()
        weights = torch.linspace(-1.0, 2.0, value.numel()).view_as(value)
        (quantizer.scale_in_use() * weights).sum().backward()
        assert torch.equal(quantizer.change.grad, weights * slope) and bool((slope != 0).all())

    def test_before_a_gradient_has_come_it_is_one_that_tells_of_it(self) -> None:
        quantizer = self.made()
        scale = quantizer.learned_scale()
        assert scale.beside is None and scale.learned.grad_fn is not None and scale.resolved()[1] is None
        assert not quantizer.learning
        scale.learned.backward()
        assert quantizer.learning and quantizer.learned_scale().beside is quantizer.start
        quantizer.change.data.add_(0.25)  # no version tells of this
        assert torch.equal(quantizer.learned_scale().resolved()[0], quantizer.scale)

    def test_what_has_another_grid_hands_over_its_own_scale(self) -> None:
        class Halved(LSQ):
            def scale_of(self, value: Tensor) -> Tensor:
                return super().scale_of(value) / 2

        for kind in (Halved, LSQPlus):
            quantizer: Any = made(kind, SPECS["uint4"], MovingAverageMinMaxObserver)
            quantizer(data()).sum().backward()
            grid = quantizer.learned_grid((2, 3, 4))
            assert quantizer.learning and grid.scale.beside is None and torch.equal(grid.scale.learned, quantizer.scale)
            assert torch.equal(grid.place, quantizer.zero_point) and (grid.zero_point is None) == (kind is Halved)

    def test_a_grid_has_the_size_of_its_activation(self) -> None:
        quantizer = self.made()
        quantizer(data()).sum().backward()
        for shape in ((8, 3, 5), (2, 7)):
            factor = quantizer.learned_grid(shape).scale.factor
            assert quantizer.sharing.item() == math.prod(shape[1:]) and factor == quantizer.gradient_scale().item()


class TestLSQPlus:
    @pytest.mark.parametrize("spec", [SPECS["int8"], SPECS["uint4"]], ids=str)
    @pytest.mark.parametrize("shift", [0.0, 0.0171, -0.4])
    def test_scale_and_offset(self, spec: QSpec, shift: float) -> None:
        quantizer, x = made(LSQPlus, spec, MovingAverageMinMaxObserver), data(1)
        with torch.no_grad():
            quantizer.offset_change.add_(shift)
        at = Position(quantizer, x)
        some_of_each(at)
        to_x, found, weights = backward(quantizer, x)
        close(to_x, np.where(at.inside, weights, 0.0))
        offset = float((quantizer.offset_start.double() + quantizer.offset_change.double()).detach())
        residual = at.zero + offset / at.scale
        assert shift == 0 or abs(residual) > 1e-3
        slope = np.where(at.inside, at.code - at.p, np.where(at.code < at.low, spec.qmin, spec.qmax) - residual)
        g = 1 / np.sqrt(x[0].numel() * (spec.qmax - int(quantizer.start_zero_point)))
        close(found["change"], (slope * weights).sum() * g)
        close(found["offset_change"], np.where(at.inside, 0.0, weights).sum() * g)

    def test_the_zero_point_follows_the_offset_and_stays_inside_the_codes(self) -> None:
        quantizer = made(LSQPlus, SPECS["int8"], MovingAverageMinMaxObserver)
        scale = quantizer.scale.item()
        for offset in (-1e4, -3.3 * scale, 0.0, 7.6 * scale, 1e4):
            quantizer.offset_start.fill_(offset)
            assert int(quantizer.zero_point) == int(np.clip(np.rint(-np.float64(offset) / scale), -128, 127))
            quantizer.deployed_qparams()

    def test_an_offset_beyond_the_codes_can_come_back(self) -> None:
        quantizer = made(LSQPlus, SPECS["int8"], MovingAverageMinMaxObserver)
        quantizer.offset_start.fill_(1e4)
        quantizer(data()).sum().backward()
        assert quantizer.offset_change.grad != 0


class TestPACT:
    @per_tensor
    @pytest.mark.parametrize("positive_only", [True, False])
    def test_equation_3(self, spec: QSpec, positive_only: bool) -> None:
        quantizer = PACT(spec, MagnitudeObserver(spec), decay=0.0).train()
        quantizer(data(0, positive_only) * 0.4)
        quantizer.observer_enabled = False
        x = data(1, positive_only)
        alpha = float(quantizer.start)  # as nothing is learned yet
        one_sided = positive_only and not spec.symmetric
        levels = spec.qmax - spec.qmin if one_sided else spec.qmax - int(quantizer.zero_point)
        assert quantizer.scale.item() == pytest.approx(alpha / levels, rel=1e-6)
        below = 0.0 if one_sided else alpha * (int(quantizer.zero_point) - spec.qmin) / levels
        values = x.double().numpy()
        to_x, found, weights = backward(quantizer, x)
        inside = (values <= alpha) & (values >= -below)
        assert 0.02 < (values > alpha).mean() < 0.5
        close(to_x, np.where(inside, weights, 0.0))
        slope = np.where(values > alpha, 1.0, np.where(inside, 0.0, -below / alpha))
        close(found["change"], (slope * weights).sum())

    def test_the_regularizer(self) -> None:
        spec = SPECS["int8"]
        found = []
        for decay in (0.0, 0.01):
            quantizer = PACT(spec, MagnitudeObserver(spec), decay=decay).train()
            quantizer(data() * 0.4)
            found.append(backward(quantizer, data(1))[1]["change"])
            alpha = float(quantizer.value().detach())
        close(found[1] - found[0], np.asarray(0.01 * alpha), 1e-3)

    @pytest.mark.parametrize("decay", [-1e-4, float("nan")])
    def test_refusals(self, decay: float) -> None:
        with pytest.raises(qbench.errors.ConfigError, match=r"PACT\(decay=.*expected 0 or more"):
            PACT(SPECS["int8"], MagnitudeObserver(SPECS["int8"]), decay=decay)


class TestTQT:
    @specs
    def test_equations_7_and_8(self, spec: QSpec) -> None:
        quantizer, x = made(TQT, spec), data(1)
        mantissa = torch.frexp(quantizer.scale).mantissa
        assert bool((mantissa == 0.5).all())
        at = Position(quantizer, x)
        some_of_each(at)
        to_x, found, weights = backward(quantizer, x)
        close(to_x, np.where(at.inside, weights, 0.0))
        slope = at.scale * math.log(2) * np.where(at.inside, at.code - at.p, at.bound)
        close(found["change"], summed(slope * weights, spec))

    @pytest.mark.parametrize("threshold", [0.9, 1.0, 1.1, 3.99, 4.0])
    def test_the_scale_is_that_of_the_threshold_rounded_up(self, threshold: float) -> None:
        spec = QSpec(bits=8, symmetric=True)
        quantizer = TQT(spec, MagnitudeObserver(spec)).train()
        # Of max|x| = t·127/128 the start is log2(t/128).
        quantizer(torch.tensor([threshold * 127 / 128]))
        assert quantizer.scale.item() == 2.0 ** math.ceil(math.log2(threshold)) / 128

    @pytest.mark.parametrize("exponent", [-500.0, 500.0])
    def test_exponents_stay_in_float32(self, exponent: float) -> None:
        quantizer = made(TQT, SPECS["int8"])
        with torch.no_grad():
            quantizer.change.fill_(exponent)
        quantizer.deployed_qparams()
        assert torch.isfinite(quantizer(data())).all()


class TestDSQ:
    def soft_slopes(self, at: Position, alpha: float) -> tuple[np.ndarray, np.ndarray]:
        """D = dx̂/dx inside a step, and ∂φ/∂α."""
        u = at.p - np.floor(at.p) - 0.5
        kappa = math.log(2 / alpha - 1)
        tanh = np.tanh(kappa * u)
        by_alpha = tanh / (1 - alpha) ** 2 - (1 - tanh**2) * u * 2 / (alpha * (2 - alpha)) / (1 - alpha)
        return 0.5 * kappa / (1 - alpha) * (1 - tanh**2), by_alpha

    @specs
    @pytest.mark.parametrize("softness", [-2.0, 0.0, 1.5])
    def test_closed_form(self, spec: QSpec, softness: float) -> None:
        quantizer, x = made(DSQ, spec), data(1)
        with torch.no_grad():
            quantizer.softness.fill_(softness)
        sigmoid = 1 / (1 + math.exp(-softness))
        alpha = 0.5 * sigmoid
        assert quantizer.alpha.item() == pytest.approx(alpha, rel=1e-6)
        at = Position(quantizer, x)
        some_of_each(at)
        to_x, found, weights = backward(quantizer, x)
        slope, by_alpha = self.soft_slopes(at, alpha)
        close(to_x, np.where(at.inside, weights * slope, 0.0), 1e-3)
        by_scale = np.where(at.inside, at.code - at.p * slope, at.bound)
        close(found["change"], summed(by_scale * weights, spec) / (spec.qmax - spec.qmin), 1e-3)
        by_softness = np.where(at.inside, at.scale * 0.5 * by_alpha, 0.0) * alpha * (1 - sigmoid)
        close(found["softness"], (by_softness * weights).sum(), 1e-3)

    def test_the_mean_slope_of_a_step_is_one(self) -> None:
        quantizer = made(DSQ, SPECS["int8"])
        x = (torch.linspace(2, 3, 20_001)[:-1] * quantizer.scale).requires_grad_()
        quantizer(x).sum().backward()
        assert x.grad.mean().item() == pytest.approx(1.0, abs=1e-3)
        assert x.grad[10_000] > 1.3 > 0.5 > x.grad[0]  # steep half-way, flat on the grid

    def test_alpha_starts_at_a_fifth(self) -> None:
        assert made(DSQ, SPECS["int8"]).alpha.item() == pytest.approx(0.2)


class TestDoReFa:
    @pytest.mark.parametrize("axis", [None, 0])
    def test_tanh_and_its_largest(self, axis: int | None) -> None:
        spec = QSpec(bits=4, symmetric=True, narrow=True, axis=axis)
        quantizer = DoReFaWeight(spec, LatestMinMaxObserver(spec))
        weight = data(4)
        leaf = weight.clone().requires_grad_()
        shaped = quantizer.shaped(leaf)
        out = quantizer(shaped)
        t = np.tanh(weight.double().numpy())
        over = None if axis is None else (1, 2)
        largest = np.abs(t).max(axis=over, keepdims=True)
        close(shaped.detach(), t / largest)
        codes = np.rint(t / largest * 7)
        close(out.detach(), codes / 7)
        upstream = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
        out.backward(upstream)
        g = upstream.double().numpy()
        top = np.abs(t) == largest
        through_largest = np.where(top, np.sign(t) * (g * t).sum(axis=over, keepdims=True) / largest**2, 0.0)
        close(leaf.grad, (g / largest - through_largest) * (1 - t**2))

    def test_weights_of_zero(self) -> None:
        spec = QSpec(bits=4, symmetric=True, narrow=True, axis=0)
        leaf = torch.zeros(SHAPE, requires_grad=True)
        out = DoReFaWeight(spec, LatestMinMaxObserver(spec)).shaped(leaf)
        out.sum().backward()
        assert not out.any() and torch.isfinite(leaf.grad).all()

    @per_tensor
    @pytest.mark.parametrize("positive_only", [True, False])
    def test_activations_are_clipped_to_one(self, spec: QSpec, positive_only: bool) -> None:
        quantizer, x = DoReFaActivation(spec, MagnitudeObserver(spec)).train(), data(1, positive_only)
        out = quantizer(x)
        assert int(quantizer.zero_point) == spec.qmin or not (positive_only and not spec.symmetric)
        levels = spec.qmax - int(quantizer.zero_point)
        assert quantizer.scale.item() == pytest.approx(1 / levels)
        assert out.max().item() == pytest.approx(1.0)
        low = (spec.qmin - int(quantizer.zero_point)) / levels
        values = x.double().numpy()
        to_x, _, weights = backward(quantizer, x)
        close(to_x, np.where((values <= 1) & (values >= low), weights, 0.0))


class TestPositive:
    @pytest.mark.parametrize("value", [0.3, -0.3, 0.0, -0.0, 1e-38, -1e-38])
    def test_scales_are_positive_and_have_a_gradient(self, value: float) -> None:
        leaf = torch.tensor(value, requires_grad=True)
        scale = positive(leaf)
        scale.backward()
        assert scale > 0 and torch.isfinite(1 / scale)
        assert leaf.grad == (-1 if value < 0 else 1)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_what_is_broken_stays_so(self, value: float) -> None:
        quantizer = made(LSQ, SPECS["int8"])
        with torch.no_grad():
            quantizer.change.fill_(value)
        with pytest.raises(qbench.errors.NumericsError, match="must be positive and finite"):
            quantizer.deployed_qparams()

    @pytest.mark.parametrize("kind", [LSQ, LSQPlus, PACT, TQT, DSQ], ids=lambda kind: kind.__name__)
    def test_a_learning_rate_that_is_far_too_large_never_gives_nan(self, kind: type[FakeQuantize]) -> None:
        quantizer = made(kind, SPECS["int8"])
        optimizer = torch.optim.Adam(quantizer.parameters(), lr=5.0)  # steps of 5, whatever the gradient
        for step in range(40):
            optimizer.zero_grad()
            x = data(step)
            loss = (quantizer(x) - x).square().mean()
            loss.backward()
            optimizer.step()
            assert torch.isfinite(loss)
            quantizer.deployed_qparams()

    @pytest.mark.parametrize("factor", [-0.5, -1.0, -1.5, -3.0])
    @pytest.mark.parametrize("kind", [LSQ, LSQPlus, PACT, DSQ], ids=lambda kind: kind.__name__)
    def test_what_was_pushed_to_zero_and_beyond(self, kind: type[FakeQuantize], factor: float) -> None:
        quantizer = made(kind, SPECS["int8"])
        before = float(quantizer.scale)
        with torch.no_grad():
            quantizer.change.copy_(quantizer.start * factor)
        assert float(quantizer.scale) == pytest.approx(abs(1 + factor) * before, rel=1e-5, abs=2.0**-99)
        out = quantizer(data())
        out.square().sum().backward()
        quantizer.deployed_qparams()
        assert torch.isfinite(out).all() and all(torch.isfinite(p.grad).all() for p in quantizer.parameters())

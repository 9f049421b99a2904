"""The quantizer: what trains is what is stored, and what is stored is what converts."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor

import qbench
from qbench.errors import NumericsError, QBenchWarning
from qbench.fake_quantize import FakeQuantize
from qbench.numerics import qparams as floor
from qbench.observers import LatestMinMaxObserver, MinMaxObserver, MovingAverageMinMaxObserver, Observer

SPECS = [
    qbench.QSpec(bits=8),
    qbench.QSpec(bits=4),
    qbench.QSpec(bits=8, signed=False),
    qbench.QSpec(bits=8, symmetric=True, narrow=True),
    qbench.QSpec(bits=8, signed=False, symmetric=True),
    qbench.QSpec(bits=8, power_of_two=True),
    qbench.QSpec(bits=8, axis=1),
    qbench.QSpec(bits=3, axis=0, symmetric=True),
]
specs = pytest.mark.parametrize("spec", SPECS, ids=str)


def make(spec: qbench.QSpec, observer: type[Observer] = MovingAverageMinMaxObserver) -> FakeQuantize:
    return FakeQuantize(spec, observer(spec)).train()


def batch(seed: int = 0, spread: float = 1.0) -> Tensor:
    return torch.randn(4, 3, 50, generator=torch.Generator().manual_seed(seed)) * spread + 0.4


def torchs(x: Tensor, quantizer: FakeQuantize) -> Tensor:
    """torch's own operator on the stored grid."""
    spec = quantizer.spec
    if spec.axis is None:
        scale, zero_point = quantizer.scale.item(), int(quantizer.zero_point)
        return torch.fake_quantize_per_tensor_affine(x, scale, zero_point, spec.qmin, spec.qmax)
    return torch.fake_quantize_per_channel_affine(
        x, quantizer.scale, quantizer.zero_point, spec.axis, spec.qmin, spec.qmax
    )


class TestOneDefinition:
    @specs
    @pytest.mark.parametrize("observer", [MinMaxObserver, MovingAverageMinMaxObserver])
    def test_training_output_is_on_the_grid_that_is_stored(self, spec: qbench.QSpec, observer: type[Observer]) -> None:
        quantizer = make(spec, observer)
        for step in range(4):
            x = batch(step, spread=1 + step)
            out = quantizer(x)
            # the range includes this batch: eval on the same batch, and what is deployed, are the same values
            assert torch.equal(out, torchs(x, quantizer))
            assert torch.equal(out, quantizer.eval()(x))
            deployed = quantizer.deployed_qparams()
            codes = floor.quantize(x, deployed)
            assert torch.equal(floor.dequantize(codes, deployed), out)
            assert codes.min() >= spec.qmin and codes.max() <= spec.qmax
            quantizer.train()

    @specs
    def test_a_stateless_one_quantizes_by_the_tensor_at_hand(self, spec: qbench.QSpec) -> None:
        quantizer = make(spec, LatestMinMaxObserver)
        for x in (batch(0), batch(1, spread=9.0)):
            grid = quantizer.qparams_of(x)
            assert torch.equal(quantizer(x), floor.dequantize(floor.quantize(x, grid), grid))
            assert torch.equal(quantizer.train()(x), quantizer.eval()(x))
        assert not hasattr(quantizer, "scale") and quantizer.seen_data

    def test_range_includes_the_first_batch(self) -> None:
        quantizer = make(qbench.QSpec(bits=8))
        x = batch()
        quantizer(x)
        assert quantizer.scale.item() == pytest.approx((x.max() - x.min()).item() / 255, rel=1e-6)
        assert (quantizer(x) - x).abs().max() <= 0.51 * quantizer.scale.item()  # nothing is clipped

    @specs
    def test_gradient_is_one_inside_and_zero_where_clipped(self, spec: qbench.QSpec) -> None:
        quantizer = make(spec)
        quantizer(batch())
        quantizer.eval()
        x = batch(1, spread=3.0).requires_grad_()
        out = quantizer(x)
        gradient = torch.randn_like(out)
        out.backward(gradient)
        scale, zero = quantizer.scale.double(), quantizer.zero_point.double()
        if spec.axis is not None:
            wide = [-1 if dim == spec.axis else 1 for dim in range(3)]
            scale, zero = scale.reshape(wide), zero.reshape(wide)
        code = torch.round(x.detach().double() / scale) + zero
        inside = (code >= spec.qmin) & (code <= spec.qmax)
        assert 0.1 < inside.float().mean() < 1.0
        assert torch.equal(x.grad, torch.where(inside, gradient, 0.0))


class TestScalesWithTensor:
    """Whether the codes of k·W are those of W times the sign of k: only then may they be taken from W."""

    CASES = (
        (qbench.QSpec(bits=8, symmetric=True, narrow=True, axis=0), LatestMinMaxObserver, True),
        (qbench.QSpec(bits=8, symmetric=True, axis=0), LatestMinMaxObserver, True),
        (qbench.QSpec(bits=8, symmetric=True), LatestMinMaxObserver, False),
        (qbench.QSpec(bits=8, axis=0), LatestMinMaxObserver, False),
        (qbench.QSpec(bits=8, symmetric=True, axis=0, power_of_two=True), LatestMinMaxObserver, False),
        (qbench.QSpec(bits=8, signed=False, symmetric=True, axis=0), LatestMinMaxObserver, False),
        (qbench.QSpec(bits=8, symmetric=True, axis=0), MinMaxObserver, False),
    )

    @pytest.mark.parametrize(("spec", "observer", "wanted"), CASES, ids=lambda value: str(value))
    def test_table(self, spec: qbench.QSpec, observer: type[Observer], wanted: bool) -> None:
        assert make(spec, observer).scales_with_tensor is wanted

    def test_where_true_the_codes_of_both_signs_mirror(self) -> None:
        quantizer = make(self.CASES[0][0], LatestMinMaxObserver)
        weight = torch.randn(8, 20)
        for factor in (2.0, 0.25, -1.0, -8.0):  # exact multiples: no rounding of the product
            codes = floor.quantize(weight * factor, quantizer.qparams_of(weight * factor))
            mirrored = floor.quantize(weight, quantizer.qparams_of(weight)) * int(np.sign(factor))
            assert torch.equal(codes, mirrored)


class TestSwitches:
    def test_disable_observer_holds_the_range(self) -> None:
        quantizer = make(qbench.QSpec(bits=8))
        quantizer(batch())
        before = quantizer.scale.clone()
        quantizer.apply(qbench.disable_observer)
        quantizer(batch(1, spread=20.0))
        assert torch.equal(before, quantizer.scale)
        quantizer.train()
        quantizer(batch(1, spread=20.0))  # train() is not enable_observer
        assert torch.equal(before, quantizer.scale)
        quantizer.apply(qbench.enable_observer)
        quantizer(batch(1, spread=20.0))
        assert not torch.equal(before, quantizer.scale)

    def test_disable_fake_quant_passes_on_and_still_observes(self) -> None:
        quantizer = make(qbench.QSpec(bits=8))
        quantizer.apply(qbench.disable_fake_quant)
        x = batch()
        assert quantizer(x) is x
        assert quantizer.seen_data and not quantizer.active
        assert quantizer.scale.item() == pytest.approx((x.max() - x.min()).item() / 255, rel=1e-6)
        quantizer.apply(qbench.enable_fake_quant)
        assert quantizer.active
        assert torch.equal(quantizer(x), torchs(x, quantizer))

    def test_eval_never_observes(self) -> None:
        quantizer = make(qbench.QSpec(bits=8))
        quantizer(batch())
        before = quantizer.scale.clone()
        quantizer.eval()(batch(1, spread=50.0))
        assert torch.equal(before, quantizer.scale)

    def test_they_leave_other_modules_alone(self) -> None:
        model = torch.nn.Sequential(make(qbench.QSpec(bits=8)), torch.nn.Dropout(), torch.nn.BatchNorm1d(3))
        states = [dict(vars(module)) for module in (model[1], model[2])]
        for switch in (qbench.disable_observer, qbench.disable_fake_quant, qbench.freeze_bn_stats):
            model.apply(switch)
        assert [dict(vars(module)) for module in (model[1], model[2])] == states
        assert not model[0].observer_enabled and not model[0].fake_quant_enabled
        for switch in (qbench.enable_observer, qbench.enable_fake_quant, qbench.update_bn_stats):
            model.apply(switch)
        assert model[0].observer_enabled and model[0].fake_quant_enabled

    def test_a_weight_quantizer_in_float(self) -> None:
        quantizer = make(qbench.QSpec(bits=8, symmetric=True, axis=0), LatestMinMaxObserver)
        quantizer.fake_quant_enabled = False
        x = batch()
        assert quantizer(x) is x


class TestNoData:
    def test_eval_passes_on_and_warns(self) -> None:
        quantizer = make(qbench.QSpec(bits=8)).eval()
        quantizer.label = "layer1.0.output_quantizer"
        x = batch()
        with pytest.warns(QBenchWarning, match=r"quantizer layer1\.0\.output_quantizer has seen no data"):
            assert quantizer(x) is x

    def test_observer_off_before_any_data(self) -> None:
        quantizer = make(qbench.QSpec(bits=8))
        quantizer.observer_enabled = False
        with pytest.warns(QBenchWarning, match=r"\(unnamed\) has seen no data"):
            quantizer(batch())

    def test_there_is_nothing_to_deploy(self) -> None:
        quantizer = make(qbench.QSpec(bits=8))
        quantizer.label = "conv.output_quantizer"
        with pytest.raises(NumericsError, match=r"quantizer conv\.output_quantizer has seen no data.*before convert"):
            quantizer.deployed_qparams()

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_broken_activations_are_found_at_the_end(self, value: float) -> None:
        quantizer = make(qbench.QSpec(bits=8))
        quantizer(torch.tensor([1.0, value]))
        with pytest.raises(NumericsError, match=r"a scale is (nan|inf); scales must be positive and finite"):
            quantizer.deployed_qparams()

    def test_nan_is_not_hidden_in_training(self) -> None:
        quantizer = make(qbench.QSpec(bits=8))
        quantizer(batch())
        quantizer.observer_enabled = False
        out = quantizer(torch.tensor([float("nan"), 1.0]))
        assert torch.isnan(out[0]) and torch.isfinite(out[1])


class TestState:
    @specs
    def test_round_trip(self, spec: qbench.QSpec) -> None:
        quantizer = make(spec)
        for step in range(3):
            quantizer(batch(step, spread=1 + step))
        quantizer.observer_enabled = False
        fresh = make(spec)
        fresh.load_state_dict(quantizer.state_dict(), strict=True)
        x = batch(9)
        assert torch.equal(fresh.eval()(x), quantizer.eval()(x))
        assert not fresh.observer_enabled and fresh.seen_data
        # the observer's range came along: going on gives the same
        for one in (quantizer, fresh):
            one.observer_enabled = True
            one.train()(batch(5, spread=7.0))
        assert torch.equal(fresh.scale, quantizer.scale)

    def test_all_entries_are_tensors(self) -> None:
        quantizer = make(qbench.QSpec(bits=8))
        assert all(isinstance(value, Tensor) for value in quantizer.state_dict().values())
        assert set(quantizer.state_dict()) == {
            "scale", "zero_point", "_extra_state", "observer.min_val", "observer.max_val"
        }  # fmt: skip

    @pytest.mark.parametrize("bits", range(8))
    def test_every_combination_of_switches(self, bits: int) -> None:
        quantizer = make(qbench.QSpec(bits=8))
        switches = [bool(bits & 1), bool(bits & 2), bool(bits & 4)]
        quantizer.observer_enabled, quantizer.fake_quant_enabled, quantizer.seen_data = switches
        fresh = make(qbench.QSpec(bits=8))
        fresh.load_state_dict(quantizer.state_dict())
        assert [fresh.observer_enabled, fresh.fake_quant_enabled, fresh.seen_data] == switches

    @specs
    @pytest.mark.parametrize("seen", [False, True])
    def test_copies(self, spec: qbench.QSpec, seen: bool) -> None:
        quantizer = make(spec)
        if seen:
            quantizer(batch())
        for twin in (copy.deepcopy(quantizer), pickle.loads(pickle.dumps(quantizer))):
            assert twin.seen_data == seen
            out, wanted = twin(batch(2, spread=4.0)), copy.deepcopy(quantizer)(batch(2, spread=4.0))
            assert torch.equal(out, wanted)
        assert quantizer.seen_data == seen

    @specs
    def test_meta_device(self, spec: qbench.QSpec) -> None:
        quantizer = make(spec).to("meta")
        assert quantizer(batch().to("meta")).is_meta


class TestPrinting:
    def test_before_and_after_data(self) -> None:
        quantizer = make(qbench.QSpec(bits=8))
        assert repr(quantizer) == "FakeQuantize(int8 asymmetric per tensor, no data seen)"
        quantizer(torch.tensor([-1.0, 1.55]))
        assert repr(quantizer) == "FakeQuantize(int8 asymmetric per tensor, scale=0.01, zero_point=-28)"
        quantizer.apply(qbench.disable_observer)
        quantizer.apply(qbench.disable_fake_quant)
        assert repr(quantizer).endswith("fake-quant off, observer off)")

    def test_a_weights(self) -> None:
        spec = qbench.QSpec(bits=4, symmetric=True, narrow=True, axis=0)
        assert repr(make(spec, LatestMinMaxObserver)) == "FakeQuantize(int4 symmetric per channel (axis 0))"


def test_an_observer_that_is_watched_is_called() -> None:
    """Ends of a tensor are counted in numbers only where nobody wants to see the observer's calls."""
    x, spec = torch.randn(7, 5), floor.QSpec()
    plain, watched = (FakeQuantize(spec, MovingAverageMinMaxObserver(spec)).train() for _ in range(2))
    seen: list[int] = []
    watched.observer.register_forward_hook(lambda *_: seen.append(1))
    assert torch.equal(plain(x), watched(x)) and seen == [1]
    assert torch.equal(plain.scale, watched.scale) and torch.equal(plain.zero_point, watched.zero_point)

"""The way in: what `get_qconfig(method=..., observer=...)` makes, and what it refuses."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch

import qbench
from qbench.errors import ConfigError
from qbench.fake_quantize import DSQ, LSQ, METHODS, PACT, TQT, DoReFaActivation, DoReFaWeight, FakeQuantize, LSQPlus
from qbench.observers import (
    LatestMSEObserver,
    MeanMagnitudeObserver,
    MovingAverageMinMaxObserver,
    MSEObserver,
    Observer,
)

WEIGHT = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0))

EXPECTED: dict[str, tuple[type[FakeQuantize], type[FakeQuantize]]] = {
    "fixed": (FakeQuantize, FakeQuantize),
    "lsq": (LSQ, LSQ),
    "lsq_plus": (LSQPlus, LSQ),
    "pact": (PACT, DoReFaWeight),
    "dorefa": (DoReFaActivation, DoReFaWeight),
    "dsq": (DSQ, DSQ),
    "tqt": (TQT, TQT),
}


def test_the_table_is_the_list() -> None:
    assert list(EXPECTED) == [method.name for method in METHODS]


@pytest.mark.parametrize("name", EXPECTED)
class TestMethods:
    def test_what_it_makes(self, name: str) -> None:
        config = qbench.get_qconfig("onnxruntime", weight_bits=4, activation_bits=5, method=name)
        activation, weight = config.make_activation(), config.make_weight(axis=0, weight=WEIGHT)
        assert (type(activation), type(weight)) == EXPECTED[name]
        assert (activation.spec.bits, weight.spec.bits) == (5, 4)
        assert all(p.shape in ((), (6,)) for p in weight.parameters())

    def test_for_weights_only(self, name: str) -> None:
        config = qbench.get_qconfig(activation_bits=None, weight_bits=8, method=name)
        assert config.weight_only and type(config.make_weight(axis=0, weight=WEIGHT)) is EXPECTED[name][1]

    def test_a_config_is_a_value(self, name: str) -> None:
        config = qbench.get_qconfig(method=name)
        for twin in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), qbench.get_qconfig(method=name)):
            assert twin == config and hash(twin) == hash(config)
        assert EXPECTED[name][0].__name__ in str(config)

    @pytest.mark.parametrize("target", ["onnxruntime", "xnnpack", "tosa", "neutron"])
    def test_every_target_without_restrictions_takes_it(self, name: str, target: str) -> None:
        qbench.get_qconfig(target, method=name)


class TestOneRole:
    def test_by_name_and_by_class(self) -> None:
        for chosen in ("lsq", LSQ):
            config = qbench.get_qconfig(activation_method=chosen)
            assert config.activation.fake_quantize is LSQ and config.weight.fake_quantize is FakeQuantize
            assert config.activation.observer is MeanMagnitudeObserver
            config = qbench.get_qconfig(weight_method=chosen)
            assert config.activation.fake_quantize is FakeQuantize and config.weight.fake_quantize is LSQ
        assert qbench.get_qconfig(method=TQT) == qbench.get_qconfig(method="tqt")

    def test_a_class_of_ones_own(self) -> None:
        class Mine(LSQ):
            """The user's."""

        config = qbench.get_qconfig(method=Mine, observer="mse")
        assert type(config.make_activation()) is Mine and config.activation.observer is MSEObserver

    def test_observers(self) -> None:
        config = qbench.get_qconfig(observer="mse", weight_observer="mse")
        assert (config.activation.observer, config.weight.observer) == (MSEObserver, LatestMSEObserver)
        assert qbench.get_qconfig().activation.observer is MovingAverageMinMaxObserver
        assert qbench.get_qconfig(method="lsq", observer="mse").activation.observer is MSEObserver

    def test_options(self) -> None:
        spec = qbench.targets.get("onnxruntime").activation
        made = qbench.QuantizerConfig(spec, fake_quantize=PACT, fake_quantize_options={"decay": 0.5}).make()
        assert isinstance(made, PACT) and made.decay == 0.5


POWER_OF_TWO = qbench.QSpec(power_of_two=True)
PER_CHANNEL = qbench.QSpec(bits=8, symmetric=True, narrow=True, axis=0)


def activation(
    kind: type[FakeQuantize], spec: qbench.QSpec, observer: type[Observer] = MeanMagnitudeObserver
) -> object:
    return qbench.QConfig(activation=qbench.QuantizerConfig(spec, observer, kind))


def weight(kind: type[FakeQuantize], spec: qbench.QSpec) -> object:
    return qbench.QConfig(weight=qbench.QuantizerConfig(spec, LatestMSEObserver, kind))


REFUSED: list[tuple[Callable[[], object], str]] = [
    (lambda: qbench.get_qconfig(method="lsqq"), r"no method is called 'lsqq'; expected one of fixed, lsq, .*tqt"),
    (lambda: qbench.get_qconfig(method=7), r"no method is called 7"),  # type: ignore[arg-type]
    (lambda: qbench.get_qconfig(weight_method="pact"), r"PACT quantizes activations, not weights; .*'dorefa', 'dsq'"),
    (lambda: qbench.get_qconfig(weight_method=PACT), r"PACT quantizes activations, not weights; weight_method is one"),
    (lambda: qbench.get_qconfig(weight_method="lsq_plus"), r"LSQPlus quantizes activations, not weights.*'lsq'"),
    (lambda: qbench.get_qconfig(activation_method=DoReFaWeight), r"DoReFaWeight quantizes weights, not activations"),
    (lambda: weight(PACT, PER_CHANNEL), r"PACT quantizes activations, not weights"),
    (lambda: weight(DoReFaWeight, qbench.QSpec(axis=0)), r"is not signed and symmetric.*weight_method='lsq'"),
    (lambda: activation(DoReFaWeight, qbench.QSpec()), r"DoReFaWeight quantizes weights, not activations"),
    (lambda: activation(LSQPlus, qbench.QSpec(symmetric=True)), r"learns a zero point, and .* has none.*method='lsq'"),
    (lambda: activation(LSQ, POWER_OF_TWO), r"LSQ learns a scale of any size.*power of two.*method='tqt'"),
    (lambda: activation(PACT, POWER_OF_TWO), r"PACT learns a scale of any size.*method='tqt'"),
    (lambda: activation(DoReFaActivation, POWER_OF_TWO), r"DoReFa has the scale.*method='tqt'"),
    (lambda: qbench.get_qconfig("vitis", method="lsq"), r"LSQ learns a scale of any size.*method='tqt'"),
    (lambda: activation(LSQ, qbench.QSpec(axis=1)), r"an activation has one scale"),
    (lambda: activation(LSQ, qbench.QSpec(), LatestMSEObserver), r"LatestMSEObserver keeps no range"),
    (lambda: qbench.get_qconfig(activation_bits=None, activation_method="lsq"), r"activations stay in float"),
    (lambda: qbench.get_qconfig(activation_bits=None, observer="mse"), r"observer='mse': activations stay in float"),
    (lambda: qbench.get_qconfig(observer="mode"), r"no observer of activations is called 'mode'; expected one of"),
    (lambda: qbench.get_qconfig(weight_observer=MSEObserver), r"MSEObserver keeps a range.*LatestMinMaxObserver"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_refused_with_the_way_out(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_tqt_is_for_targets_that_multiply_by_powers_of_two() -> None:
    config = qbench.get_qconfig("vitis", method="tqt")
    assert config.make_activation().spec.power_of_two and config.make_weight(axis=0).spec.power_of_two

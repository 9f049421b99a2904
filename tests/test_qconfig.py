"""QConfig and get_qconfig: what they make, what they refuse, and that they are values."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

import qbench
from qbench.errors import ConfigError
from qbench.fake_quantize import BiasQuantizer, FakeQuantize
from qbench.observers import LatestMinMaxObserver, MinMaxObserver, MovingAverageMinMaxObserver

EVERY = [
    qbench.QConfig(),
    qbench.get_qconfig(),
    qbench.get_qconfig("xnnpack", weight_bits=4, activation_bits=6, bias_bits=16),
    qbench.get_qconfig("neutron"),
    qbench.get_qconfig(bias_bits=8, bias_scale="own"),
    qbench.get_qconfig(bias_bits=12, bias_scale="own_pow2", observer=MinMaxObserver),
    qbench.QConfig(weight=qbench.QSpec(bits=4, symmetric=True, power_of_two=True), bias=qbench.BiasSpec(20)),
    qbench.QConfig(
        activation=qbench.QuantizerConfig(
            qbench.QSpec(bits=8), observer_options={"averaging_constant": 0.1}
        )
    ),
    qbench.QConfig(target=qbench.targets.get("xnnpack")),
]
every = pytest.mark.parametrize("config", EVERY, ids=range(len(EVERY)))


class TestValue:
    @every
    def test_frozen(self, config: qbench.QConfig) -> None:
        with pytest.raises(dataclasses.FrozenInstanceError):
            config.target = "xnnpack"  # type: ignore[misc]
        with pytest.raises(dataclasses.FrozenInstanceError):
            config.bias.bits = 8  # type: ignore[misc]

    @every
    def test_hashable_and_equal_to_its_copies(self, config: qbench.QConfig) -> None:
        twins = [copy.deepcopy(config), pickle.loads(pickle.dumps(config)), dataclasses.replace(config)]
        for twin in twins:
            assert twin == config and hash(twin) == hash(config)
        assert len({config, *twins}) == 1

    def test_different_configs_differ(self) -> None:
        assert len(set(EVERY)) == len(EVERY) - 1  # the first two are one
        assert qbench.QConfig() == qbench.get_qconfig("onnxruntime")

    @every
    def test_str_says_what_it_is(self, config: qbench.QConfig) -> None:
        text = str(config)
        for piece in (config.deployment.name, str(config.bias), f"int{config.activation.spec.bits}"):
            assert piece in text
        assert "\n" not in text and len(text) < 250

    def test_str_in_full(self) -> None:
        assert str(qbench.get_qconfig("xnnpack", weight_bits=4, bias_bits=16)) == (
            "xnnpack: activation int8 asymmetric per tensor (MovingAverageMinMaxObserver, FakeQuantize); "
            "weight int4 symmetric per channel (axis 0) (LatestMinMaxObserver, FakeQuantize); "
            "bias int16 at input_weight scale"
        )

    def test_one_config_on_a_model_is_held_not_copied(self) -> None:
        model = nn.Sequential(nn.Conv2d(3, 4, 3))
        model.qconfig = EVERY[2]
        prepared = qbench.prepare_qat(model, example_inputs=(torch.randn(1, 3, 4, 4),))
        assert prepared[0].qconfig == EVERY[2]


class TestMakes:
    @every
    def test_new_quantizers_each_time(self, config: qbench.QConfig) -> None:
        assert config.make_activation() is not config.make_activation()
        assert config.make_weight(axis=0) is not config.make_weight(axis=0)
        assert isinstance(config.make_bias(), BiasQuantizer)

    def test_widths(self) -> None:
        config = qbench.get_qconfig(weight_bits=4, activation_bits=6, bias_bits=20)
        activation, weight = config.make_activation(), config.make_weight(axis=0)
        assert (activation.spec.qmin, activation.spec.qmax) == (-32, 31)
        assert (weight.spec.qmin, weight.spec.qmax) == (-7, 7)
        assert config.make_bias().spec == qbench.BiasSpec(20, "input_weight")

    @pytest.mark.parametrize("axis", [0, 1])
    def test_the_layer_says_where_its_channels_are(self, axis: int) -> None:
        assert qbench.get_qconfig().make_weight(axis=axis).spec.axis == axis

    def test_per_tensor_stays_per_tensor(self) -> None:
        config = qbench.QConfig(weight=qbench.QSpec(bits=8, symmetric=True))
        assert config.make_weight(axis=1).spec.axis is None

    def test_observer_and_options(self) -> None:
        config = qbench.get_qconfig(observer=MinMaxObserver)
        assert isinstance(config.make_activation().observer, MinMaxObserver)
        assert isinstance(config.make_weight(axis=0).observer, LatestMinMaxObserver)
        assert EVERY[7].make_activation().observer.averaging_constant == 0.1

    def test_a_qspec_stands_for_the_usual_observer(self) -> None:
        config = qbench.QConfig(activation=qbench.QSpec(bits=8, symmetric=True), weight=qbench.QSpec(symmetric=True))
        assert config.activation.observer is MovingAverageMinMaxObserver
        assert config.weight.observer is LatestMinMaxObserver

    def test_a_class_of_ones_own(self) -> None:
        class Mine(FakeQuantize):
            pass

        config = qbench.QConfig(activation=qbench.QuantizerConfig(qbench.QSpec(), fake_quantize=Mine))
        assert type(config.make_activation()) is Mine

    @pytest.mark.parametrize("name", qbench.targets.names())
    def test_defaults_are_the_targets(self, name: str) -> None:
        target = qbench.targets.get(name)
        config = qbench.QConfig(target=name)
        assert (config.activation and config.activation.spec) == target.activation  # None: it computes them in float
        assert config.weight.spec == target.weight
        assert config.deployment is target
        assert config == qbench.get_qconfig(name)


REFUSED: list[tuple[Callable[[], object], str]] = [
    (lambda: qbench.get_qconfig(bias_bits=8), r"8 bits at input·weight.*get_qconfig\(bias_bits=8, bias_scale='own'\)"),
    (lambda: qbench.get_qconfig(bias_bits=15), r"bias_scale='own'"),
    (lambda: qbench.BiasSpec(12), r"bias_scale='own'"),
    (lambda: qbench.get_qconfig(bias_bits=7, bias_scale="own"), r"a bias of 7 bits: expected 8 to 64"),
    (lambda: qbench.get_qconfig(bias_bits=65), r"a bias of 65 bits: expected 8 to 64"),
    (lambda: qbench.get_qconfig(bias_bits=16.0), r"a bias of 16\.0 bits"),  # type: ignore[arg-type]
    (lambda: qbench.get_qconfig(bias_scale="mine"), r"'mine' is unknown; expected one of input_weight, own, own_pow2"),
    (lambda: qbench.get_qconfig("neutron", bias_bits=16), r"a bias of 16 bits: target neutron has 32; bias_bits=32 is"),
    (lambda: qbench.get_qconfig("neutron", bias_scale="own"), r"bias scale 'own': target neutron has input_weight"),
    (lambda: qbench.get_qconfig(weight_bits=16), r"weight of 16 bits: target onnxruntime has 2, .*8; weight_bits=8 is"),
    (lambda: qbench.get_qconfig(activation_bits=9), r"activation of 9 bits.*activation_bits=8 is the nearest"),
    (lambda: qbench.get_qconfig("neutron", weight_bits=4), r"weight of 4 bits: target neutron has 8"),
    (lambda: qbench.get_qconfig(weight_bits=1), r"a code is 2 to 32 bits wide"),
    (lambda: qbench.get_qconfig("onnxrutnime"), r"'onnxrutnime' is unknown.*did you mean 'onnxruntime'\?"),
    (lambda: qbench.QConfig(target=None), r"None is unknown"),  # type: ignore[arg-type]
    (lambda: qbench.QConfig(activation=8), r"8 is not a quantizer config.*QSpec\(bits=8\)"),  # type: ignore[arg-type]
    (lambda: qbench.QConfig(weight=None), r"there would be nothing to quantize"),  # type: ignore[arg-type]
    (lambda: qbench.QConfig(bias=16), r"16 is not a BiasSpec; BiasSpec\(bits=32\) works"),  # type: ignore[arg-type]
    (lambda: qbench.QConfig(activation=qbench.QSpec(axis=1)), r"an activation has one scale"),
    (
        lambda: qbench.QConfig(weight=qbench.QuantizerConfig(qbench.QSpec(symmetric=True))),
        r"weight: MovingAverageMinMaxObserver keeps a range.*LatestMinMaxObserver",
    ),
    (
        lambda: qbench.QConfig(activation=qbench.QuantizerConfig(qbench.QSpec(), LatestMinMaxObserver)),
        r"activation: LatestMinMaxObserver keeps no range.*MovingAverageMinMaxObserver",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("make", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_refused_with_the_way_out(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize("bits", range(16, 33))
def test_every_width_at_input_weight_scale(bits: int) -> None:
    assert qbench.get_qconfig(bias_bits=bits).bias.code_limit == min(2 ** (bits - 1) - 1, 2**22)


@pytest.mark.parametrize("bits", range(8, 33))
@pytest.mark.parametrize("scale", ["own", "own_pow2"])
def test_every_width_at_own_scale(bits: int, scale: str) -> None:
    assert str(qbench.get_qconfig(bias_bits=bits, bias_scale=scale).bias) == f"int{bits} at {scale} scale"


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_width_of_codes(bits: int) -> None:
    config = qbench.get_qconfig(weight_bits=bits, activation_bits=bits)
    assert config.weight.spec.qmax == 2 ** (bits - 1) - 1 == -config.weight.spec.qmin
    assert config.activation.spec.qmax - config.activation.spec.qmin == 2**bits - 1

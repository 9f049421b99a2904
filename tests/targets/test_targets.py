"""Targets: the entries, finding one, and their rules as data."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
from torch import nn

import qbench
from qbench.errors import ConfigError
from qbench.targets import TARGETS, Target

targets = pytest.mark.parametrize("target", TARGETS, ids=str)


class TestGet:
    @targets
    def test_by_name_and_by_itself(self, target: Target) -> None:
        assert qbench.targets.get(target.name) is target
        assert qbench.targets.get(target) is target

    def test_names_are_unique_and_in_order(self) -> None:
        assert qbench.targets.names() == (
            "onnxruntime", "xnnpack", "neutron", "tosa", "tensorrt", "openvino", "snpe", "qnn", "vitis", "esp_dl",
            "esp_dl_p4", "tflite", "tflite_16x8", "vulkan", "academic",
        )  # fmt: skip
        assert len(set(qbench.targets.names())) == len(TARGETS)

    def test_a_target_that_is_not_listed_is_used_as_it_is(self) -> None:
        mine = dataclasses.replace(TARGETS[0], name="mine", bits=(8, 16))
        assert qbench.targets.get(mine) is mine
        assert qbench.get_qconfig(mine, activation_bits=16).make_activation().spec.qmax == 2**15 - 1

    @pytest.mark.parametrize(
        ("given", "near"),
        [
            ("onnxrutnime", "onnxruntime"), ("onnx_runtime", "onnxruntime"), ("OnnxRuntime", "onnxruntime"),
            ("xnpack", "xnnpack"), ("XNNPACK", "xnnpack"), ("neuton", "neutron"), ("Neutron", "neutron"),
        ],
    )  # fmt: skip
    def test_a_near_match_is_named(self, given: str, near: str) -> None:
        with pytest.raises(ConfigError, match=rf"target '{given}' is unknown.*did you mean '{near}'\?"):
            qbench.targets.get(given)

    @pytest.mark.parametrize("given", ["", "a chip", None, 8])
    def test_every_name_is_listed(self, given: object) -> None:
        with pytest.raises(ConfigError, match=rf"expected one of {', '.join(qbench.targets.names())}$"):
            qbench.targets.get(given)  # type: ignore[arg-type]


class TestEntries:
    @targets
    def test_every_entry_says_where_its_rules_are_from(self, target: Target) -> None:
        assert target.sources and all(rule and source for rule, source in target.sources.items())
        assert any("activation" in rule for rule in target.sources)
        assert any("weight" in rule for rule in target.sources)
        assert any("bias" in rule for rule in target.sources)
        assert target.description and str(target) == target.name

    @targets
    def test_it_is_a_value(self, target: Target) -> None:
        assert pickle.loads(pickle.dumps(target)) == target == copy.deepcopy(target)
        assert hash(target) == hash(copy.deepcopy(target))
        with pytest.raises(dataclasses.FrozenInstanceError):
            target.name = "other"  # type: ignore[misc]

    @targets
    def test_every_rule_of_the_table_has_a_source(self, target: Target) -> None:
        rules = " ".join(target.sources)
        for role in ("activation", "weight", "bias", "requantization"):
            assert role in rules, f"{target} does not say where its {role} is from"
        assert target.requantization and target.verified and target.unverified

    @pytest.mark.parametrize(
        ("name", "activation", "weight"),
        [
            ("onnxruntime", (-128, 127, False), (-127, 127, 0)), ("xnnpack", (-128, 127, False), (-127, 127, 0)),
            ("neutron", (-128, 127, False), (-127, 127, 0)), ("tosa", (-128, 127, False), (-127, 127, 0)),
            ("tensorrt", (-128, 127, True), (-127, 127, 0)), ("openvino", (0, 255, False), (-127, 127, 0)),
            ("snpe", (0, 255, False), (0, 255, None)), ("qnn", (0, 255, False), (-127, 127, 0)),
            ("vitis", (-128, 127, True), (-128, 127, None)), ("esp_dl", (-128, 127, True), (-128, 127, None)),
            ("esp_dl_p4", (-128, 127, True), (-128, 127, 0)), ("tflite", (-128, 127, False), (-127, 127, 0)),
            ("tflite_16x8", (-(2**15), 2**15 - 1, True), (-127, 127, 0)), ("academic", (-8, 7, False), (-7, 7, 0)),
        ],
    )  # fmt: skip
    def test_grids(self, name: str, activation: tuple, weight: tuple) -> None:
        target = qbench.targets.get(name)
        assert target.activation is not None
        assert (target.activation.qmin, target.activation.qmax, target.activation.symmetric) == activation
        assert (target.weight.qmin, target.weight.qmax, target.weight.axis) == weight
        assert target.activation.axis is None and target.weight.symmetric is (name != "snpe")

    @pytest.mark.parametrize(
        ("name", "bits", "scale"),
        [
            ("vitis", 8, "own_pow2"), ("esp_dl", 20, "input_weight"), ("esp_dl_p4", 32, "input_weight"),
            ("tflite", 32, "input_weight"), ("tflite_16x8", 64, "input_weight"), ("tensorrt", 32, "input_weight"),
            ("openvino", 32, "input_weight"), ("snpe", 32, "input_weight"), ("qnn", 32, "input_weight"),
        ],
    )  # fmt: skip
    def test_default_bias(self, name: str, bits: int, scale: str) -> None:
        assert qbench.get_qconfig(name).bias == qbench.BiasSpec(bits, scale) == qbench.QConfig(target=name).bias

    @targets
    def test_power_of_two_targets_are_so_throughout(self, target: Target) -> None:
        shifting = target.name in ("vitis", "esp_dl", "esp_dl_p4")
        assert target.weight.power_of_two is shifting
        assert target.activation is None or target.activation.power_of_two is shifting
        assert (target.shifts is not None) is (target.name == "vitis")

    @targets
    def test_only_what_was_compared_has_an_integer_form(self, target: Target) -> None:
        assert (target.arithmetic is not None) is (target.name in ("onnxruntime", "xnnpack", "tosa"))

    @targets
    def test_its_own_choice_is_what_a_qconfig_gets(self, target: Target) -> None:
        assert qbench.get_qconfig(target) == qbench.QConfig(target=target)
        assert qbench.get_qconfig(target).weight.spec == target.weight
        if target.activation is None:
            assert qbench.get_qconfig(target).weight_only
        else:
            assert qbench.get_qconfig(target).activation.spec == target.activation

    def test_one_trained_model_serves_both_runtimes(self) -> None:
        first, second = qbench.targets.get("onnxruntime"), qbench.targets.get("xnnpack")
        for field in ("activation", "weight", "bits", "fused_activations", "shared_ops", "accumulator_bits"):
            assert getattr(first, field) == getattr(second, field)

    def test_neutron_has_an_int32_bias_without_its_lowest_code(self) -> None:
        neutron = qbench.targets.get("neutron")
        assert neutron.symmetric_bias and neutron.bias_bits == (32,)
        assert not any(t.symmetric_bias for t in TARGETS if t is not neutron)

    def test_vulkan_computes_linear_layers_only(self) -> None:
        vulkan = qbench.targets.get("vulkan")
        assert vulkan.computes(nn.Linear) and not vulkan.computes(nn.Conv2d)
        assert all(t.computes(nn.Conv2d) for t in TARGETS if t is not vulkan)

    @targets
    @pytest.mark.parametrize(
        ("activation", "fused"),
        [
            (None, True), (nn.ReLU(), True), (nn.ReLU6(), True), (nn.Hardtanh(-1, 1), True), (nn.Hardswish(), False),
            (nn.SiLU(), False), (nn.GELU(), False), (nn.LeakyReLU(), False), (nn.Sigmoid(), False), (nn.PReLU(), False),
        ],
    )  # fmt: skip
    def test_what_is_fused(self, target: Target, activation: nn.Module | None, fused: bool) -> None:
        assert target.fuses(activation) is fused


QSpec = qbench.QSpec
SYMMETRIC = QSpec(symmetric=True)
REFUSED = [
    ("tensorrt", {"weight_bits": 3}, r"weight of 3 bits: target tensorrt has 8; weight_bits=8 is the nearest"),
    ("tensorrt", {"activation_bits": 3}, r"activation of 3 bits: target tensorrt has 8; activation_bits=8 is"),
    ("openvino", {"weight_bits": 3}, r"target openvino has 7, 8; weight_bits=7 is the nearest"),
    ("snpe", {"activation_bits": 3}, r"target snpe has 8, 16; activation_bits=8 is the nearest"),
    ("snpe", {"weight_bits": 4}, r"target snpe has 8; weight_bits=8 is the nearest"),
    ("snpe", {"bias_bits": 16}, r"a bias of 16 bits: target snpe has 8, 32; bias_bits=8 is the nearest"),
    ("snpe", {"bias_bits": 8}, r"get_qconfig\(bias_bits=8, bias_scale='own'\)"),
    ("qnn", {"weight_bits": 3}, r"target qnn has 4, 8; weight_bits=4 is the nearest"),
    ("qnn", {"activation_bits": 12}, r"target qnn has 8, 16; activation_bits=8 is the nearest"),
    ("vitis", {"weight_bits": 3}, r"target vitis has 8; weight_bits=8 is the nearest"),
    ("vitis", {"bias_bits": 32}, r"a bias of 32 bits: target vitis has 8; bias_bits=8 is the nearest"),
    ("vitis", {"bias_scale": "own"}, r"bias scale 'own': target vitis has own_pow2"),
    ("esp_dl", {"activation_bits": 3}, r"target esp_dl has 8; activation_bits=8 is the nearest"),
    ("esp_dl", {"bias_bits": 24}, r"target esp_dl has 20, 32; bias_bits=20 is the nearest"),
    ("esp_dl_p4", {"weight_bits": 3}, r"target esp_dl_p4 has 8; weight_bits=8"),
    ("tflite", {"weight_bits": 3}, r"target tflite has 8; weight_bits=8"),
    ("tflite_16x8", {"activation_bits": 8}, r"target tflite_16x8 has 16; activation_bits=16 is the nearest"),
    ("tflite_16x8", {"bias_bits": 32}, r"a bias of 32 bits: target tflite_16x8 has 64; bias_bits=64 is the nearest"),
    ("vulkan", {"weight_bits": 3}, r"weight of 3 bits: target vulkan has 4, 8; weight_bits=4 is the nearest"),
    ("vulkan", {"activation_bits": 8}, r"computes activations in float; get_qconfig\('vulkan', activation_bits=None\)"),
    ("academic", {"weight_bits": 17}, r"weight_bits=16 is the nearest"),
    ("tensorrt", {"activation_bits": None}, r"target tensorrt computes on integers alone.*activation_bits=8"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "message"), REFUSED, ids=[f"{r[0]} {r[1]}" for r in REFUSED])
def test_what_a_target_lacks_is_refused_with_the_nearest(name: str, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        qbench.get_qconfig(name, **options)


GRIDS = [
    ("tensorrt", {"activation": QSpec()}, r"activation int8 asymmetric per tensor: target tensorrt has no zero points"),
    ("tensorrt", {"activation": QSpec(signed=False, symmetric=True)}, r"has no zero points"),
    ("tensorrt", {"weight": QSpec(axis=0)}, r"weight int8 asymmetric per channel.*has no zero points"),
    ("tflite_16x8", {"activation": QSpec(bits=16)}, r"has no zero points; its own grid is int16 symmetric per tensor"),
    ("vitis", {"activation": SYMMETRIC}, r"target vitis multiplies by powers of two only"),
    ("vitis", {"weight": QSpec(symmetric=True, axis=0, power_of_two=True)}, r"target vitis has one scale per tensor"),
    ("esp_dl", {"weight": SYMMETRIC}, r"multiplies by powers of two only; its own grid is .*power-of-two"),
    ("esp_dl_p4", {"weight": QSpec(symmetric=True, axis=0)}, r"multiplies by powers of two only"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "specs", "message"), GRIDS)
def test_a_grid_that_the_hardware_lacks_is_refused(name: str, specs: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        qbench.QConfig(target=name, **specs)


@pytest.mark.parametrize(
    ("name", "specs"),
    [
        ("tensorrt", {"activation": QSpec(symmetric=True, power_of_two=True)}),
        ("esp_dl_p4", {"weight": QSpec(symmetric=True, power_of_two=True)}),
        ("openvino", {"weight": QSpec(axis=0)}),
        ("onnxruntime", {"activation": QSpec(signed=False)}),
    ],
)
def test_a_grid_that_is_part_of_the_hardware_s_own_is_taken(name: str, specs: dict) -> None:
    config = qbench.QConfig(target=name, **specs)
    assert all(getattr(config, role).spec == spec for role, spec in specs.items())


LIMITS = qbench.targets.get("vitis").shifts
FAULTS = [
    ({"bias_scales": ("input_weight", "other")}, r"target mine: unknown bias scales \['other'\]; known:"),
    ({"bits": (4, 6)}, r"its activation has 8 bits, which are not among \(4, 6\)"),
    ({"weight_bits": (4,)}, r"its weight has 8 bits, which are not among \(4,\)"),
    ({"bias": qbench.BiasSpec(40)}, r"its bias int40 at input_weight scale is not among the widths"),
    ({"activation": None, "weight_only": False}, r"activation=None needs weight_only=True"),
    ({"shifts": LIMITS}, r"shift limits are for power-of-two scales"),
    ({"first_last_bits": 9}, r"first_last_bits=9 is not among"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), FAULTS)
def test_an_entry_that_contradicts_itself_is_refused(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(TARGETS[0], name="mine", **change)

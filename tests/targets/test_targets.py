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
        assert qbench.targets.names() == ("onnxruntime", "xnnpack", "neutron", "tosa")
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

    @pytest.mark.parametrize("given", ["", "tensorrt", "a chip", None, 8])
    def test_every_name_is_listed(self, given: object) -> None:
        with pytest.raises(ConfigError, match=r"expected one of onnxruntime, xnnpack, neutron, tosa$"):
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
    def test_weights_are_symmetric_per_channel_without_the_lowest_code(self, target: Target) -> None:
        weight = target.weight
        assert (weight.qmin, weight.qmax, weight.axis, weight.symmetric) == (-127, 127, 0, True)

    @targets
    def test_activations_are_int8_with_a_zero_point(self, target: Target) -> None:
        activation = target.activation
        assert (activation.qmin, activation.qmax, activation.axis, activation.symmetric) == (-128, 127, None, False)

    @targets
    def test_its_own_widths_are_allowed(self, target: Target) -> None:
        assert target.activation.bits in target.bits and target.weight.bits in target.bits
        assert 32 in target.bias_bits and "input_weight" in target.bias_scales

    def test_one_trained_model_serves_both_runtimes(self) -> None:
        first, second = qbench.targets.get("onnxruntime"), qbench.targets.get("xnnpack")
        for field in ("activation", "weight", "bits", "fused_activations", "shared_ops", "accumulator_bits"):
            assert getattr(first, field) == getattr(second, field)

    def test_neutron_has_an_int32_bias_without_its_lowest_code(self) -> None:
        neutron = qbench.targets.get("neutron")
        assert neutron.symmetric_bias and neutron.bias_bits == (32,)
        assert not any(t.symmetric_bias for t in TARGETS if t is not neutron)

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


def test_an_unknown_bias_scale_is_refused_when_the_target_is_made() -> None:
    with pytest.raises(ConfigError, match=r"target mine: unknown bias scales \['other'\]; known:"):
        dataclasses.replace(TARGETS[0], name="mine", bias_scales=("input_weight", "other"))

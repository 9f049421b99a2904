"""Overrides: what they match, what they ask for, what they make of a qconfig."""

from __future__ import annotations

import pickle

import pytest
from torch import nn

import qbench
from qbench.errors import ConfigError
from qbench.overrides import exactly, overridden

Override = qbench.Override


@pytest.mark.parametrize(
    ("match", "path", "hit"),
    [
        ("layer1.*", "layer1.0.conv1", True), ("layer1.*", "layer1", False), ("layer1", "layer1", True),
        ("layer1", "layer1.0", False), ("*.conv?", "a.conv2", True), ("*.conv[13]", "a.conv2", False), ("*", "", True),
        (nn.Conv2d, "anything", True), (nn.Linear, "anything", False), (nn.Module, "anything", True),
    ],
)  # fmt: skip
def test_matching(match: str | type, path: str, hit: bool) -> None:
    assert Override(match, exclude=True).hits(path, (nn.Conv2d, qbench.nn.intrinsic.ConvBn2d)) is hit


@pytest.mark.parametrize("path", ["a.b", "a[0].b", "odd*name", "what?"])
def test_exactly_one_path(path: str) -> None:
    rule = Override(exactly(path), exclude=True)
    assert rule.hits(path, ()) and not rule.hits(path + "x", ()) and not rule.hits("x", ())


def test_it_is_a_value_that_says_itself() -> None:
    rule = Override(nn.Linear, weight_bits=4, bias_scale="own")
    assert pickle.loads(pickle.dumps(rule)) == rule
    assert hash(rule) == hash(Override(nn.Linear, None, 4, bias_scale="own"))
    assert str(rule) == "Linear, weight_bits=4, bias_scale=own"
    assert str(Override("layer1.*", exclude=True)) == "'layer1.*', exclude=True"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"match": "conv"}, r"Override\('conv'\) asks for nothing; Override\('conv', exclude=True\) leaves it"),
        ({"match": "", "exclude": True}, r"Override\(''\): expected a path such as 'layer1.*' or a class"),
        ({"match": 3, "exclude": True}, r"Override\(3\): expected"),
        ({"match": int, "exclude": True}, r"expected a path.*or a class such as torch.nn.Linear"),
        ({"match": "a", "exclude": True, "weight_bits": 4}, r"what is excluded has no codes"),
    ],
)
def test_refusals(arguments: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Override(**arguments)


def test_what_is_asked_changes_nothing_else() -> None:
    base = qbench.get_qconfig("onnxruntime")
    config = overridden(base, {"weight_bits": 4, "bias_bits": 20}, "conv")
    assert config == qbench.get_qconfig("onnxruntime", weight_bits=4, bias_bits=20)
    assert overridden(base, {"exclude": True}, "conv") is None
    assert overridden(base, {"exclude": False}, "conv") == base


def test_the_width_of_an_output_leaves_that_of_a_float_input() -> None:
    config = overridden(qbench.get_qconfig(), {"activation_bits": 4}, "conv")
    assert config is not None
    assert (config.make_activation().spec.bits, config.make_input().spec.bits) == (4, 8)
    config = overridden(qbench.get_qconfig(), {"input_bits": 4}, "conv")
    assert config is not None
    assert (config.make_activation().spec.bits, config.make_input().spec.bits) == (8, 4)


@pytest.mark.parametrize(
    ("target", "options", "asked", "message"),
    [
        ("tensorrt", {}, {"weight_bits": 3}, r"override of conv: weight of 3 bits.*weight_bits=8 is the nearest"),
        ("tensorrt", {}, {"input_bits": 4}, r"override of conv: activation of 4 bits.*activation_bits=8 is the"),
        ("snpe", {}, {"bias_bits": 8}, r"override of conv: .*bias_scale='own'"),
        ("onnxruntime", {"activation_bits": None}, {"activation_bits": 8}, r"activations stay in float; prepare_by"),
    ],
)
def test_what_the_target_lacks_is_refused(target: str, options: dict, asked: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        overridden(qbench.get_qconfig(target, **options), asked, "conv")

"""qconfigs of torch.ao: the same grids here, or an error that names the nearest call."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from models import assert_exact, images, train
from torch import nn
from torch_ao_models import QUIET, Block, ao

import qbench
from qbench import QSpec
from qbench.errors import ConfigError
from qbench.nn.qat.body import QatModule
from qbench.observers import MinMaxObserver, MovingAverageMinMaxObserver
from qbench.torch_ao import translate_qconfig

pytestmark = QUIET

PER_CHANNEL = QSpec(8, symmetric=True, axis=0, narrow=True)
PER_TENSOR = QSpec(8, symmetric=True, narrow=True)

BACKENDS = {
    "fbgemm": (QSpec(7), PER_CHANNEL),  # reduce_range: codes 0 … 127
    "x86": (QSpec(7), PER_CHANNEL),
    "onednn": (QSpec(8), PER_CHANNEL),
    "qnnpack": (QSpec(8), PER_TENSOR),
}


@pytest.mark.parametrize("version", [0, 1])
@pytest.mark.parametrize("backend", BACKENDS)
def test_default_qat_qconfigs(backend: str, version: int) -> None:
    found = translate_qconfig(ao.get_default_qat_qconfig(backend, version))
    assert (found.activation.spec, found.weight.spec) == BACKENDS[backend]
    assert found.activation.observer is MovingAverageMinMaxObserver
    assert found.activation.observer_options == {"averaging_constant": 0.01}
    assert (found.weight.observer.stateless, found.bias) == (True, qbench.BiasSpec())


def test_target_is_the_callers() -> None:
    assert translate_qconfig(ao.get_default_qat_qconfig("qnnpack"), "xnnpack").target == "xnnpack"
    assert translate_qconfig(None) is None


WEIGHT = ao.FakeQuantize.with_args(
    observer=ao.MovingAveragePerChannelMinMaxObserver,
    quant_min=-8, quant_max=7, dtype=torch.qint8, qscheme=torch.per_channel_symmetric,
)  # fmt: skip


def act(**options: Any) -> Any:
    return ao.FakeQuantize.with_args(**{"observer": ao.MovingAverageMinMaxObserver, **options})


SYMMETRIC = torch.per_tensor_symmetric
HAND_BUILT = [
    (act(quant_min=0, quant_max=15), QSpec(4)),
    (act(quant_min=0, quant_max=255, reduce_range=True), QSpec(7)),
    (act(quant_min=-128, quant_max=127, dtype=torch.qint8), QSpec(8)),
    (act(quant_min=-127, quant_max=127, dtype=torch.qint8, qscheme=SYMMETRIC), QSpec(8, symmetric=True, narrow=True)),
    (act(quant_min=0, quant_max=255, qscheme=SYMMETRIC), QSpec(8, symmetric=True)),
    (ao.FusedMovingAvgObsFakeQuantize.with_args(quant_min=0, quant_max=63), QSpec(6)),
    (ao.MinMaxObserver.with_args(dtype=torch.quint8), QSpec(8)),
]  # fmt: skip


@pytest.mark.parametrize(("activation", "spec"), HAND_BUILT, ids=lambda value: str(value)[:40])
def test_hand_built_qconfigs(activation: Any, spec: QSpec) -> None:
    found = translate_qconfig(ao.QConfig(activation=activation, weight=WEIGHT))
    assert (found.activation.spec, found.weight.spec) == (spec, QSpec(4, symmetric=True, axis=0, narrow=True))


def test_observer_and_its_constant_are_taken() -> None:
    moving = act(averaging_constant=0.5, quant_min=0, quant_max=255)
    found = translate_qconfig(ao.QConfig(activation=moving, weight=WEIGHT)).make_activation().observer
    assert (type(found), found.averaging_constant) == (MovingAverageMinMaxObserver, 0.5)
    found = translate_qconfig(ao.QConfig(activation=ao.MinMaxObserver, weight=WEIGHT)).make_activation().observer
    assert type(found) is MinMaxObserver


def test_the_same_range_gives_the_same_grid() -> None:
    """torch.ao's quantizer and ours see the same tensors: scale to the bit, zero point offset by the lowest code."""
    qconfig = ao.QConfig(activation=act(quant_min=0, quant_max=255), weight=WEIGHT)
    theirs, ours = qconfig.activation(), translate_qconfig(qconfig).make_activation().train()
    for seed in range(5):
        x = images(seed=seed)
        theirs(x), ours(x)
        assert torch.equal(theirs.scale, ours.scale.reshape(1))
        assert torch.equal(theirs.zero_point - 128, ours.zero_point.reshape(1))


FIXED = {
    "sigmoid": (ao.default_fixed_qparams_range_0to1_fake_quant, (1 / 256, -128), False),
    "tanh": (ao.default_fixed_qparams_range_neg1to1_fake_quant, (1 / 128, 0), True),
    "the observer alone": (ao.default_fixed_qparams_range_0to1_observer, (1 / 256, -128), False),
    "an odd one": (ao.FixedQParamsObserver.with_args(scale=0.1, zero_point=7), (0.1, -121), False),
}


@pytest.mark.parametrize("name", FIXED)
def test_fixed_grids(name: str) -> None:
    activation, (scale, zero_point), symmetric = FIXED[name]
    found = translate_qconfig(ao.QConfig(activation, WEIGHT))
    assert found.activation.spec == QSpec(8, symmetric=symmetric)
    theirs, x = getattr(activation(), "activation_post_process", activation()), images()
    quantizer = found.make_activation().train()
    for _ in range(2):
        quantizer(3 * x)
        assert (quantizer.scale.item(), quantizer.zero_point.item()) == (theirs.scale.item(), zero_point)
    assert quantizer.scale.item() == pytest.approx(scale)
    assert found.make_input().known_grid is None and found.make_input().spec == QSpec(8)


def test_targets_with_rules_of_their_own_take_the_grids_that_they_have() -> None:
    weight = ao.default_per_channel_weight_fake_quant
    qconfigs = {name: ao.QConfig(FIXED[name][0], weight) for name in ("sigmoid", "tanh")}
    assert translate_qconfig(qconfigs["tanh"], "tensorrt").activation.spec.symmetric
    assert translate_qconfig(qconfigs["sigmoid"], "qnn").make_activation().observer.known == (1 / 256, 0)
    with pytest.raises(ConfigError, match="target tensorrt has no zero points"):
        translate_qconfig(qconfigs["sigmoid"], "tensorrt")


def test_a_sigmoid_with_a_fixed_grid() -> None:
    torch.manual_seed(0)
    x, model = images(), Block().train().fuse_model()
    model.qconfig = ao.get_default_qat_qconfig("onednn")
    model.sigmoid.qconfig = ao.QConfig(FIXED["sigmoid"][0], ao.default_weight_fake_quant)
    qat = qbench.prepare_qat(model, example_inputs=(x,))
    train(qat, x, steps=2)
    assert qat.sigmoid.output_quantizer.known_grid == (1 / 256, -128)
    assert float(qat.sigmoid.output_quantizer.scale) == 1 / 256
    assert_exact(qat, qbench.convert(qat, (x,)), images(seed=3))
    alone = nn.Sequential(nn.Sigmoid(), nn.Softmax(1))
    alone.qconfig = ao.QConfig(FIXED["an odd one"][0], ao.default_weight_fake_quant)
    alone = qbench.prepare_qat(alone, example_inputs=(x,)).train()
    alone(9 * x)
    assert [float(module.output_quantizer.scale) for module in alone] == [pytest.approx(0.1)] * 2
    assert float(alone[0].input_quantizers["0"].scale) > 0.1  # the input is no probability


def test_weights_alone() -> None:
    assert translate_qconfig(ao.default_weight_only_qconfig).weight_only


REFUSED = [
    (ao.default_dynamic_qat_qconfig, "dynamic quantization.*get_qconfig"),
    (ao.float16_static_qconfig, "PlaceholderObserver.*makes no integer codes"),
    (ao.default_activation_only_qconfig, "qconfig = None on"),
    (ao.default_embedding_qat_qconfig, "float_qparams makes no integer codes"),
    (ao.QConfig(act(quant_min=0, quant_max=200), WEIGHT), r"0 … 200 are not all codes.*0 … 255 are those of 8 bits"),
    (ao.QConfig(act(quant_min=-10, quant_max=7, dtype=torch.qint8), WEIGHT), r"-10 … 7 are not all codes"),
    (ao.QConfig(ao.FixedQParamsObserver.with_args(scale=0.1, zero_point=300), WEIGHT), "FixedQParams.*zero point 172"),
    (
        ao.QConfig(act(quant_min=0, quant_max=255), ao.default_fixed_qparams_range_0to1_fake_quant),
        "weight: FixedQParamsObserver has no equivalent",
    ),
    (ao.QConfig(ao.default_per_channel_weight_observer, WEIGHT), "PerChannelMinMaxObserver has no equivalent"),
    (ao.QConfig(nn.ReLU, WEIGHT), "ReLU is not a class of torch.ao"),
    (ao.QConfig(ao.HistogramObserver, WEIGHT), r"HistogramObserver has no equivalent.*observer='mse'"),
    ("x86", "got str, expected a torch.ao.quantization.QConfig"),
]


@pytest.mark.parametrize(("qconfig", "message"), REFUSED, ids=lambda value: str(value)[:30])
def test_what_has_no_equivalent_is_refused_with_the_nearest(qconfig: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        translate_qconfig(qconfig)


class LearnableFakeQuantize(nn.Module):
    """As MQBench has it, by name."""


def test_quantizers_of_mqbench_are_refused_with_the_method() -> None:
    with pytest.raises(ConfigError, match=r"LearnableFakeQuantize.*get_qconfig\(method='lsq'\)"):
        translate_qconfig(ao.QConfig(LearnableFakeQuantize, WEIGHT))


def test_the_users_warnings_are_not_hidden() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        translate_qconfig(ao.get_default_qat_qconfig("qnnpack"))
        warnings.warn("mine", stacklevel=1)
    assert "mine" in [str(found.message) for found in caught]


@pytest.mark.parametrize("given", ["attribute", "argument"])
def test_prepare_qat_takes_it(given: str) -> None:
    model, x, qconfig = Block().train().fuse_model(), images(), ao.get_default_qat_qconfig("fbgemm")
    if given == "attribute":
        model.qconfig = qconfig
        model = qbench.prepare_qat(model, example_inputs=(x,))
    else:
        model = qbench.prepare_qat(model, qconfig=qconfig, example_inputs=(x,))
    model(x)
    specs = {module.output_quantizer.spec for module in model.modules() if isinstance(module, QatModule)}
    assert specs == {QSpec(7)}


def test_an_error_names_the_module() -> None:
    model = Block().train()
    model.conv2.qconfig = ao.default_dynamic_qat_qconfig
    with pytest.raises(ConfigError, match=r"^conv2\.qconfig: activation: dynamic"):
        qbench.prepare_qat(model, qconfig=qbench.get_qconfig(), example_inputs=(images(),))


def bits(model: nn.Module) -> dict[str, int | None]:
    """Path → bits of the activation, None where the module is in float."""
    return {
        path: module.output_quantizer.spec.bits if isinstance(module, QatModule) else None
        for path, module in model.named_modules()
        if path in ("conv1", "conv2", "fc", "skip_add")
    }


def test_a_qconfig_mapping_by_name_pattern_type_and_default() -> None:
    at = {width: ao.QConfig(act(quant_min=0, quant_max=2**width - 1), WEIGHT) for width in (4, 5, 6, 7)}
    mapping = (
        ao.QConfigMapping()
        .set_global(at[7])
        .set_object_type(nn.Conv2d, at[6])
        .set_module_name_regex("skip.*", at[5])
        .set_module_name("conv1", at[7])
        .set_module_name("fc", None)
    )
    model = Block().train()
    model.qconfig = mapping
    model = qbench.prepare_qat(qbench.fuse(model), example_inputs=(images(),))
    assert bits(model) == {"conv1": 7, "conv2": 6, "fc": None, "skip_add": 5}


@pytest.mark.parametrize("backend", BACKENDS)
def test_default_qconfig_mappings(backend: str) -> None:
    mapping = ao.get_default_qat_qconfig_mapping(backend)
    model = qbench.prepare_qat(Block().train().fuse_model(), qconfig=mapping, example_inputs=(images(),))
    assert set(bits(model).values()) == {BACKENDS[backend][0].bits}


def test_mappings_by_position_or_function_are_refused() -> None:
    qconfig = ao.QConfig(act(quant_min=0, quant_max=15), WEIGHT)
    by_position = ao.QConfigMapping().set_module_name_object_type_order("fc", nn.Linear, 0, qconfig)
    by_function = ao.QConfigMapping().set_global(None).set_object_type(torch.add, qconfig)
    for mapping, message in ((by_position, "name the module"), (by_function, "fuse first")):
        with pytest.raises(ConfigError, match=message):
            qbench.prepare_qat(Block(), qconfig=mapping, example_inputs=(images(),))

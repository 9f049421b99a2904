"""Targets that put some operations out on one grid: it is imposed in training, deployed, and named in the report."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

import qbench
from qbench.errors import ConfigError
from qbench.fake_quantize import LSQ
from qbench.nn import attention
from qbench.nn import intrinsic as nni
from qbench.nn.intrinsic import qat as nniqat
from qbench.numerics.qparams import QSpec
from qbench.targets import TARGETS, FixedOutput
from tests.models import Calls, assert_exact, images, train

# What the sources in the entries of the targets say.
DEMANDS: list[tuple[str, int, nn.Module, float, int]] = [
    ("tflite", 8, nn.Sigmoid(), 1 / 256, -128),
    ("tflite", 8, nn.Softmax(1), 1 / 256, -128),
    ("tflite", 8, attention.MaskedSoftmax(), 1 / 256, -128),
    ("tflite", 8, nn.Tanh(), 1 / 128, 0),
    ("tflite", 8, attention.Normalize(), 1 / 128, 0),
    ("tflite", 8, nn.LogSoftmax(1), 16 / 256, 127),
    ("tflite_16x8", 16, nn.Sigmoid(), 1 / 32768, 0),
    ("tflite_16x8", 16, nn.Tanh(), 1 / 32768, 0),
    ("tflite_16x8", 16, nn.Softmax(1), 1 / 32768, 0),
    ("neutron", 8, nn.Sigmoid(), 1 / 256, -128),
    ("neutron", 8, nn.Softmax(1), 1 / 256, -128),
    ("neutron", 8, nn.Tanh(), 1 / 128, 0),
    ("qnn", 8, nn.Sigmoid(), 1 / 256, 0),
    ("qnn", 8, nn.Hardsigmoid(), 1 / 256, 0),
    ("qnn", 16, nn.Sigmoid(), 1 / 65536, 0),
    ("qnn", 16, nn.Hardsigmoid(), 1 / 65536, 0),
    ("qnn", 16, nn.Tanh(), 1 / 32768, 32768),
]


def prepared(function: nn.Module, target: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), function, nn.Conv2d(4, 2, 1))
    return qbench.prepare_by_target(model, target, example_inputs=(images(),), **options)


def grid(model: nn.Module, path: str) -> tuple[float, int]:
    quantizer = model.get_submodule(path).output_quantizer
    return float(quantizer.scale), int(quantizer.zero_point)


@pytest.mark.parametrize(
    ("target", "bits", "function", "scale", "zero_point"), DEMANDS, ids=lambda value: getattr(value, "__name__", None)
)
def test_the_grid_is_that_of_the_document(
    target: str, bits: int, function: nn.Module, scale: float, zero_point: int
) -> None:
    model = prepared(function, target, activation_bits=bits)
    report = qbench.preparation_report(model)
    (found,) = (module for module in report.quantized if module.output_grid is not None)
    assert (found.path, found.output_grid) == ("1", (scale, zero_point))
    assert f"output of 1: scale {scale:.6g}, zero point {zero_point}, as the target demands" in str(report)
    train(model, images(), steps=3)
    assert grid(model, "1") == (scale, zero_point)
    assert model[2].sources == (model[1].output_quantizer,)
    program = qbench.convert(model, (images(),))
    assert_exact(model, program, images(seed=3))
    quantizes = [node for node in program.graph.nodes if "decomposed.quantize_per_tensor" in str(node.target)]
    assert (scale, zero_point) in [node.args[1:3] for node in quantizes]


def test_every_entry_is_tested() -> None:
    tested = {(target, type(function).__name__, bits) for target, bits, function, *_ in DEMANDS}
    alike = {"Softmax2d": "Softmax", "Softmin": "Softmax", "MaskedSoftmax": "Softmax"}
    entries = {
        (target.name, alike.get(op, op), fixed.bits)
        for target in TARGETS for fixed in target.fixed_outputs for op in fixed.ops
    }  # fmt: skip
    assert entries <= tested


@pytest.mark.parametrize("target", ["onnxruntime", "xnnpack", "tosa", "snpe"])
def test_others_observe(target: str) -> None:
    model = prepared(nn.Sigmoid(), target)
    assert all(module.output_grid is None for module in qbench.preparation_report(model).quantized)
    assert model[1].output_quantizer.known_grid is None


def test_widths_of_which_nothing_is_said_observe() -> None:
    assert prepared(nn.Tanh(), "qnn")[1].output_quantizer.known_grid is None


@pytest.mark.parametrize("options", [{"method": "lsq"}, {"observer": "mse"}], ids=str)
def test_no_method_and_no_observer_changes_it(options: dict[str, str]) -> None:
    model = prepared(nn.Sigmoid(), "tflite", **options)
    train(model, images(), steps=3)
    assert grid(model, "1") == (1 / 256, -128)
    assert isinstance(model[0].output_quantizer, LSQ) is ("method" in options)
    assert_exact(model, qbench.convert(model, (images(),)), images(seed=3))


@pytest.mark.parametrize(
    ("spec", "expected"), [(QSpec(signed=False), (1 / 256, 0)), (QSpec(symmetric=True), (1 / 256, -128))], ids=str
)
def test_another_form_of_the_codes_still_has_that_grid(spec: QSpec, expected: tuple[float, int]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sigmoid())
    model = qbench.prepare_qat(model, qconfig=qbench.QConfig("tflite", activation=spec), example_inputs=(images(),))
    train(model, images(), steps=2)
    assert grid(model, "1") == expected
    assert_exact(model, qbench.convert(model, (images(),)), images(seed=3))


class ConvSigmoid(nni.Fused):
    part_types = (nn.Conv2d, nn.Sigmoid)


class QatConvSigmoid(nniqat.ConvReLU2d):
    float_type = ConvSigmoid
    activation = nn.Sigmoid


def test_an_activation_in_a_chain() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(ConvSigmoid(nn.Conv2d(3, 4, 3), nn.Sigmoid()), nn.Conv2d(4, 2, 1))
    model = qbench.prepare_qat(
        model, {ConvSigmoid: QatConvSigmoid}, qconfig=qbench.get_qconfig("tflite"), example_inputs=(images(),)
    )
    assert model[0].pre_activation_quantizer.known_grid is None
    train(model, images(), steps=3)
    assert grid(model, "0") == (1 / 256, -128)
    assert_exact(model, qbench.convert(model, (images(),)), images(seed=3))


CONCATS = {
    "of a gate and a layer": (lambda m, x: m.cat([m.gate(m.a(x)), m.b(x)]), ["cat"]),
    "of two gates": (lambda m, x: m.cat([m.gate(m.a(x)), m.other(m.b(x))]), []),
    "of two functions with other grids": (lambda m, x: m.cat([m.gate(m.a(x)), m.tanh(m.b(x))]), ["cat", "cat"]),
}


@pytest.mark.filterwarnings("ignore:quantizer .* has seen no data:qbench.errors.QBenchWarning")
@pytest.mark.parametrize("target", ["tflite", "tflite_16x8", "qnn"])
@pytest.mark.parametrize("method", ["fixed", "lsq"])
@pytest.mark.parametrize("name", CONCATS)
def test_a_concat(name: str, method: str, target: str) -> None:
    torch.manual_seed(0)
    way, again = CONCATS[name]
    modules = {"gate": nn.Sigmoid(), "other": nn.Sigmoid(), "tanh": nn.Tanh(), "cat": qbench.nn.Cat(1)}
    model = Calls(way, a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(3, 4, 1), **modules)
    qconfig = qbench.get_qconfig(target, method=method)
    model = qbench.prepare_qat(model, qconfig=qconfig, example_inputs=(images(),))
    if name == "of two gates" and method == "lsq":
        again = ["cat", "cat"]  # a scale that learns is not one that is known
    elif name == "of two functions with other grids" and target == "tflite_16x8":
        again = [] if method == "fixed" else again  # one grid for both
    elif name == "of two functions with other grids" and target == "qnn":
        again = ["cat"]  # that of tanh is observed
    assert [found.path for found in qbench.preparation_report(model).requantized] == again
    for path in qbench.preparation_report(model).unreached:
        del model._modules[path]
    train(model, images(), steps=3, rate=1e-3)
    demanded = qconfig.fixed_output("Sigmoid")
    assert grid(model, "gate") == demanded
    assert_exact(model, qbench.convert(model, (images(),)), images(seed=3))


FAULTS = [
    ({"fixed_outputs": (FixedOutput(("Tanh",), 1 / 128, 0, bits=16),)}, "no codes of this width"),
    ({"fixed_outputs": (FixedOutput(("Tanh",), 0.0, 0),)}, "a positive scale and a zero point among -128 … 127"),
    ({"fixed_outputs": (FixedOutput(("Tanh",), 1 / 128, 128),)}, "a zero point among -128 … 127"),
    ({"fixed_outputs": (FixedOutput((), 1 / 128, 0),)}, "operations that no other entry names"),
    (
        {"fixed_outputs": (FixedOutput(("Tanh",), 1 / 128, 0), FixedOutput(("Tanh",), 1 / 64, 0))},
        "operations that no other entry names",
    ),
]


@pytest.mark.parametrize(("change", "message"), FAULTS)
def test_an_entry_that_cannot_be_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"target mine: FixedOutput\(.*{message}"):
        dataclasses.replace(qbench.targets.get("tflite"), name="mine", **change)

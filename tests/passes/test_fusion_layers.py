"""Convolution and linear layers become integer operators with the codes of an independent reference."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from qdq_programs import INPUT, LAYERS, OPS, OUTPUT, Layer, Weight, export, fake_quantize, make_layer
from torch import Tensor, nn
from torch.nn import functional as F

from qbench.passes import FusionReport, fuse_qdq, quantize_bias


def integer_codes(layer: Layer, x: Tensor, low: int = -128, high: int = 127, fixed_point: bool = False) -> np.ndarray:
    """Codes by exact sums in float64 and one multiplier a channel: float32, or 31 bits and a shift."""
    scale, zero = np.float32(INPUT[0]), INPUT[1]
    x_codes = OPS.quantize_per_tensor.default(x, *INPUT).double() - zero
    scales = layer.weight.scales.numpy() if layer.weight.axis is not None else layer.weight.scales.numpy()[:1]
    axis = -1 if layer.call is F.linear else 1
    acc = layer.call(x_codes, layer.weight.codes.double(), None)
    step = scale * np.resize(scales, acc.shape[axis]).astype(np.float32)  # groups repeat the scales of a group
    if layer.bias is not None:
        bias = torch.from_numpy(np.rint(layer.bias.detach().double().numpy() / step.astype(np.float64)))
        acc = layer.call(x_codes, layer.weight.codes.double(), bias)
    multiplier = (step / np.float32(OUTPUT[0])).astype(np.float32)
    if fixed_point:
        ratios = np.float64(scale) * np.resize(scales, step.size).astype(np.float64) / np.float64(np.float32(OUTPUT[0]))
        rescaled = _rescale(np.moveaxis(acc.numpy().astype(np.int64), axis, -1), ratios)
        return np.clip(np.moveaxis(rescaled, -1, axis) + OUTPUT[1], low, high)
    shape = [1] * acc.ndim
    shape[axis] = -1
    scaled = np.rint(acc.numpy().astype(np.float32) * multiplier.reshape(shape)) + OUTPUT[1]
    return np.clip(scaled, low, high).astype(np.int64)


def _rescale(values: np.ndarray, ratios: np.ndarray) -> np.ndarray:
    """TOSA's RESCALE in Python's integers; channels last."""
    result = np.empty(values.shape, dtype=np.int64)
    for channel, ratio in enumerate(ratios):
        mantissa, exponent = np.frexp(ratio)
        multiplier, shift = int(np.rint(mantissa * 2**31)), 31 - int(exponent)
        for index in np.ndindex(*values.shape[:-1]):
            place = (*index, channel)
            result[place] = (int(values[place]) * multiplier + (1 << (shift - 1))) >> shift
    return result


def codes_of(values: Tensor) -> np.ndarray:
    return np.rint(values.detach().double().numpy() / np.float64(np.float32(OUTPUT[0]))).astype(np.int64) + OUTPUT[1]


def fused(model: nn.Module, *inputs: Tensor, target: str = "onnxruntime") -> tuple[Any, FusionReport]:
    program = export(model, *inputs)
    report = fuse_qdq(program, target=target)
    return program, report


def calls(program: Any) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


def _target(name: str) -> str:
    """A target that computes this layer in integers."""
    if name in ("conv_transpose1d", "conv_transpose2d"):
        return "xnnpack"
    return "tosa" if "transpose" in name else "onnxruntime"


@pytest.mark.parametrize("per_tensor", [False, True], ids=["per channel", "per tensor"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("name", LAYERS)
def test_codes_are_those_of_the_reference(name: str, bias: bool, per_tensor: bool) -> None:
    torch.manual_seed(1)
    layer, x = make_layer(name, per_tensor=per_tensor, bias=bias)
    program, report = fused(layer, x, target=_target(name))
    assert report.by_rule.keys() == {"boundary", "linear" if "linear" in name else "convolution"}, str(report)
    assert report.integer and not report.missed
    assert not [call for call in calls(program) if call.startswith("aten") or ".quantize_per" in call]
    wanted = integer_codes(layer, x, fixed_point=_target(name) == "tosa")
    assert int((codes_of(program.module()(x)) != wanted).sum()) == 0
    assert np.unique(wanted).size > min(20, wanted.size // 2)


@pytest.mark.parametrize("clamp", ["relu", "relu6", "hardtanh", "relu then relu6"])
def test_clamps_become_limits_of_the_codes(clamp: str) -> None:
    torch.manual_seed(2)
    call = {
        "relu": F.relu,
        "relu6": F.relu6,
        "hardtanh": lambda y: F.hardtanh(y, -1.0, 2.5),
        "relu then relu6": lambda y: F.relu6(F.relu(y)),
    }[clamp]
    bounds = {"relu": (0, np.inf), "relu6": (0, 6), "hardtanh": (-1, 2.5), "relu then relu6": (0, 6)}[clamp]
    plain, x = make_layer("conv2d")
    layer = Layer(lambda x, w, b: call(F.conv2d(x, w, b)), (5, 4, 3, 3), 5)
    layer.load_state_dict(plain.state_dict())
    program, report = fused(layer, x)
    low, high = (np.clip(np.rint(bound / OUTPUT[0]) + OUTPUT[1], -128, 127) for bound in bounds)
    assert report.integer
    assert int((codes_of(program.module()(x)) != integer_codes(plain, x, low, high)).sum()) == 0


@pytest.mark.parametrize(
    ("name", "target", "reason"),
    [
        ("conv_transpose2d", "onnxruntime", "ConvTranspose"),
        ("conv3d", "xnnpack", "no convolution of three dimensions"),
        ("conv_transpose2d grouped", "xnnpack", "with groups"),
    ],
)
def test_a_layer_that_the_runtime_computes_in_float_stays_in_float(name: str, target: str, reason: str) -> None:
    layer, x = make_layer(name)
    _, report = fused(layer, x, target=target)
    assert not report.integer and reason in str(report)


def test_a_ratio_that_the_runtime_does_not_take_is_refused() -> None:
    layer, x = make_layer("conv2d")
    layer.weight.scales *= 0
    layer.weight.scales += 256 * OUTPUT[0] / INPUT[0] * 1.001
    _, report = fused(layer, x, target="xnnpack")
    assert "s_in·s_w / s_out is 256.3, and xnnpack takes 0 up to 256" in str(report)
    assert fused(layer, x, target="onnxruntime")[1].integer


def test_a_second_run_changes_nothing() -> None:
    layer, x = make_layer("conv2d")
    program, report = fused(layer, x)
    before = str(program.graph)
    again = fuse_qdq(program, target="onnxruntime")
    assert report.modified and not again.modified and not again.fused and not again.missed
    assert str(program.graph) == before


def test_a_graph_module_fuses_as_its_program_does() -> None:
    layer, x = make_layer("conv2d")
    program, _ = fused(layer, x)
    module = export(layer, x).module()
    report = fuse_qdq(module, target="onnxruntime")
    assert report.by_rule == {"boundary": 1, "convolution": 1}
    assert torch.equal(module(x), program.module()(x))


class SharedWeight(nn.Module):
    """One weight read by two convolutions with different inputs, one output read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = Weight((4, 4, 3, 3))
        self.bias = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weight = self.weight()
        first = fake_quantize(F.conv2d(fake_quantize(x), weight, self.bias), (0.05, 4, -128, 127, torch.int8))
        second = fake_quantize(F.conv2d(first, weight, self.bias), OUTPUT)
        return first, second


def test_shared_weights_and_several_readers() -> None:
    torch.manual_seed(3)
    model, x = SharedWeight(), torch.randn(2, 4, 9, 9)
    program, report = fused(model, x)
    assert report.by_rule == {"boundary": 1, "convolution": 2} and report.integer
    assert len(program.state_dict) == 4  # codes and scales stay shared; a bias for each scale
    for ours, float_form in zip(program.module()(x), model(x), strict=True):
        assert ours.shape == float_form.shape
        assert float((ours - float_form).abs().max()) < 0.12


def test_two_quantizers_behind_one_layer() -> None:
    class Twice(Layer):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            y = self.call(fake_quantize(x), self.weight(), self.bias)
            return fake_quantize(y, OUTPUT), fake_quantize(F.relu(y), (0.07, -128, -128, 127, torch.int8))

    torch.manual_seed(4)
    call, shape, channels, size, axis = LAYERS["conv2d"]
    model, x = Twice(call, shape, channels, axis), torch.randn(size)
    program, report = fused(model, x)
    assert report.integer and calls(program).count("qbench.conv2d_q8ta_q8csw_q8to.default") == 2
    first, second = program.module()(x)
    assert int((codes_of(first) != integer_codes(model, x)).sum()) == 0
    assert float(second.detach().min()) == 0.0


# name: (model, words of the reason)
def _refused() -> dict[str, tuple[nn.Module, str]]:
    call, shape, channels, _, axis = LAYERS["conv2d"]

    class FloatReader(Layer):
        def forward(self, x: Tensor) -> Tensor:
            y = self.call(fake_quantize(x), self.weight(), self.bias)
            return fake_quantize(y, OUTPUT) + y

    class FloatInput(Layer):
        def forward(self, x: Tensor) -> Tensor:
            return fake_quantize(self.call(torch.exp(x), self.weight(), self.bias), OUTPUT)

    class WeightZeroPoint(Layer):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.weight.zero_points += 3

    class Wide(Layer):
        def forward(self, x: Tensor) -> Tensor:
            y = self.call(fake_quantize(x, (0.001, 0, -(2**15), 2**15 - 1, torch.int16)), self.weight(), self.bias)
            return fake_quantize(y, OUTPUT)

    class FloatWeight(Layer):
        def forward(self, x: Tensor) -> Tensor:
            return fake_quantize(self.call(fake_quantize(x), self.weight() * 2.0, self.bias), OUTPUT)

    class NoOutput(Layer):
        def forward(self, x: Tensor) -> Tensor:
            return self.call(fake_quantize(x), self.weight(), self.bias)

    class EvenSame(Layer):
        def forward(self, x: Tensor) -> Tensor:
            y = F.conv2d(fake_quantize(x), self.weight()[:, :, :2, :2], self.bias, padding="same")
            return fake_quantize(y, OUTPUT)

    arguments = (call, shape, channels, axis)
    return {
        "a float reader": (FloatReader(*arguments), r"its float value is read by aten::add \(add\)"),
        "a float input": (FloatInput(*arguments), r"its input is in float: aten::exp \(exp\)"),
        "a zero point of the weight": (WeightZeroPoint(*arguments), "its weight has a zero point that is not 0"),
        "wide codes": (Wide(*arguments), "the codes of its input are torch.int16"),
        "a computed weight": (FloatWeight(*arguments), "its weight is not a view of a dequantized one: aten::mul"),
        "no quantizer behind": (NoOutput(*arguments), "its float value is read by output"),
        "an even kernel": (EvenSame(*arguments), 'padding="same" of an even kernel'),
    }


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("case", _refused())
def test_a_refusal_names_the_node_and_leaves_the_values(case: str) -> None:
    model, reason = _refused()[case]
    x = torch.randn(2, 4, 8, 8)
    program = export(model, x)
    reference = export(model, x)
    quantize_bias(reference)
    report = fuse_qdq(program, target="onnxruntime")
    (miss,) = [miss for miss in report.missed if "conv2d" in miss.op]
    assert re.search(reason, miss.reason), miss.reason
    assert miss.node == "conv2d" and str(miss).startswith("conv2d (aten.conv2d")
    assert not report.integer
    assert any("conv2d" in entry.op and entry.reason == miss.reason for entry in report.left_float)
    # Only the division of the input's quantizer may move a tie.
    different = (program.module()(x) != reference.module()(x)).float().mean()
    assert float(different) < 0.05

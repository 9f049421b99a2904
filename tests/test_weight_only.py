"""Weight-only quantization, from the qconfig to the program: activations and biases stay float."""

from __future__ import annotations

import copy
import io
import pickle
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qbench
from qbench.errors import ConfigError, NumericsError
from qbench.fake_quantize import FakeQuantize
from qbench.nn import intrinsic as nni
from qbench.nn.qat.layer import QatLayer
from qbench.numerics.qparams import QSpec

IN, HIDDEN, OUT = 32, 48, 10

CONFIGS: dict[str, Callable[[], qbench.QConfig]] = {
    "int8 per channel": lambda: qbench.get_qconfig(activation_bits=None),
    "int4 per channel": lambda: qbench.get_qconfig(activation_bits=None, weight_bits=4),
    "int8 groups of 16": lambda: qbench.get_qconfig(activation_bits=None, group_size=16),
    "int4 groups of 8": lambda: qbench.get_qconfig("xnnpack", activation_bits=None, weight_bits=4, group_size=8),
    "int4 [-8, 7]": lambda: _config(QSpec(bits=4, symmetric=True, axis=0)),
    "uint4 groups": lambda: _config(QSpec(bits=4, signed=False, axis=0, group_size=16)),
    "int8 per tensor": lambda: _config(QSpec(bits=8, symmetric=True)),
    "int4 power of two": lambda: _config(QSpec(bits=4, symmetric=True, axis=0, power_of_two=True)),
}
GROUPS = {"int8 groups of 16": 16, "int4 groups of 8": 8, "uint4 groups": 16}


def _config(weight: QSpec, **options: Any) -> qbench.QConfig:
    return qbench.QConfig(activation=None, weight=weight, **options)


def dense() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(IN, HIDDEN),
        nn.BatchNorm1d(HIDDEN),
        nn.ReLU(),
        nn.Linear(HIDDEN, HIDDEN),
        nn.ReLU(),
        nn.Linear(HIDDEN, HIDDEN),
        nn.Hardswish(),
        nn.Linear(HIDDEN, OUT, bias=False),
    )


def convolutional() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8, padding=1, padding_mode="reflect"),
        nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(6 * 64, OUT),
    )


def vectors(count: int = 64) -> Tensor:
    return torch.randn(count, IN)


def images(count: int = 8) -> Tensor:
    return torch.randn(count, 3, 8, 8)


def prepared(model: nn.Module, qconfig: qbench.QConfig, x: Tensor) -> nn.Module:
    return qbench.prepare_qat(qbench.fuse(model, example_inputs=(x,)), qconfig=qconfig, example_inputs=(x,))


def trained(model: nn.Module, make: Callable[[], Tensor], steps: int = 12) -> nn.Module:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        y = model(make())
        nn.functional.cross_entropy(y, torch.randint(0, OUT, (len(y),))).backward()
        optimizer.step()
    return model.eval()


def layers(model: nn.Module) -> dict[str, QatLayer]:
    return {name: m for name, m in model.named_modules() if isinstance(m, QatLayer)}


def quantizers(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, FakeQuantize)]


def operators(program: torch.export.ExportedProgram) -> Counter[str]:
    return Counter(n.target._schema.name for n in program.graph.nodes if n.op == "call_function")


def bits(x: Tensor) -> Tensor:
    return x.detach().contiguous().view(torch.int32)


def assert_equal(model: nn.Module, program: torch.export.ExportedProgram, x: Tensor) -> None:
    """Trained codes are the program's codes, and what the model computes in eval is what the program computes."""
    for path, layer in layers(model).items():
        codes = layer.parameter_codes()
        assert int((program.state_dict[f"{path}.weight_codes"] != codes.weight).sum()) == 0
        if codes.bias_value is None:
            assert f"{path}.bias" not in program.state_dict
        else:
            assert torch.equal(bits(program.state_dict[f"{path}.bias"]), bits(codes.bias_value))
    with torch.no_grad():
        expected, found = model(x), program.module()(x)
    assert found.numel() >= 1000 or len(found.unique()) > 100
    assert int((found != expected).sum()) == 0  # fake-quantize may give −0.0 for +0.0


def rounded_groups(weight: np.ndarray, size: int, qmax: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of groups, written a second time."""
    parts = weight.astype(np.float32).reshape(len(weight), -1, size)
    scale = (np.abs(parts).max(-1) / np.float32(qmax)).astype(np.float32)
    codes = np.rint(parts * (np.float32(1) / scale)[..., None]).clip(-qmax, qmax)
    return codes.reshape(weight.shape).astype(np.int8), scale


class TestTraining:
    @pytest.mark.parametrize("name", CONFIGS)
    def test_there_is_no_quantizer_but_those_of_weights(self, name: str) -> None:
        model = prepared(dense(), CONFIGS[name](), vectors())
        assert set(quantizers(model)) == {f"{path}.weight_quantizer" for path in layers(model)}
        assert len(layers(model)) == 4
        assert all(layer.sources is None and layer.bias_quantizer is None for layer in layers(model).values())
        report = qbench.preparation_report(model)
        assert not report.float_inputs and not report.unreached and not report.float_operations
        assert all(found.weight_only for found in report.quantized)
        assert "4 of them in their weight only: input, output and bias stay float" in str(report)

    @pytest.mark.parametrize(("bits_", "size"), [(8, 16), (4, 8), (4, 16)])
    def test_the_error_of_the_weight_and_nothing_else(self, bits_: int, size: int) -> None:
        torch.manual_seed(2)
        layer = qbench.nn.qat.Linear(
            IN, OUT, qconfig=qbench.get_qconfig(activation_bits=None, weight_bits=bits_, group_size=size)
        ).train()
        codes, scale = rounded_groups(layer.weight.detach().numpy(), size, 2 ** (bits_ - 1) - 1)
        hat = torch.from_numpy(codes.astype(np.float32) * np.repeat(scale, size, axis=1))
        x, gradient = vectors().requires_grad_(), torch.randn(64, OUT)
        y = layer(x)
        assert torch.equal(y, nn.functional.linear(x, hat, layer.bias))
        y.backward(gradient)
        # straight through: the weight's gradient is that of a float layer, the input's sees the quantized weight
        assert layer.weight.grad is not None and x.grad is not None and layer.bias is not None
        assert torch.allclose(layer.weight.grad, gradient.t() @ x.detach(), rtol=1e-5, atol=1e-5)
        assert torch.allclose(x.grad, gradient @ hat, rtol=1e-5, atol=1e-5)
        assert torch.allclose(layer.bias.grad, gradient.sum(0), rtol=1e-5, atol=1e-5)
        found = layer.parameter_codes()
        assert np.array_equal(found.weight.numpy(), codes)
        assert np.array_equal(found.weight_qparams.scale.numpy(), scale)
        assert found.bias is None and found.bias_scale is None and found.bias_saturated is None
        assert found.bias_value is not None and torch.equal(found.bias_value, layer.bias)

    def test_batch_norm_normalises_what_the_quantized_weight_gives(self) -> None:
        torch.manual_seed(3)
        bn = nn.BatchNorm1d(OUT)
        nn.init.normal_(bn.weight)
        wrapper = nni.LinearBn1d(nn.Linear(IN, OUT), bn)
        layer = qbench.nn.intrinsic.qat.LinearBn1d.from_float(
            copy.deepcopy(wrapper), qbench.get_qconfig(activation_bits=None, weight_bits=4, group_size=8)
        ).train()
        codes, scale = rounded_groups(wrapper[0].weight.detach().numpy(), 8, 7)
        hat = torch.from_numpy(codes.astype(np.float32) * np.repeat(scale, 8, axis=1))
        x = vectors()
        expected = bn.train()(nn.functional.linear(x, hat, wrapper[0].bias))
        assert torch.equal(layer(x), expected)
        layer.eval()
        factor = bn.weight / torch.sqrt(bn.running_var + bn.eps)
        signed = codes * np.sign(factor.detach().numpy())[:, None].astype(np.int8)
        assert np.array_equal(layer.parameter_codes().weight.numpy(), signed)
        with torch.no_grad():
            assert torch.allclose(layer(x), bn.eval()(nn.functional.linear(x, hat, wrapper[0].bias)), atol=1e-5)

    def test_switching_fake_quant_off_gives_the_float_layer(self) -> None:
        torch.manual_seed(4)
        linear = nn.Linear(IN, OUT)
        layer = qbench.nn.qat.Linear.from_float(linear, qbench.get_qconfig(activation_bits=None, weight_bits=4))
        x = vectors()
        assert not torch.equal(layer(x), linear(x))
        layer.apply(qbench.disable_fake_quant)
        assert torch.equal(layer(x), linear(x))
        with pytest.raises(NumericsError, match="enable_fake_quant"):
            layer.parameter_codes()


class TestConversion:
    @pytest.mark.parametrize("name", CONFIGS)
    def test_no_code_and_no_value_differs(self, name: str) -> None:
        torch.manual_seed(5)
        model = trained(prepared(dense(), CONFIGS[name](), vectors()), vectors)
        x = vectors(256)
        program = qbench.convert(model, (x,))
        assert_equal(model, program, x)
        kind = "tensor" if name == "int8 per tensor" else "channel_group" if name in GROUPS else "channel"
        counts = operators(program)
        assert counts[f"quantized_decomposed::dequantize_per_{kind}"] == 4
        assert sum(count for op, count in counts.items() if "quantize" in op) == 4
        assert counts["aten::linear"] == 4
        custom = program.graph_module.meta["custom"]["qbench"]
        assert custom["weight_only"] == list(layers(model))

    @pytest.mark.parametrize("weight_bits", [8, 4])
    def test_convolutions_stay_float_behind_dequantized_weights(self, weight_bits: int) -> None:
        torch.manual_seed(6)
        config = qbench.get_qconfig(activation_bits=None, weight_bits=weight_bits)
        model = trained(prepared(convolutional(), config, images()), images)
        assert not any(isinstance(m, qbench.nn.qat.AvgPool2d) for m in model.modules())
        x = images(16)
        program = qbench.convert(model, (x,))
        assert_equal(model, program, x)
        assert operators(program)["quantized_decomposed::dequantize_per_channel"] == 4
        codes = layers(model)["0"].parameter_codes().weight
        assert len(codes.unique()) > 2 ** (weight_bits - 1)

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["int8 per channel", "int4 groups of 8"])
    def test_verify_in_a_fresh_process(self, name: str) -> None:
        torch.manual_seed(5)
        model = trained(prepared(dense(), CONFIGS[name](), vectors()), vectors)
        x = vectors(256)
        found = qbench.verify(model, qbench.convert(model, (x,)), (x,), runtimes=())
        assert found.mismatches == {"parameters": 0, "eval_vs_program": 0} and all(found.exact.values())
        weights = IN * HIDDEN + 2 * HIDDEN * HIDDEN + HIDDEN * OUT
        assert found.comparisons["parameters"].compared == weights + 3 * HIDDEN

    def test_the_bias_is_stored_as_trained_and_not_shared(self) -> None:
        torch.manual_seed(7)
        model = trained(prepared(dense(), CONFIGS["int4 groups of 8"](), vectors()), vectors)
        program = qbench.convert(model, (vectors(),))
        stored = [value for name, value in program.state_dict.items() if name.endswith("bias")]
        last = layers(model)["5"].bias
        assert last is not None and any(torch.equal(value, last) for value in stored if value.shape == last.shape)
        before = [value.clone() for value in stored]
        with torch.no_grad():
            last.add_(1)
        assert all(torch.equal(value, old) for value, old in zip(stored, before, strict=True))
        report = qbench.conversion_report(model)
        assert all(layer.largest_bias_code is None and layer.accumulator is None for layer in report.layers)
        assert str(report).count("float") == 2 * len(report.layers)

    def test_a_saved_program_is_the_same(self) -> None:
        torch.manual_seed(8)
        model = trained(prepared(dense(), CONFIGS["int4 groups of 8"](), vectors()), vectors)
        x = vectors()
        program = qbench.convert(model, (x,))
        stream = io.BytesIO()
        torch.export.save(program, stream)
        stream.seek(0)
        loaded = torch.export.load(stream)
        with torch.no_grad():
            assert torch.equal(bits(loaded.module()(x)), bits(model(x)))

    def test_a_batch_of_any_size_and_a_sequence(self) -> None:
        torch.manual_seed(9)
        model = nn.Sequential(nn.Linear(IN, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, OUT))
        x = torch.randn(4, 7, IN)
        model = trained(prepared(model, CONFIGS["int4 groups of 8"](), x), lambda: torch.randn(4, 7, IN)[:, 0])
        program = qbench.convert(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        for batch in (4, 9):
            y = torch.randn(batch, 7, IN)
            with torch.no_grad():
                assert torch.equal(program.module()(y), model(y))


class TestMixed:
    """Some modules weight-only, others in full."""

    @staticmethod
    def model(weight_only: tuple[int, ...]) -> nn.Module:
        torch.manual_seed(10)
        model = nn.Sequential(*[nn.Linear(IN, IN) for _ in range(3)], nn.Linear(IN, OUT))
        for index in weight_only:
            model[index].qconfig = qbench.get_qconfig(activation_bits=None, weight_bits=4, group_size=8)
        return qbench.prepare_qat(model, qconfig=qbench.get_qconfig(), example_inputs=(vectors(),))

    @pytest.mark.parametrize("weight_only", [(0,), (1,), (3,), (1, 2), (0, 2)])
    def test_nothing_differs(self, weight_only: tuple[int, ...]) -> None:
        model = trained(self.model(weight_only), vectors)
        full = [index for index in range(4) if index not in weight_only]
        x = vectors(256)
        program = qbench.convert(model, (x,))
        assert_equal(model, program, x)
        # a layer in full quantizes its output, and its input where no such layer stands before it
        inputs = [index for index in full if index - 1 not in full]
        counts = operators(program)
        assert counts["quantized_decomposed::quantize_per_tensor"] == len(full) + len(inputs)
        assert counts["quantized_decomposed::dequantize_per_channel_group"] == len(weight_only)
        for index in inputs:
            assert f"{index}.input_quantizers.0" in quantizers(model)

    def test_the_report_says_why_an_input_is_quantized_at_its_consumer(self) -> None:
        report = qbench.preparation_report(self.model((1,)))
        origins = {found.path: (found.origin, found.name) for found in report.float_inputs}
        assert origins == {"0": ("input", ""), "2": ("weight_only", "Linear")}
        assert "the Linear before it quantizes its weight only" in str(report)
        assert "1 of them in their weight only" in str(report)


class TestState:
    @pytest.mark.parametrize("name", ["int8 per channel", "int4 groups of 8", "uint4 groups"])
    def test_state_dict_deepcopy_and_pickle(self, name: str) -> None:
        torch.manual_seed(11)
        model = trained(prepared(dense(), CONFIGS[name](), vectors()), vectors)
        x = vectors()
        fresh = prepared(dense(), CONFIGS[name](), vectors())
        fresh.load_state_dict(model.state_dict())
        for other in (fresh.eval(), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(bits(other(x)), bits(model(x)))
            for path, layer in layers(model).items():
                assert torch.equal(layers(other)[path].parameter_codes().weight, layer.parameter_codes().weight)

    @pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo, of its own doing
    def test_compiled_in_one_graph(self) -> None:
        torch.manual_seed(12)
        model = prepared(dense(), CONFIGS["int4 groups of 8"](), vectors()).eval()
        x = vectors()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        with torch.no_grad():
            assert torch.equal(compiled(x), model(x))

    def test_back_to_float(self) -> None:
        model = prepared(dense(), CONFIGS["int4 per channel"](), vectors())
        linear = layers(model)["7"].to_float()
        assert type(linear) is nn.Linear and linear.bias is None
        assert torch.equal(linear.weight, layers(model)["7"].weight)


REFUSED: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "hardware without floats": (
        lambda: qbench.get_qconfig("tosa", activation_bits=None),
        ConfigError,
        "target tosa computes on integers alone.*activation_bits=8.*onnxruntime, xnnpack",
    ),
    "groups with quantized activations": (
        lambda: qbench.get_qconfig(group_size=32),
        ConfigError,
        r"per group of 32.*get_qconfig\(activation_bits=None, group_size=32\)",
    ),
    "groups of activations": (
        lambda: qbench.QConfig(activation=QSpec(axis=0, group_size=32)),
        ConfigError,
        "an activation has one scale",
    ),
    "a bias with a grid": (
        lambda: qbench.get_qconfig(activation_bits=None, bias_bits=16),
        ConfigError,
        "bias int16.*activation=None.*stays float",
    ),
    "a width that the target has not": (
        lambda: qbench.get_qconfig(activation_bits=None, weight_bits=16),
        ConfigError,
        "weight of 16 bits.*weight_bits=8",
    ),
    "an activation quantizer": (
        lambda: qbench.get_qconfig(activation_bits=None).make_activation(),
        ConfigError,
        "activations stay float",
    ),
    "groups that do not divide": (
        lambda: prepared(dense(), qbench.get_qconfig(activation_bits=None, group_size=20), vectors()),
        NumericsError,
        "0: group_size=20 does not divide the 32 input features.*group_size=16 is the nearest",
    ),
    "groups in a convolution": (
        lambda: prepared(convolutional(), qbench.get_qconfig(activation_bits=None, group_size=4), images()),
        NumericsError,
        r"0: a weight of shape \(8, 3, 3, 3\) has no groups.*group_size=None.*0.qconfig",
    ),
    "groups in a layer made by hand": (
        lambda: qbench.nn.qat.Linear(30, 4, qconfig=qbench.get_qconfig(activation_bits=None, group_size=8)),
        NumericsError,
        "group_size=8 does not divide the 30 input features.*group_size=6",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_the_way_out(case: str) -> None:
    make, kind, message = REFUSED[case]
    with pytest.raises(kind, match=message):
        make()


def test_a_refused_group_size_leaves_the_model_whole() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 30), nn.Linear(30, 2))
    with pytest.raises(NumericsError, match="2: group_size=16 does not divide the 30"):
        qbench.prepare_qat(model, inplace=True, qconfig=qbench.get_qconfig(activation_bits=None, group_size=16))
    assert [type(m) for m in model] == [nn.Linear] * 3


def test_a_weight_that_is_not_finite() -> None:
    model = prepared(dense(), CONFIGS["int4 groups of 8"](), vectors())
    with torch.no_grad():
        layers(model)["3"].weight[0, 0] = float("nan")
    with pytest.raises(NumericsError, match=r"3\.weight.*finite"):
        qbench.convert(model, (vectors(),))


def test_what_a_qconfig_says() -> None:
    config = qbench.get_qconfig(activation_bits=None, weight_bits=4, group_size=32)
    assert config.weight_only and config.activation is None and config.weight_spec.group_size == 32
    assert "int4 symmetric per group of 32" in str(config) and "activation and bias in float" in str(config)
    assert not qbench.get_qconfig().weight_only

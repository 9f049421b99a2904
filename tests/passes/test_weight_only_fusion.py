"""Weight-only and dynamic linear layers become operators on codes; what nearly matches says why not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from qdq_programs import OPS, export, fake_quantize
from torch import Tensor, nn
from torch.nn import functional as F

import qbench
from qbench.numerics.int4 import unpack_int4
from qbench.passes import fuse_qdq, quantize_bias

IN, OUT = 24, 10
GROUP = 8


class Stored(nn.Module):
    """Weight codes behind the dequantize operator that its scales ask for: (), (out,) or (out, in/GROUP)."""

    def __init__(self, low: int, high: int, scales: tuple[int, ...] = (OUT,), rows: int = OUT) -> None:
        super().__init__()
        self.limits = (low, high, torch.int8)
        self.axis = 0
        self.register_buffer("codes", torch.randint(low, high + 1, (rows, IN), dtype=torch.int8))
        self.register_buffer("scales", torch.rand(scales) * 0.02 + 0.001)
        self.register_buffer("zero_points", torch.zeros(scales, dtype=torch.int64))

    def forward(self) -> Tensor:
        if self.scales.ndim == 2:
            tail = (*self.limits, GROUP, torch.float32)
            return OPS.dequantize_per_channel_group.default(self.codes, self.scales, self.zero_points, *tail)
        if self.scales.ndim == 0:
            return OPS.dequantize_per_tensor.default(self.codes, 0.02, 0, *self.limits)
        return OPS.dequantize_per_channel.default(self.codes, self.scales, self.zero_points, self.axis, *self.limits)


class Linear(nn.Module):
    def __init__(self, stored: Stored, bias: bool = True) -> None:
        super().__init__()
        self.stored = stored
        self.bias = nn.Parameter(torch.randn(len(stored.codes)), requires_grad=False) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.input(x), self.stored(), self.bias)

    def input(self, x: Tensor) -> Tensor:
        return x


class Rows(Linear):
    """Activations quantized per token, as ExecuTorch's 4-bit linear layers do it."""

    choose: Any = OPS.choose_qparams_per_token_asymmetric.default
    limits = (-128, 127, torch.int8)
    other_zero = False

    def input(self, x: Tensor) -> Tensor:
        scale, zero = self.choose(x, torch.int8)
        q = OPS.quantize_per_token.default(x, scale, zero, *self.limits)
        zero = zero + 1 if self.other_zero else zero
        return OPS.dequantize_per_token.default(q, scale, zero, *self.limits, torch.float32)


class Product(Linear):
    """A decomposed linear layer."""

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return torch.mm(x, self.stored().t())
        return torch.addmm(self.bias, x, self.stored().t())


class Columns(Linear):
    """Codes stored as (in, out)."""

    def __init__(self, stored: Stored, bias: bool = True) -> None:
        super().__init__(stored, bias)
        stored.codes = stored.codes.t().contiguous()
        stored.axis = 1
        self.bias = nn.Parameter(torch.randn(OUT), requires_grad=False) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return torch.mm(x, self.stored()) if self.bias is None else torch.addmm(self.bias, x, self.stored())


def calls(program: Any) -> list[str]:
    return [node.target._schema.name for node in program.graph.nodes if node.op == "call_function"]


def run(program: Any, x: Tensor) -> Tensor:
    module = program.module() if isinstance(program, torch.export.ExportedProgram) else program
    with torch.no_grad():
        return module(x)


CASES: dict[str, tuple[Callable[[bool], nn.Module], str]] = {
    "8 bits": (lambda b: Linear(Stored(-128, 127), b), "linear_qcs8w"),
    "8 bits narrow": (lambda b: Linear(Stored(-127, 127), b), "linear_qcs8w"),
    "5 bits": (lambda b: Linear(Stored(-16, 15), b), "linear_qcs8w"),
    "4 bits": (lambda b: Linear(Stored(-8, 7), b), "linear_qcs4w"),
    "4 bits narrow": (lambda b: Linear(Stored(-7, 7), b), "linear_qcs4w"),
    "2 bits": (lambda b: Linear(Stored(-2, 1), b), "linear_qcs4w"),
    "groups": (lambda b: Linear(Stored(-8, 7, (OUT, IN // GROUP)), b), "linear_q4gsw"),
    "per tensor": (lambda b: Linear(Stored(-128, 127, ()), b), "linear_qcs8w"),
    "4 bits per tensor": (lambda b: Linear(Stored(-8, 7, ()), b), "linear_qcs4w"),
    "a product": (lambda b: Product(Stored(-128, 127), b), "linear_qcs8w"),
    "a product in 4 bits": (lambda b: Product(Stored(-8, 7), b), "linear_qcs4w"),
    "a product of groups": (lambda b: Product(Stored(-8, 7, (OUT, IN // GROUP)), b), "linear_q4gsw"),
    "a product per tensor": (lambda b: Product(Stored(-128, 127, ()), b), "linear_qcs8w"),
}


@pytest.mark.parametrize("form", ["program", "graph module"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("name", CASES)
def test_fused_without_a_changed_value(name: str, bias: bool, form: str) -> None:
    torch.manual_seed(1)
    make, operator = CASES[name]
    x = torch.randn(50, IN)
    program: Any = export(make(bias), x)
    program = program if form == "program" else program.module()
    before = run(program, x)
    report = fuse_qdq(program, target="onnxruntime")
    assert report.by_rule["weight-only linear"] == 1 and not report.left_float, str(report)
    assert not {miss.node for miss in report.missed} & {node.name for node in program.graph.nodes}
    assert calls(program) == [f"qbench::{operator}"]
    assert int((run(program, x) != before).sum()) == 0 and len(before.unique()) > 400
    again = fuse_qdq(program, target="onnxruntime")
    assert not again.fused and int((run(program, x) != before).sum()) == 0


def test_the_packed_weight_takes_the_place_of_the_codes() -> None:
    torch.manual_seed(2)
    model = Linear(Stored(-8, 7))
    program = export(model, torch.randn(3, IN))
    fuse_qdq(program, target="onnxruntime")
    assert "stored.codes" not in program.state_dict and "stored.zero_points" not in program.state_dict
    packed = program.state_dict["stored_codes_packed"]
    assert packed.dtype == torch.uint8 and packed.shape == (OUT, IN // 2)
    assert torch.equal(unpack_int4(packed, IN), model.stored.codes)
    assert torch.equal(program.state_dict["stored.scales"], model.stored.scales)


@pytest.mark.parametrize("form", ["program", "graph module"])
def test_a_shared_weight_is_packed_once(form: str) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = Linear(Stored(-8, 7, rows=IN, scales=(IN,)))
            self.second = Linear(self.first.stored, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.sin(self.first(x))) + F.linear(x, self.first.stored())

    torch.manual_seed(3)
    x = torch.randn(5, IN)
    program: Any = export(Twice(), x)
    program = program if form == "program" else program.module()
    before = run(program, x)
    assert fuse_qdq(program, target="onnxruntime").by_rule == {"weight-only linear": 3}
    nodes = [node for node in program.graph.nodes if node.target == torch.ops.qbench.linear_qcs4w.default]
    assert len({node.args[1] for node in nodes}) == 1 and len({node.args[2] for node in nodes}) == 1
    assert torch.equal(run(program, x), before)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_dynamic(bias: bool) -> None:
    torch.manual_seed(4)
    x = torch.randn(6, 50, IN)
    program = export(Rows(Stored(-8, 7), bias), x)
    before = run(program, x)
    report = fuse_qdq(program, target="xnnpack")
    assert report.by_rule == {"dynamic linear": 1} and not report.left_float, str(report)
    assert calls(program) == ["qbench::linear_dq8ca_qcs4w"]
    # sums of integers for sums of rounded floats: last bits may differ
    torch.testing.assert_close(run(program, x), before, rtol=1e-5, atol=1e-5)


def rows(change: Callable[[Rows], None], *stored: Any) -> nn.Module:
    model = Rows(Stored(*(stored or (-8, 7))))
    change(model)
    return model


def with_stored(model: Linear, change: Callable[[Stored], None]) -> nn.Module:
    change(model.stored)
    return model


class InHalf(Linear):
    def forward(self, x: Tensor) -> Tensor:
        weight = OPS.dequantize_per_channel.default(
            self.stored.codes, self.stored.scales, None, 0, *self.stored.limits, out_dtype=torch.float16
        )
        return F.linear(x.half(), weight).float()


class Moving(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, OPS.dequantize_per_channel.default(*self.parts(x)), self.bias)

    def parts(self, x: Tensor) -> tuple[Any, ...]:
        stored = self.stored
        return stored.codes, stored.scales * x.abs().max(), stored.zero_points, 0, *stored.limits


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "groups in 8 bits": (lambda: Linear(Stored(-128, 127, (OUT, IN // GROUP))), r"\[-128, 127\] and a scale per group"),
    "a zero point": (
        lambda: with_stored(Linear(Stored(-8, 7)), lambda s: s.zero_points.add_(2)),
        "its weight has a zero point that is not 0",
    ),
    "half precision": (lambda: InHalf(Stored(-128, 127), False), "its input is torch.float16.*take float32"),
    "columns": (lambda: Columns(Stored(-128, 127)), r"lies in memory as \(in, out\)"),
    "columns in 4 bits": (lambda: Columns(Stored(-8, 7), False), r"lies in memory as \(in, out\)"),
    "a scale that is computed": (lambda: Moving(Stored(-128, 127)), "its weight is not known before the program runs"),
    "rows with a weight of 8 bits": (lambda: Rows(Stored(-128, 127)), r"codes \[-128, 127\].*weights of 4 bits"),
    "rows with groups": (lambda: Rows(Stored(-8, 7, (OUT, IN // GROUP))), "per token and .* scales per group"),
    "rows on other grids": (
        lambda: rows(lambda m: setattr(m, "other_zero", True)),
        "is quantized on other grids",
    ),
    "rows with fewer codes": (lambda: rows(lambda m: setattr(m, "limits", (-8, 7, torch.int8))), r"codes \[-8, 7\]"),
    "symmetric rows": (
        lambda: rows(lambda m: setattr(m, "choose", OPS.choose_qparams_per_token.default)),
        "not what choose_qparams_per_token_asymmetric finds",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_reason(name: str) -> None:
    torch.manual_seed(5)
    make, reason = REFUSED[name]
    x = torch.randn(7, IN)
    program = export(make(), x)
    before = run(program, x)
    report = fuse_qdq(program, target="onnxruntime")
    assert not report.fused and len(report.missed) >= 1
    with pytest.raises(AssertionError, match=reason):  # pytest's own matcher, so that a miss shows the reasons
        raise AssertionError("; ".join(miss.reason for miss in report.missed))
    assert torch.equal(run(program, x), before)


def test_a_layer_with_quantized_activations_is_left_to_the_integer_rules() -> None:
    class FloatOutput(Linear):
        def input(self, x: Tensor) -> Tensor:
            return fake_quantize(x)

    torch.manual_seed(6)
    report = fuse_qdq(export(FloatOutput(Stored(-127, 127)), torch.randn(4, IN)), target="onnxruntime")
    assert "weight-only linear" not in report.by_rule
    assert {rule for miss in report.missed for rule, _ in miss.reasons} == {"linear"}


class TestTrained:
    """From the qconfig to the operators."""

    @pytest.mark.parametrize(
        ("bits", "size", "operator"),
        [(8, None, "linear_qcs8w"), (4, None, "linear_qcs4w"), (4, 8, "linear_q4gsw"), (4, 16, "linear_q4gsw")],
    )
    def test_a_model(self, bits: int, size: int | None, operator: str) -> None:
        torch.manual_seed(7)
        model = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 48), nn.BatchNorm1d(48), nn.Linear(48, 9))
        x = torch.randn(64, 32)
        config = qbench.get_qconfig(activation_bits=None, weight_bits=bits, group_size=size)
        model = qbench.prepare_qat(qbench.fuse(model, example_inputs=(x,)), qconfig=config, example_inputs=(x,))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for _ in range(8):
            optimizer.zero_grad()
            F.cross_entropy(model(torch.randn(64, 32)), torch.randint(0, 9, (64,))).backward()
            optimizer.step()
        model.eval()
        program = qbench.convert(model, (x,))
        report = fuse_qdq(program)
        assert report.by_rule == {"weight-only linear": 3}
        assert calls(program).count(f"qbench::{operator}") == 3
        with torch.no_grad():
            expected = model(x)
        assert int((run(program, x) != expected).sum()) == 0 and len(expected.unique()) > 400

    def test_a_mixed_model_keeps_the_float_bias_of_its_weight_only_layers(self) -> None:
        torch.manual_seed(8)
        model = nn.Sequential(*[nn.Linear(16, 16) for _ in range(4)])
        model[1].qconfig = qbench.get_qconfig(activation_bits=None, weight_bits=4)
        x = torch.randn(64, 16)
        model = qbench.prepare_qat(model, qconfig=qbench.get_qconfig(), example_inputs=(x,))
        model(x)
        model.eval()
        program = qbench.convert(model, (x,))
        alone = qbench.convert(model, (x,))
        before = run(program, x)
        found = quantize_bias(alone)
        assert [note.path for note in found.left_float] == ["1"] and "trained in float" in found.left_float[0].reason
        assert len(found.quantized) == 3 and torch.equal(run(alone, x), before)
        report = fuse_qdq(program)
        assert report.by_rule["linear"] == 3 and report.by_rule["weight-only linear"] == 1
        node = next(n for n in program.graph.nodes if n.target == torch.ops.qbench.linear_qcs4w.default)
        assert torch.equal(program.state_dict["1.bias"], model[1].bias) and "dequantize" in node.args[0].name

    def test_a_target_without_floats_refuses(self) -> None:
        x = torch.randn(4, 8)
        config = qbench.get_qconfig(activation_bits=None)
        model = qbench.prepare_qat(nn.Sequential(nn.Linear(8, 4)), qconfig=config, example_inputs=(x,)).eval()
        with pytest.raises(qbench.errors.ConversionError, match=r"0 quantizes its weight only.*tosa.*integers alone"):
            qbench.convert(model, (x,), target="tosa")

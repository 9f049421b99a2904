"""Row by row, the cases that ExecuTorch's QuantizeFusedConvBnBiasAtenPass misses: its result beside ours, in numbers.

| case | ExecuTorch's pass | ours | test |
| --- | --- | --- | --- |
| linear, conv1d/3d, padding="same", conv_transpose1d/3d | float bias left | quantized | test_layers_that_are_skipped |
| dq -> max_pool / relu / reshape ... -> conv | float bias left | quantized | test_looks_through |
| conv_transpose2d with groups, weight axis 1 | RuntimeError | scale tiled per group | test_transposed_groups |
| conv_transpose2d, weight axis 0 | wrong scales if in == out | refused | test_transposed_weight_axis_0 |
| one bias, two input scales | second reader gets raw codes | a clone per use | test_shared_bias |
| one bias, another reader | reader gets raw codes | a clone | test_bias_with_another_reader |
| bias beyond int32 | wraps to -2^31 | saturates, reported | test_beyond_int32 |
| symmetric_quant | emits -2^31 | -(2^31 - 1) | test_symmetric |
| half precision | error | quantized | test_half_precision |
| bias is a buffer / a lifted constant / a sum | skipped or error | quantized | test_bias_sources |
| scale is a Parameter | AttributeError / skipped | quantized | test_scale_sources |
| weight through a view | wrong scale or error | axis followed | test_weight_views |
| weight = mul(dq(w), ...) | takes the wrong number as the scale | refused | test_weight_that_is_computed |
| float conv, default_zero_bias | zeros added, "not modified" | left alone | test_float_conv_is_left_alone |
| zero_point of the emitted dq | int32 | int64 | test_zero_point_dtype |
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from qdq_programs import (
    INPUT,
    LAYERS,
    OPS,
    S_IN,
    Layer,
    Weight,
    bias_node,
    expected_codes,
    export,
    fake_quantize,
    layer_nodes,
    make_layer,
    reload,
    run_upstream,
    scales_per_output,
    stored_codes,
)
from torch import Tensor, nn
from torch.export import ExportedProgram

from qbench.errors import ConfigError, NumericsError, PassError
from qbench.graph.recognise import is_dequantize
from qbench.passes import QuantizeFusedConvBnBiasAtenPass, quantize_bias

pytestmark = pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec:FutureWarning")

CONV = LAYERS["conv2d"]
HIGH = 2**31 - 1


def upstream_codes(program: ExportedProgram, **options: bool) -> list[list[int] | None]:
    """What ExecuTorch's pass makes of each layer's bias: codes, or None where it left the bias float or out."""
    program = copy.deepcopy(program)
    run_upstream(program, **options)
    return [stored_codes(program, node) for node in layer_nodes(program.graph)]


def check_same_values(program: ExportedProgram, model: nn.Module, x: Tensor, put_on_grid: Callable[[], None]) -> None:
    """The program gives the values of the eager model whose bias was put on its grid by hand; so does its file."""
    put_on_grid()
    program.validate()
    assert torch.equal(program.module()(x), model(x))
    assert torch.equal(reload(program).module()(x), model(x))


SKIPPED = [
    "linear",
    "conv1d",
    "conv3d",
    "conv1d same",
    "conv2d same",
    "conv3d same",
    "conv_transpose1d",
    "conv_transpose3d",
]


@pytest.mark.parametrize("name", SKIPPED)
def test_layers_that_are_skipped(name: str) -> None:
    layer, x = make_layer(name)
    program = export(layer, x)
    assert upstream_codes(program) == [None]
    codes = quantize_bias(program).quantized[0].codes
    assert codes.tolist() == expected_codes(layer.bias, S_IN, scales_per_output(layer))


def test_what_both_do_is_the_same() -> None:
    """conv2d is upstream's own case: same codes, same names of what is stored."""
    layer, x = make_layer("conv2d")
    program = export(layer, x)
    theirs = copy.deepcopy(program)
    run_upstream(theirs)
    report = quantize_bias(program)
    assert stored_codes(theirs, layer_nodes(theirs.graph)[0]) == report.quantized[0].codes.tolist()
    assert set(theirs.state_dict) == set(program.state_dict)
    assert torch.equal(theirs.state_dict["conv2d_bias_scale"], program.state_dict["conv2d_bias_scale"])


THROUGH: dict[str, Callable[[Tensor], Tensor]] = {
    "max_pool": lambda x: F.max_pool2d(x, 2),
    "adaptive_max_pool": lambda x: F.adaptive_max_pool2d(x, 4),
    "relu": F.relu,
    "relu in place": lambda x: F.relu(x, inplace=True),
    "reshape": lambda x: x.reshape(2, 4, 4, 16),
    "view": lambda x: x.view(2, 4, 4, 16),
    "flatten, unflatten": lambda x: x.flatten(2).unflatten(2, (8, 8)),
    "permute": lambda x: x.permute(0, 1, 3, 2),
    "slice": lambda x: x[:, :, 1:7, 1:7],
    "pad": lambda x: F.pad(x, (1, 1, 1, 1)),
    "dropout in eval": lambda x: F.dropout(x, 0.5, training=False),
    "upsample": lambda x: F.interpolate(x, scale_factor=2, mode="nearest"),
    "chunk": lambda x: torch.cat([x, x], 1).chunk(2, 1)[0],
    "pool, relu, permute": lambda x: F.relu(F.max_pool2d(x, 2)).permute(0, 1, 3, 2),
    "cat on one grid": lambda x: torch.cat([x[:, :2], x[:, 2:].relu()], 1),
    "clone": lambda x: x.permute(0, 1, 3, 2).contiguous(),
}


# These decompose into operators that no other row has.
DECOMPOSED = ("max_pool", "adaptive_max_pool", "upsample", "chunk")


@pytest.mark.parametrize(
    ("name", "form"), [*((name, "program") for name in THROUGH), *((name, "decomposed") for name in DECOMPOSED)]
)
def test_looks_through(name: str, form: str) -> None:
    layer = Layer(CONV[0], CONV[1], CONV[2], before=THROUGH[name])
    x = torch.randn(CONV[3])
    program = export(layer, x)
    program = program.run_decompositions() if form == "decomposed" else program
    assert upstream_codes(program) == [None]
    report = quantize_bias(program)
    assert report.quantized[0].codes.tolist() == expected_codes(layer.bias, S_IN, layer.weight.scales)


NOT_THROUGH: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "avg_pool": (lambda x: F.avg_pool2d(x, 2), "aten.avg_pool2d.default"),
    "relu6": (F.relu6, "aten.relu6.default"),
    "pad with ones": (lambda x: F.pad(x, (1, 1), value=1.0), "aten.pad.default"),
    "cat of two grids": (
        lambda x: torch.cat([x[:, :2], fake_quantize(x[:, 2:], (0.07, *INPUT[1:]))], 1),
        "aten.cat.default",
    ),
    "add in place": (lambda x: x.add_(1.0), "aten.add_.Tensor"),
}


@pytest.mark.parametrize("name", NOT_THROUGH)
def test_does_not_look_through(name: str) -> None:
    before, named = NOT_THROUGH[name]
    layer = Layer(CONV[0], CONV[1], CONV[2], before=before)
    program = export(layer, torch.randn(CONV[3]))
    report = quantize_bias(program)
    assert not report.modified and len(report.refused) == 1
    assert "its input lies on no known grid" in report.refused[0].reason and named in report.refused[0].reason


@pytest.mark.parametrize("groups", [2, 4])
def test_transposed_groups(groups: int) -> None:
    layer = Layer(lambda x, w, b: F.conv_transpose2d(x, w, b, groups=groups), (4, 3, 3, 3), 3 * groups, axis=1)
    x = torch.randn(2, 4, 8, 8)
    program = export(layer, x)
    with pytest.raises(RuntimeError):
        upstream_codes(program)
    done = quantize_bias(program).quantized[0]
    assert torch.equal(done.scale, torch.tensor(S_IN) * layer.weight.scales.repeat(groups))
    assert done.codes.tolist() == expected_codes(layer.bias, S_IN, layer.weight.scales.repeat(groups))
    check_same_values(program, layer, x, lambda: setattr(layer.bias, "data", done.codes * done.scale))


def test_transposed_weight_axis_0() -> None:
    layer = Layer(F.conv_transpose2d, (4, 4, 3, 3), 4, axis=0)
    program = export(layer, torch.randn(2, 4, 8, 8))
    # in == out, so upstream multiplies the scales of the input channels into the bias of the output channels.
    assert upstream_codes(program) == [expected_codes(layer.bias, S_IN, layer.weight.scales)]
    report = quantize_bias(program)
    assert not report.modified
    assert "differ within an output channel" in report.refused[0].reason and "axis 0" in report.refused[0].reason


def test_transposed_depthwise_weight_axis_0_is_per_output_channel() -> None:
    """With one input channel a group, axis 0 is the group: each output channel does have one scale."""
    layer = Layer(lambda x, w, b: F.conv_transpose2d(x, w, b, groups=4), (4, 2, 3, 3), 8, axis=0)
    program = export(layer, torch.randn(2, 4, 8, 8))
    done = quantize_bias(program).quantized[0]
    assert done.codes.tolist() == expected_codes(layer.bias, S_IN, layer.weight.scales.repeat_interleave(2))


class TwoReaders(nn.Module):
    """Two convolutions that share weight and bias behind inputs of two scales; optionally the bias is read besides."""

    def __init__(self, second_scale: float = 0.07, other: bool = False) -> None:
        super().__init__()
        self.weight = Weight((4, 4, 3, 3))
        self.bias = nn.Parameter(torch.randn(4) * 3)
        self.scales = (S_IN, second_scale)
        self.other = other

    def forward(self, x: Tensor) -> Tensor:
        for scale in self.scales:
            x = F.conv2d(fake_quantize(x, (scale, *INPUT[1:])), self.weight(), self.bias)
        return x + self.bias[:, None, None] if self.other else x


@pytest.mark.parametrize("form", ["program", "module"])
@pytest.mark.parametrize("second_scale", [0.07, S_IN])
def test_shared_bias(second_scale: float, form: str) -> None:
    model = TwoReaders(second_scale)
    x = torch.randn(1, 4, 9, 9)
    program = export(model, x)
    theirs = copy.deepcopy(program)
    run_upstream(theirs)
    first, second = layer_nodes(theirs.graph)
    # The second convolution finds the shared bias already int32, and is given the raw codes as if they were real.
    assert is_dequantize(bias_node(first)) and not is_dequantize(bias_node(second))
    assert bias_node(second) is bias_node(first).args[0]

    form_of = program if form == "program" else program.module()
    report = quantize_bias(form_of)
    for done, scale in zip(report.quantized, model.scales, strict=True):
        assert done.codes.tolist() == expected_codes(model.bias, scale, model.weight.scales)
    call = form_of.module() if form == "program" else form_of
    y = x
    for done, scale in zip(report.quantized, model.scales, strict=True):
        y = F.conv2d(fake_quantize(y, (scale, *INPUT[1:])), model.weight(), done.codes * done.scale)
    assert torch.equal(call(x), y)
    keys = dict(form_of.state_dict if form == "program" else form_of.state_dict())
    # The first reader gets a bias of its own; what the last one reads is then its alone.
    assert keys["conv2d_bias"].tolist() == report.quantized[0].codes.tolist()
    assert keys["bias"].tolist() == report.quantized[1].codes.tolist()
    assert not quantize_bias(form_of).modified


def test_bias_with_another_reader() -> None:
    model = TwoReaders(other=True)
    x = torch.randn(1, 4, 9, 9)
    program = export(model, x)
    report = quantize_bias(program)
    assert len(report.quantized) == 2
    assert torch.equal(program.state_dict["bias"], model.bias)
    y = x
    for done, scale in zip(report.quantized, model.scales, strict=True):
        y = F.conv2d(fake_quantize(y, (scale, *INPUT[1:])), model.weight(), done.codes * done.scale)
    assert torch.equal(program.module()(x), y + model.bias[:, None, None])
    program.validate()


def test_two_layers_share_a_weight() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = Weight((4, 4, 3, 3))
            self.biases = nn.ParameterList(torch.randn(4) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            w = self.weight()
            for index, bias in enumerate(self.biases):
                x = F.conv2d(fake_quantize(x, (S_IN * (index + 1), *INPUT[1:])), w, bias)
            return x

    model = Shared()
    report = quantize_bias(export(model, torch.randn(1, 4, 9, 9)))
    for index, (done, bias) in enumerate(zip(report.quantized, model.biases, strict=True)):
        assert done.codes.tolist() == expected_codes(bias, S_IN * (index + 1), model.weight.scales)


def make_huge() -> tuple[Layer, Tensor, Tensor]:
    """Channels 1 and 3 are beyond int32 by far, channel 2 by one code, the others inside."""
    layer, x = make_layer("conv2d")
    step = torch.tensor(S_IN) * layer.weight.scales
    layer.bias.data = torch.tensor([1.0, 1e10, 0.0, -1e10, 2.0])
    layer.bias.data[2] = 2.0**31 * step[2]
    return layer, x, step


def test_beyond_int32() -> None:
    layer, x, step = make_huge()
    program = export(layer, x)
    theirs = upstream_codes(program)[0]
    # A positive bias comes out as the most negative code: the sign is flipped.
    assert theirs[1] == -(2**31)
    report = quantize_bias(program)
    codes = report.quantized[0].codes.tolist()
    assert codes == expected_codes(layer.bias, S_IN, layer.weight.scales)
    assert codes[1:4] == [HIGH, HIGH, -(2**31)] and codes[0] > 0
    (saturated,) = report.saturated
    assert saturated.channels == (1, 2, 3) and saturated.values == tuple(layer.bias[1:4].tolist())
    assert torch.allclose(torch.tensor(saturated.held), torch.tensor([2.0**31, 2.0**31, -(2.0**31)]) * step[1:4])
    assert not report.complete and "channel 1" in str(report) and "fits from weight scale" in str(report)
    # With the weight scale that the report names, the bias fits.
    needed = torch.tensor(saturated.weight_scales)
    assert torch.all(needed > 0)
    assert torch.all((layer.bias[1:4].double().abs() / (torch.tensor(S_IN) * needed).double()).round() <= HIGH)


def test_symmetric() -> None:
    layer, x, _ = make_huge()
    program = export(layer, x)
    assert upstream_codes(program, symmetric_quant=True)[0][3] == -(2**31)
    done = quantize_bias(program, symmetric_quant=True).quantized[0]
    assert done.codes.tolist() == expected_codes(layer.bias, S_IN, layer.weight.scales, symmetric=True)
    assert done.codes.min() == -HIGH
    assert bias_node(layer_nodes(program.graph)[0]).args[-3:] == (-HIGH, HIGH, torch.int32)


@pytest.mark.parametrize("bits", [8, 12, 16, 24])
@pytest.mark.parametrize("symmetric", [False, True])
def test_narrow_codes(bits: int, symmetric: bool) -> None:
    layer, x = make_layer("conv2d")
    layer.bias.data[0] = 1e4
    layer.bias.data[1] = -1e4
    report = quantize_bias(export(layer, x), bits=bits, symmetric_quant=symmetric)
    expected = expected_codes(layer.bias, S_IN, layer.weight.scales, bits, symmetric)
    assert report.quantized[0].codes.tolist() == expected
    assert expected[0] == 2 ** (bits - 1) - 1 and {0, 1} <= set(report.saturated[0].channels)


@pytest.mark.parametrize("bits", [7, 33, "32", None])
def test_impossible_widths(bits: Any) -> None:
    layer, x = make_layer("conv2d")
    with pytest.raises(ConfigError, match="8 to 32 bits"):
        quantize_bias(export(layer, x), bits=bits)


class Half(nn.Module):
    """A graph in half precision: dq hands out halves, or floats that are cast; the bias is half."""

    def __init__(self, dtype: torch.dtype, axis: int | None, cast: bool) -> None:
        super().__init__()
        self.dtype, self.cast = dtype, cast
        self.weight = Weight((5, 4, 3, 3), axis)
        self.bias = nn.Parameter((torch.randn(5) * 3).to(dtype))

    def half(self, source: Tensor, args: tuple) -> Tensor:
        if self.cast:
            return OPS.dequantize_per_tensor.default(source, *args).to(self.dtype)
        return OPS.dequantize_per_tensor.default(source, *args, out_dtype=self.dtype)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        codes = OPS.quantize_per_tensor.default(x.float(), *INPUT)
        bias = self.bias if bias is None else bias
        return F.conv2d(self.half(codes, INPUT), self.weight().to(self.dtype), bias)


@pytest.mark.parametrize("cast", [False, True], ids=["out_dtype", "cast"])
@pytest.mark.parametrize("axis", [0, None], ids=["per channel", "per tensor"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype: torch.dtype, axis: int | None, cast: bool) -> None:
    model = Half(dtype, axis, cast)
    # Codes beyond 65504, the largest half: the dequantize operator must not cast them first.
    model.bias.data[0] = 30.0
    model.weight.scales.clamp_(max=0.004)
    model.weight.literal = float(model.weight.scales[0])
    x = torch.randn(2, 4, 8, 8).to(dtype)
    program = export(model, x)
    try:
        theirs = upstream_codes(program)
    except (AssertionError, RuntimeError, AttributeError, TypeError):
        theirs = [None]
    assert theirs == [None]
    done = quantize_bias(program).quantized[0]
    assert done.codes.tolist() == expected_codes(model.bias.float(), S_IN, model.weight.scales)
    assert done.largest > 65504
    bias = (done.codes * done.scale).to(dtype)
    assert torch.isfinite(bias).all()
    result = program.module()(x)
    assert result.dtype == dtype and torch.equal(result, model(x, bias))
    assert bias_node(layer_nodes(program.graph)[0]).meta["val"].dtype == dtype
    program.validate()
    assert torch.equal(reload(program).module()(x), result)


class Sourced(nn.Module):
    """A convolution whose bias comes from where `kind` says."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.weight = Weight((5, 4, 3, 3))
        self.values = (torch.randn(5) * 3).tolist()
        value = torch.tensor(self.values)
        if kind == "parameter":
            self.b = nn.Parameter(value)
        elif kind in ("buffer", "transient buffer", "sum", "reshaped", "written buffer"):
            self.register_buffer("b", value, persistent=kind != "transient buffer")

    def bias(self) -> Tensor:
        if self.kind == "lifted constant":
            return torch.tensor(self.values)
        if self.kind == "sum":
            return self.b + self.b
        if self.kind == "reshaped":
            return self.b.reshape(5, 1).flatten()
        if self.kind == "written buffer":
            self.b.add_(1.0)
        return self.b

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(fake_quantize(x), self.weight(), self.bias())


@pytest.mark.parametrize("form", ["program", "module"])
@pytest.mark.parametrize("kind", ["parameter", "buffer", "transient buffer", "lifted constant", "sum", "reshaped"])
def test_bias_sources(kind: str, form: str) -> None:
    model = Sourced(kind)
    x = torch.randn(CONV[3])
    program = export(model, x)
    with torch.no_grad():
        bias = model.bias().clone()
    form_of = program if form == "program" else program.module()
    done = quantize_bias(form_of).quantized[0]
    assert done.codes.tolist() == expected_codes(bias, S_IN, model.weight.scales)
    call = form_of.module() if form == "program" else form_of
    expected = F.conv2d(fake_quantize(x), model.weight(), done.codes * done.scale)
    assert torch.equal(call(x), expected)
    if form == "program":
        program.validate()
        assert torch.equal(reload(program).module()(x), expected)
        # The float bias is gone from the file.
        stored = [*program.state_dict.values(), *program.constants.values()]
        assert not any(value.shape == (5,) and torch.equal(value, bias) for value in stored)


@pytest.mark.parametrize("kind", ["buffer", "lifted constant"])
def test_upstream_on_such_a_bias(kind: str) -> None:
    program = export(Sourced(kind), torch.randn(CONV[3]))
    assert upstream_codes(program) == [None]


def test_bias_that_the_program_writes_is_refused() -> None:
    program = export(Sourced("written buffer"), torch.randn(CONV[3]))
    report = quantize_bias(program)
    assert not report.modified and "computed while the program runs" in report.refused[0].reason


class Scaled(nn.Module):
    """Scales of input and weight as parameters or buffers, through the `.tensor` and the per-channel operators."""

    def __init__(self, kind: str, computed: bool = False) -> None:
        super().__init__()
        self.computed = computed
        self.weight = Weight((5, 4, 3, 3))
        self.bias = nn.Parameter(torch.randn(5) * 3)
        if kind == "parameter":
            scales = self.weight.scales
            del self.weight.scales
            self.weight.scales = nn.Parameter(scales)
            self.input_scale = nn.Parameter(torch.tensor(S_IN))
        else:
            self.register_buffer("input_scale", torch.tensor(S_IN))
        self.register_buffer("zero_point", torch.tensor(7))

    def forward(self, x: Tensor) -> Tensor:
        scale = x.abs().max() / 127 if self.computed else self.input_scale
        codes = OPS.quantize_per_tensor.tensor(x, scale, self.zero_point, -128, 127, torch.int8)
        x = OPS.dequantize_per_tensor.tensor(codes, scale, self.zero_point, -128, 127, torch.int8)
        return F.conv2d(x, self.weight(), self.bias)


@pytest.mark.parametrize("kind", ["parameter", "buffer"])
def test_scale_sources(kind: str) -> None:
    model = Scaled(kind)
    x = torch.randn(CONV[3])
    program = export(model, x)
    assert upstream_codes(program) == [None]
    done = quantize_bias(program).quantized[0]
    assert done.codes.tolist() == expected_codes(model.bias, S_IN, model.weight.scales)
    check_same_values(program, model, x, lambda: setattr(model.bias, "data", done.codes * done.scale))


def test_scale_that_is_computed_is_refused() -> None:
    report = quantize_bias(export(Scaled("buffer", computed=True), torch.randn(CONV[3])))
    assert not report.modified and "dequantize_per_tensor.tensor" in report.refused[0].reason


class Viewed(nn.Module):
    """The dequantized weight reaches the convolution through `view`; the codes' channels lie on `axis`."""

    def __init__(
        self, shape: tuple[int, ...], axis: int, view: Callable[[Tensor], Tensor], call: Any = F.conv2d
    ) -> None:
        super().__init__()
        self.weight, self.view, self.call = Weight(shape, axis), view, call
        self.bias = nn.Parameter(torch.randn(5) * 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(fake_quantize(x), self.view(self.weight()), self.bias)


VIEWS: dict[str, tuple[tuple[int, ...], int, Callable[[Tensor], Tensor]]] = {
    "permute": ((4, 3, 3, 5), 3, lambda w: w.permute(3, 0, 1, 2)),
    "transpose": ((4, 5, 3, 3), 1, lambda w: w.transpose(0, 1)),
    "unsqueeze": ((5, 4, 3), 0, lambda w: w.unsqueeze(2)),
    "reshape": ((5, 36), 0, lambda w: w.reshape(5, 4, 3, 3)),
    "slice": ((7, 4, 3, 3), 0, lambda w: w[1:6]),
    "flip": ((5, 4, 3, 3), 0, lambda w: w.flip(0)),
    "chunk": ((10, 4, 3, 3), 0, lambda w: w.chunk(2)[1]),
    "index": ((5, 4, 3, 3), 0, lambda w: w[torch.tensor([4, 2, 0, 1, 3])]),
    "contiguous": ((4, 3, 3, 5), 3, lambda w: w.permute(3, 0, 1, 2).contiguous()),
}


@pytest.mark.parametrize("name", VIEWS)
def test_weight_views(name: str) -> None:
    shape, axis, view = VIEWS[name]
    model = Viewed(shape, axis, view)
    x = torch.randn(CONV[3])
    program = export(model, x)
    w = model.weight
    along = [1] * len(shape)
    along[axis] = -1
    # The scale of each output channel, found by sending the scales themselves through the view.
    scales = view(w.scales.reshape(along).expand(shape).clone()).flatten(1)[:, 0]
    try:
        theirs = upstream_codes(program)[0]
    except (RuntimeError, AttributeError, AssertionError, KeyError, TypeError, ZeroDivisionError) as error:
        theirs = [type(error).__name__]
    expected = expected_codes(model.bias, S_IN, scales)
    assert theirs != expected
    done = quantize_bias(program).quantized[0]
    assert done.codes.tolist() == expected
    check_same_values(program, model, x, lambda: setattr(model.bias, "data", done.codes * done.scale))


def test_view_that_mixes_channels_is_refused() -> None:
    model = Viewed((4, 5, 3, 3), 0, lambda w: w.transpose(0, 1))
    report = quantize_bias(export(model, torch.randn(CONV[3])))
    assert not report.modified and "differ within an output channel" in report.refused[0].reason


@pytest.mark.parametrize(
    ("view", "named"),
    [(lambda w: w * 2.0, "aten.mul.Tensor"), (lambda w: w + 0.1, "aten.add.Tensor"), (torch.tanh, "aten.tanh")],
    ids=["mul", "add", "tanh"],
)
def test_weight_that_is_computed(view: Callable[[Tensor], Tensor], named: str) -> None:
    model = Viewed((5, 4, 3, 3), 0, view)
    program = export(model, torch.randn(CONV[3]))
    report = quantize_bias(program)
    assert not report.modified and named in report.refused[0].reason


def test_upstream_takes_a_factor_for_a_scale() -> None:
    model = Viewed((5, 4, 3, 3), 0, lambda w: w * 2.0)
    program = export(model, torch.randn(CONV[3]))
    assert upstream_codes(program) == [expected_codes(model.bias, S_IN, torch.tensor([2.0]))]


@pytest.mark.parametrize("quantized_input", [False, True])
def test_float_conv_is_left_alone(quantized_input: bool) -> None:
    class Float(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 5, 3, bias=False)
            self.biased = nn.Conv2d(4, 5, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = fake_quantize(x) if quantized_input else x
            return self.conv(x) + self.biased(x)

    model = Float()
    x = torch.randn(CONV[3])
    program = export(model, x)
    before = str(program.graph)
    theirs = copy.deepcopy(program)
    result = run_upstream(theirs, default_zero_bias=True)
    if not quantized_input:
        # Upstream writes zeros into the graph and says that it changed nothing.
        assert not result.modified and bias_node(layer_nodes(theirs.graph)[0]) is not None
    report = quantize_bias(program, default_zero_bias=True)
    assert not report.modified and str(program.graph) == before
    assert [note.reason for note in report.left_float] == ["its weight is float"] * 2
    assert [note.path for note in report.left_float] == ["conv", "biased"]


def test_weight_quantized_behind_a_float_input_is_refused() -> None:
    layer = Layer(lambda x, w, b: F.conv2d(torch.tanh(x), w, b), CONV[1], CONV[2])
    report = quantize_bias(export(layer, torch.randn(CONV[3])), default_zero_bias=True)
    assert not report.modified and "aten.tanh.default" in report.refused[0].reason


@pytest.mark.parametrize("form", ["program", "module"])
def test_zero_point_dtype(form: str) -> None:
    layer, x = make_layer("conv2d")
    program = export(layer, x)
    theirs = copy.deepcopy(program)
    run_upstream(theirs)
    assert theirs.state_dict["conv2d_bias_zero_point"].dtype == torch.int32
    form_of = program if form == "program" else program.module()
    quantize_bias(form_of)
    stored = form_of.state_dict if form == "program" else form_of.state_dict()
    assert stored["conv2d_bias_zero_point"].dtype == torch.int64 and not stored["conv2d_bias_zero_point"].any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_bias_that_is_not_finite(value: float) -> None:
    model = nn.Sequential(*(make_layer("conv2d")[0] for _ in range(2)))
    model[1].weight = Weight((5, 5, 3, 3))
    model[1].bias.data[3] = value
    program = export(model, torch.randn(CONV[3]))
    before = str(program.graph)
    with pytest.raises(NumericsError, match=rf"1 \(conv2d_1\): its bias is {value} \(channels 3\)"):
        quantize_bias(program)
    # Nothing was changed, not even the layer before it.
    assert str(program.graph) == before and program.state_dict["0.bias"].dtype == torch.float32


@pytest.mark.parametrize("scale", [0.0, -0.1, float("nan"), float("inf")])
def test_weight_scale_that_is_none(scale: float) -> None:
    layer, x = make_layer("conv2d")
    layer.weight.scales[2] = scale
    with pytest.raises(NumericsError, match="dequantize_per_channel: a scale is"):
        quantize_bias(export(layer, x))


def test_scales_whose_product_is_below_float32() -> None:
    layer, x = make_layer("conv2d")
    layer.weight.scales[2] = 1e-44
    layer.bias.data[2] = 0.0
    assert quantize_bias(export(layer, x)).quantized[0].codes[2] == 0
    layer.bias.data[2] = 1.0
    with pytest.raises(NumericsError, match="is 0 in float32, yet the bias is up to 1;"):
        quantize_bias(export(layer, x))


def test_parameters_that_are_inputs_of_a_bare_graph_module() -> None:
    layer, x = make_layer("conv2d")
    program = export(layer, x)
    report = quantize_bias(program.graph_module)
    assert not report.modified
    # Neither the weight's scales nor the bias can be known from the graph module of a program alone.
    assert "dequantize_per_channel" in report.refused[0].reason


def test_graph_module_of_another_program() -> None:
    layer, x = make_layer("conv2d")
    with pytest.raises(PassError, match=r"program\.graph_module.*quantize_bias"):
        QuantizeFusedConvBnBiasAtenPass(export(layer, x))(export(layer, x).graph_module)


@pytest.mark.parametrize("thing", [None, nn.Linear(1, 1)])
def test_neither_program_nor_module(thing: Any) -> None:
    with pytest.raises(PassError, match=r"expected a torch\.export\.ExportedProgram"):
        quantize_bias(thing)


def test_linear_of_an_input_that_is_not_contiguous() -> None:
    """It decomposes into a batched product and an addition; the addition's operand is the bias."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = Weight((5, 4))
            self.bias = nn.Parameter(torch.randn(5) * 3)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(fake_quantize(x).permute(0, 2, 3, 1), self.weight(), self.bias) + 1.0

    model, x = Model(), torch.randn(2, 4, 6, 6)
    program = export(model, x).run_decompositions()
    assert any("bmm" in node.name for node in program.graph.nodes)
    report = quantize_bias(program, default_zero_bias=True)
    assert len(report.quantized) == 1 and not report.without_bias
    done = report.quantized[0]
    assert done.codes.tolist() == expected_codes(model.bias, S_IN, model.weight.scales)
    check_same_values(program, model, x, lambda: setattr(model.bias, "data", done.codes * done.scale))
    assert len(quantize_bias(program).already) == 1


def test_product_of_two_activations_is_no_layer() -> None:
    class Attention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = fake_quantize(x)
            return torch.mm(x, x.t())

    report = quantize_bias(export(Attention(), torch.randn(4, 4)), default_zero_bias=True)
    assert not report.modified and not report.without_bias and not report.refused


def test_branch_of_control_flow_is_refused() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = make_layer("linear")[0]

        def forward(self, x: Tensor) -> Tensor:
            return torch.cond(x.sum() > 0, lambda x: self.layer(x), lambda x: self.layer(-x), (x,))

    report = quantize_bias(export(Branch(), torch.randn(3, 4)))
    assert len(report.refused) == 2 and "control flow" in report.refused[0].reason


def test_names_that_are_taken() -> None:
    class Taken(Layer):
        def __init__(self) -> None:
            super().__init__(CONV[0], CONV[1], CONV[2])
            self.register_buffer("conv2d_bias_scale", torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.conv2d_bias_scale

    model, x = Taken(), torch.randn(CONV[3])
    for form in ("program", "module"):
        program = export(model, x)
        form_of: Any = program if form == "program" else program.module()
        done = quantize_bias(form_of).quantized[0]
        stored = form_of.state_dict if form == "program" else form_of.state_dict()
        assert torch.equal(stored["conv2d_bias_scale"], torch.ones(1))
        assert torch.equal(stored["conv2d_bias_scale_1"], done.scale)


def test_report_reads_well() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = make_layer("conv2d")[0]
            self.first.bias.data[:] = torch.tensor([1.0, -2.0, 1e12, 0.5, 0.25])
            self.second = Layer(CONV[0], (5, 5, 3, 3), 5, before=F.relu6)
            self.third = nn.Conv2d(5, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.third(self.second(self.first(x)))

    report = quantize_bias(export(Mixed(), torch.randn(CONV[3])))
    text = str(report).splitlines()
    assert text[0] == "int32 bias: 1 quantized (largest code 2,147,483,647)"
    assert text[1] == "1 saturated:" and text[2].startswith("  first (conv2d): channel 2: 1e+12 became")
    assert text[3] == "1 refused:"
    assert text[4] == "  second (conv2d_1): its input lies on no known grid: aten.relu6.default (relu6)"
    assert text[5:] == ["1 left in float:", "  third (conv2d_2): its weight is float"]
    assert report.codes()["conv2d"].tolist()[2] == HIGH
    assert [layer.path for layer in report.quantized] == ["first"]

"""Readers of q and dq nodes, grids through operators, and the layers of a graph."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from qbench.errors import NumericsError, PassError
from qbench.graph.constants import Constants, constants_of
from qbench.graph.dialect import argument, like, overload, packet
from qbench.graph.edit import insert_call, set_argument
from qbench.graph.layers import Layer, read_layer, uses_dequantize
from qbench.graph.qdq import quantized_decomposed
from qbench.graph.recognise import (
    find_grid,
    is_dequantize,
    is_quantize,
    origin,
    read_dequantize,
    read_quantize,
    same_grid,
)
from qbench.numerics.qparams import QParams

aten = torch.ops.aten
OPS = quantized_decomposed()
ARGS = (0.05, 3, -128, 127, torch.int8)


class Stored(nn.Module):
    """`function(x, self)` over buffers of every kind that a q or dq node may read."""

    def __init__(self, function: Callable[[Tensor, nn.Module], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("scale", torch.tensor(0.05))
        self.register_buffer("scale_1", torch.tensor([0.05]))
        self.register_buffer("zero_point", torch.tensor(3))
        self.register_buffer("low", torch.tensor(-128))
        self.register_buffer("high", torch.tensor(127))
        self.register_buffer("scales", torch.tensor([0.1, 0.2, 0.3, 0.4]))
        self.register_buffer("zero_points", torch.zeros(4, dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self)


def trace(function: Callable[[Tensor, nn.Module], Tensor], form: str = "program") -> Constants:
    program = torch.export.export(Stored(function), (torch.randn(4, 4),), strict=False)
    return constants_of(program if form == "program" else program.module())


def nodes(constants: Constants, wanted: Callable[[fx.Node], bool]) -> list[fx.Node]:
    return [node for node in constants.graph.nodes if wanted(node)]


def literal(x: Tensor, m: nn.Module) -> Tensor:
    return OPS.dequantize_per_tensor.default(OPS.quantize_per_tensor.default(x, *ARGS), *ARGS)


def tensors(x: Tensor, m: nn.Module) -> Tensor:
    args = (m.scale, m.zero_point, -128, 127, torch.int8)
    return OPS.dequantize_per_tensor.tensor(OPS.quantize_per_tensor.tensor(x, *args), *args)


def one_element(x: Tensor, m: nn.Module) -> Tensor:
    args = (m.scale_1, m.zero_point, -128, 127, torch.int8)
    return OPS.dequantize_per_tensor.tensor(OPS.quantize_per_tensor.tensor(x, *args), *args)


def limits_too(x: Tensor, m: nn.Module) -> Tensor:
    args = (m.scale, m.zero_point, m.low, m.high, torch.int8)
    return OPS.dequantize_per_tensor.tensor2(OPS.quantize_per_tensor.tensor2(x, *args), *args)


def computed_but_fixed(x: Tensor, m: nn.Module) -> Tensor:
    args = (m.scale * 2 / 2, m.zero_point, -128, 127, torch.int8)
    return OPS.dequantize_per_tensor.tensor(OPS.quantize_per_tensor.tensor(x, *args), *args)


@pytest.mark.parametrize("form", ["program", "module"])
@pytest.mark.parametrize("function", [literal, tensors, one_element, limits_too, computed_but_fixed])
def test_per_tensor(function: Callable[[Tensor, nn.Module], Tensor], form: str) -> None:
    constants = trace(function, form)
    (quantize,) = nodes(constants, is_quantize)
    (dequantize,) = nodes(constants, is_dequantize)
    expected = QParams(torch.tensor(0.05), torch.tensor(3, dtype=torch.int32), -128, 127)
    for read in (read_quantize(quantize, constants), read_dequantize(dequantize, constants)):
        assert same_grid(read.qparams, expected) and read.dtype == torch.int8
        assert read.literal is (function is literal) and read.source is read.node.args[0]
    assert read_quantize(dequantize, constants) is None and read_dequantize(quantize, constants) is None


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("zero_points", [True, False])
def test_per_channel(axis: int, zero_points: bool) -> None:
    def function(x: Tensor, m: nn.Module) -> Tensor:
        zeros = m.zero_points if zero_points else None
        codes = OPS.quantize_per_channel.default(x, m.scales, m.zero_points, axis, -127, 127, torch.int8)
        return OPS.dequantize_per_channel.default(codes, m.scales, zeros, axis, -127, 127, torch.int8)

    if axis < 0:
        # The operator itself does not take one, but a graph may hold it.
        constants = trace(
            lambda x, m: OPS.dequantize_per_channel.default(x.to(torch.int8), m.scales, None, 1, -127, 127, torch.int8)
        )
        (node,) = nodes(constants, is_dequantize)
        node.update_arg(3, -1)
    else:
        constants = trace(function)
        (node,) = nodes(constants, is_dequantize)
    read = read_dequantize(node, constants)
    assert read.qparams.axis == axis % 2 and not read.literal
    assert torch.equal(read.qparams.scale, torch.tensor([0.1, 0.2, 0.3, 0.4])) and not read.qparams.zero_point.any()


def test_scale_that_is_computed_is_not_known() -> None:
    def function(x: Tensor, m: nn.Module) -> Tensor:
        args = (x.abs().max(), m.zero_point, -128, 127, torch.int8)
        return OPS.dequantize_per_tensor.tensor(OPS.quantize_per_tensor.tensor(x, *args), *args)

    constants = trace(function)
    (node,) = nodes(constants, is_dequantize)
    assert is_dequantize(node) and read_dequantize(node, constants) is None and find_grid(node, constants) is None


def test_scale_that_is_not_one() -> None:
    constants = trace(literal)
    (node,) = nodes(constants, is_dequantize)
    node.update_arg(1, 0.0)
    with pytest.raises(NumericsError, match=r"dequantize_per_tensor: a scale is 0\.0; scales must be positive"):
        read_dequantize(node, constants)


def test_grid_and_origin() -> None:
    constants = trace(lambda x, m: F.gelu(literal(x, m).view(2, 8).to(torch.float16)).flatten().to(torch.float32))
    (dequantize,) = nodes(constants, is_dequantize)
    (gelu,) = nodes(constants, lambda node: node.target is aten.gelu.default)
    assert find_grid(gelu.args[0], constants).node is dequantize
    (last,) = nodes(constants, lambda node: node.op == "output")[0].all_input_nodes
    assert find_grid(last, constants) is None and origin(last) is gelu


def test_grid_of_what_is_written_behind_its_back_is_not_known() -> None:
    """A graph in which one reader of a dq adds to it in place and another reads it afterwards."""
    constants = trace(lambda x, m: literal(x, m).relu())
    (dequantize,) = nodes(constants, is_dequantize)
    assert find_grid(dequantize, constants).node is dequantize
    with constants.graph.inserting_after(dequantize):
        constants.graph.call_function(aten.add_.Tensor, (dequantize, 1.0))
    assert find_grid(dequantize, constants_of(constants.program)) is None


LAYERS = {
    "linear": (lambda x, m: F.linear(x, x, m.scales), {}),
    "addmm": (
        lambda x, m: torch.addmm(m.scales, x, m.scales.expand(4, 4)),
        {"bias_name": "self", "channels_last": True},
    ),
    "mm": (lambda x, m: torch.mm(x, m.scales.expand(4, 4)), {"bias_name": None, "channels_last": True}),
    "mm, add": (
        lambda x, m: torch.mm(x, m.scales.expand(4, 4)).view(2, 2, 4) + m.scales,
        {"bias_name": "other", "channels_last": True},
    ),
    "conv1d": (lambda x, m: F.conv1d(x[None], x.view(4, 1, 4), m.scales, groups=4), {"groups": 4}),
    "conv_transpose1d": (
        lambda x, m: F.conv_transpose1d(x[None], x.view(4, 2, 2), m.scales, groups=2),
        {"groups": 2, "transposed": True},
    ),
}
NO_LAYERS = {
    "mm of activations": lambda x, m: torch.mm(x, x),
    "addmm with alpha": lambda x, m: torch.addmm(m.scales, x, x, alpha=2),
    "add of a product and an activation": lambda x, m: torch.mm(x, x) + x,
    "add": lambda x, m: x + m.scales,
}


@pytest.mark.parametrize("name", LAYERS)
def test_layer(name: str) -> None:
    function, expected = LAYERS[name]
    constants = trace(function)
    (layer,) = [found for node in constants.graph.nodes if (found := read_layer(node, constants))]
    defaults = {"bias_name": "bias", "transposed": False, "groups": 1, "channels_last": False}
    assert {field: getattr(layer, field) for field in defaults} == {**defaults, **expected}
    assert (None if layer.bias is None else constants.key(layer.bias)) == (None if name == "mm" else "scales")


@pytest.mark.parametrize("name", NO_LAYERS)
def test_no_layer(name: str) -> None:
    constants = trace(NO_LAYERS[name])
    assert [node for node in constants.graph.nodes if read_layer(node, constants)] == []


@pytest.mark.parametrize(
    ("shape", "layout", "expected"),
    [
        ((2, 3), {}, [[0, 1, 2], [3, 4, 5]]),
        ((2, 1, 3), {}, [[0, 1, 2], [3, 4, 5]]),
        ((2, 3), {"channels_last": True}, [[0, 3], [1, 4], [2, 5]]),
        ((2, 3, 1), {"transposed": True}, [[0, 3], [1, 4], [2, 5]]),
        ((2, 3, 1), {"transposed": True, "groups": 2}, [[0], [1], [2], [3], [4], [5]]),
        ((4, 1, 2), {"transposed": True, "groups": 2}, [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ],
)
def test_values_per_output_channel(shape: tuple[int, ...], layout: dict, expected: list) -> None:
    node = fx.Graph().placeholder("x")
    layer = Layer(node, node, node, None, **layout)
    count = torch.Size(shape).numel()
    assert layer.per_output(torch.arange(count).reshape(shape)).tolist() == expected


def test_uses_dequantize_walks_a_branching_graph_once() -> None:
    """Thirty residual additions have 2**30 paths."""

    def function(x: Tensor, m: nn.Module) -> Tensor:
        for _ in range(30):
            x = x + x.relu()
        return torch.mm(x, x)

    constants = trace(function)
    (mm,) = nodes(constants, lambda node: node.target is aten.mm.default)
    assert not uses_dequantize(mm) and constants.get(mm) is None


def test_operators_by_name() -> None:
    assert overload(aten.relu.default) is aten.relu.default and packet(aten.relu.default) is aten.relu
    assert packet(aten.relu) is aten.relu and overload(aten.relu) is None
    assert overload(torch.relu) is None and packet("x") is None
    assert like(aten.relu.default, aten.add.Tensor) is aten.relu.default
    target = aten.conv2d.default
    assert argument(target, (1, 2), {}, "stride") == [1, 1] and argument(target, (1, 2), {"groups": 3}, "groups") == 3
    assert argument(aten.sum.dim_IntList, (1, [0]), {"dtype": 5}, "dtype") == 5
    with pytest.raises(PassError, match="no argument 'nothing'"):
        argument(target, (), {}, "nothing")


def test_edit() -> None:
    constants = trace(lambda x, m: F.conv1d(x[None], x.view(4, 4, 1)))
    (conv,) = nodes(constants, lambda node: node.target is aten.conv1d.default)
    vector = insert_call(conv, aten.select.int, (conv.args[1], 1, 0))
    flat = insert_call(conv, aten.flatten.using_ints, (vector,))
    assert flat.meta["val"].shape == (4,) and flat.meta["nn_module_stack"] == conv.meta["nn_module_stack"]
    set_argument(conv, "bias", flat)
    assert conv.args[2] is flat and not conv.kwargs
    set_argument(conv, "groups", 1)
    assert conv.kwargs == {"groups": 1}
    set_argument(conv, "weight", conv.args[1])
    constants.finish()
    x = torch.randn(4, 4)
    found = constants.program.module()(x)
    assert torch.equal(found, F.conv1d(x[None], x.view(4, 4, 1), x[:, 0]))

"""Hand-made Q/DQ programs, and the bias codes that they must get, by exact rational arithmetic."""

from __future__ import annotations

import importlib
import io
import logging
import warnings
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from qbench.graph.dialect import overload
from qbench.graph.qdq import quantized_decomposed
from qbench.graph.recognise import is_dequantize

# Once, outside the models: torch.cond traces their code.
OPS = quantized_decomposed()

S_IN = 0.0213
Z_IN = 7
INPUT = (S_IN, Z_IN, -128, 127, torch.int8)
OUTPUT = (0.11, -3, -128, 127, torch.int8)


def fake_quantize(x: Tensor, args: tuple = INPUT) -> Tensor:
    return OPS.dequantize_per_tensor.default(OPS.quantize_per_tensor.default(x, *args), *args)


class Weight(nn.Module):
    """Codes, scales and zero points as buffers; calling it dequantizes. `axis=None` is per tensor, a literal scale."""

    def __init__(self, shape: tuple[int, ...], axis: int | None = 0) -> None:
        super().__init__()
        self.axis = axis
        count = 1 if axis is None else shape[axis]
        self.register_buffer("codes", torch.randint(-127, 128, shape, dtype=torch.int8))
        self.register_buffer("scales", torch.rand(count) * 0.02 + 0.001)
        self.register_buffer("zero_points", torch.zeros(count, dtype=torch.int64))
        self.literal = float(self.scales[0])

    def forward(self) -> Tensor:
        if self.axis is None:
            return OPS.dequantize_per_tensor.default(self.codes, self.literal, 0, -127, 127, torch.int8)
        return OPS.dequantize_per_channel.default(
            self.codes, self.scales, self.zero_points, self.axis, -127, 127, torch.int8
        )


class Layer(nn.Module):
    """`dq(q(x)) -> call(x, w, b) -> q -> dq`, the float bias not on its grid."""

    def __init__(
        self,
        call: Callable[..., Tensor],
        shape: tuple[int, ...],
        channels: int,
        axis: int | None = 0,
        bias: bool = True,
        before: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> None:
        super().__init__()
        self.call, self.before = call, before
        self.weight = Weight(shape, axis)
        self.bias = nn.Parameter(torch.randn(channels) * 3) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return fake_quantize(self.call(self.before(fake_quantize(x)), self.weight(), self.bias), OUTPUT)


def import_quietly(module: str) -> Any:
    """A module of ExecuTorch or torchao, whose imports warn about themselves; skips the test where there is none."""
    pytest.importorskip(module.partition(".")[0])
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(module)
    finally:
        logging.disable(level)


def to_edge(program: ExportedProgram) -> Any:
    """ExecuTorch's EdgeProgramManager of a program."""
    # Registers what the lowered q and dq operators become.
    import_quietly("executorch.kernels.quantized")
    exir = import_quietly("executorch.exir")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return exir.to_edge(program, compile_config=exir.EdgeCompileConfig(_check_ir_validity=False))


def run_lowered(edge: Any, x: Tensor) -> Tensor:
    """Output of ExecuTorch's portable kernels for an EdgeProgramManager."""
    runtime = import_quietly("executorch.runtime")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        buffer = edge.to_executorch().buffer
    return runtime.Runtime.get().load_program(buffer).load_method("forward").execute((x,))[0]


def run_upstream(program: ExportedProgram | fx.GraphModule, **options: bool) -> Any:
    """ExecuTorch's own pass, in place; returns its PassResult."""
    module = import_quietly("executorch.backends.transforms.quantize_fused_convbn_bias_pass")
    if isinstance(program, ExportedProgram):
        return module.QuantizeFusedConvBnBiasAtenPass(program, **options)(program.graph_module)
    return module.QuantizeFusedConvBnBiasAtenPass(**options)(program)


def export(model: nn.Module, *inputs: Tensor) -> ExportedProgram:
    return torch.export.export(model.eval(), inputs, strict=False)


def reload(program: ExportedProgram) -> ExportedProgram:
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


def expected_codes(
    bias: Tensor, input_scale: float, scales: Tensor, bits: int = 32, symmetric: bool = False
) -> list[int]:
    """Codes by rational arithmetic: `round` of a Fraction is half to even."""
    high = 2 ** (bits - 1) - 1
    low = -high if symmetric else -high - 1
    steps = np.float32(input_scale) * scales.detach().numpy().astype(np.float32)
    steps = np.broadcast_to(steps, (bias.numel(),))
    exact = [round(Fraction(float(b)) / Fraction(float(s))) for b, s in zip(bias.detach().tolist(), steps, strict=True)]
    return [min(max(code, low), high) for code in exact]


def layer_nodes(graph: fx.Graph) -> list[fx.Node]:
    names = ("conv", "linear", "addmm", "aten::mm")
    found = [(node, overload(node.target)) for node in graph.nodes if node.op == "call_function"]
    return [node for node, op in found if op is not None and any(name in op._schema.name for name in names)]


def bias_node(layer: fx.Node) -> Any:
    """What the layer's bias argument is, wherever its schema has it."""
    op = overload(layer.target)
    names = [argument.name for argument in op._schema.arguments]
    position = names.index("self" if "addmm" in op._schema.name else "bias")
    return layer.args[position] if position < len(layer.args) else layer.kwargs.get("bias")


def stored_codes(program: ExportedProgram, layer: fx.Node) -> list[int] | None:
    """Codes of the bias of a layer of a program; None where it is float."""
    bias = bias_node(layer)
    if not is_dequantize(bias):
        return None
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    return program.state_dict[names[bias.args[0].name]].tolist()


# name: (call, weight shape, output channels, input shape, axis of the channels)
LAYERS: dict[str, tuple[Callable[..., Tensor], tuple[int, ...], int, tuple[int, ...], int]] = {
    "linear": (F.linear, (5, 4), 5, (3, 4), 0),
    "linear 3d": (F.linear, (5, 4), 5, (2, 3, 4), 0),
    "conv1d": (F.conv1d, (5, 4, 3), 5, (2, 4, 8), 0),
    "conv2d": (F.conv2d, (5, 4, 3, 3), 5, (2, 4, 8, 8), 0),
    "conv2d grouped": (lambda x, w, b: F.conv2d(x, w, b, groups=2), (6, 2, 3, 3), 6, (2, 4, 8, 8), 0),
    "conv3d": (F.conv3d, (5, 4, 3, 3, 3), 5, (2, 4, 4, 4, 4), 0),
    "conv1d same": (lambda x, w, b: F.conv1d(x, w, b, padding="same"), (5, 4, 3), 5, (2, 4, 8), 0),
    "conv2d same": (lambda x, w, b: F.conv2d(x, w, b, padding="same"), (5, 4, 3, 3), 5, (2, 4, 8, 8), 0),
    "conv3d same": (lambda x, w, b: F.conv3d(x, w, b, padding="same"), (5, 4, 3, 3, 3), 5, (2, 4, 4, 4, 4), 0),
    "conv_transpose1d": (F.conv_transpose1d, (4, 5, 3), 5, (2, 4, 8), 1),
    "conv_transpose2d": (F.conv_transpose2d, (4, 5, 3, 3), 5, (2, 4, 8, 8), 1),
    "conv_transpose3d": (F.conv_transpose3d, (4, 5, 2, 2, 2), 5, (2, 4, 4, 4, 4), 1),
    "conv_transpose2d grouped": (
        lambda x, w, b: F.conv_transpose2d(x, w, b, groups=2),
        (4, 3, 3, 3),
        6,
        (2, 4, 8, 8),
        1,
    ),
}


def make_layer(name: str, *, per_tensor: bool = False, bias: bool = True) -> tuple[Layer, Tensor]:
    call, shape, channels, input_shape, axis = LAYERS[name]
    return Layer(call, shape, channels, None if per_tensor else axis, bias), torch.randn(input_shape)


def scales_per_output(layer: Layer) -> Tensor:
    scales = layer.weight.scales
    assert layer.bias is not None
    return scales if scales.numel() in (1, layer.bias.numel()) else scales.repeat(layer.bias.numel() // scales.numel())

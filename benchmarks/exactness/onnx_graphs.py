"""Small quantized ONNX files of many independent parts, run by ONNX Runtime: codes in, codes out.

A file holds what `qbench.export.to_onnx` writes: uint8 codes (int8 + 128) between DequantizeLinear and QuantizeLinear,
uint8 weights with zero point 128, int32 biases.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime  # noqa: F401  the import that says whether the runtime is there
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from qbench.export.onnx import open_session
from qbench.numerics.arithmetic import Grid

_TYPES = {torch.uint8: TensorProto.UINT8, torch.float32: TensorProto.FLOAT}


def as_stored(codes: Tensor) -> Tensor:
    """int8 codes as the file stores them: uint8 = int8 + 128."""
    return codes if codes.dtype == torch.uint8 else (codes.to(torch.int16) + 128).to(torch.uint8)


def as_program(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 codes as the program stores them."""
    return codes if dtype == torch.uint8 else (codes.to(torch.int16) - 128).to(torch.int8)


class OnnxFile:
    """A file under construction; every method returns the name of the value that it adds."""

    def __init__(self, opset: int = 19) -> None:
        self.opset = opset
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []
        self.feed: dict[str, Any] = {}
        self.dtypes: list[torch.dtype] = []

    def node(self, op: str, *inputs: str, **attributes: Any) -> str:
        """An op of one output."""
        name = f"value{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], **attributes))
        return name

    def constant(self, value: Any, dtype: Any) -> str:
        """An initializer."""
        name = f"constant{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value, dtype=dtype), name))
        return name

    def input(self, value: Tensor) -> str:
        """An input of the graph: codes, stored as uint8, or floats."""
        stored = value if value.is_floating_point() else as_stored(value)
        name = f"input{len(self.inputs)}"
        self.inputs.append(helper.make_tensor_value_info(name, _TYPES[stored.dtype], list(stored.shape)))
        self.feed[name] = stored.numpy()
        return name

    def _grid(self, grid: Grid) -> tuple[str, str]:
        stored = grid.stored_as(torch.uint8)
        return self.constant(stored.scale, np.float32), self.constant(stored.zero_point, np.uint8)

    def dequantize(self, codes: str, grid: Grid) -> str:
        """DequantizeLinear of one grid a tensor."""
        return self.node("DequantizeLinear", codes, *self._grid(grid))

    def quantize(self, x: str, out: Grid) -> str:
        """QuantizeLinear, and the integer Clip that a narrow range needs."""
        codes = self.node("QuantizeLinear", x, *self._grid(out))
        low, high = out.stored_as(torch.uint8)[2:4]
        if (low, high) == (0, 255):
            return codes
        return self.node("Clip", codes, self.constant(low, np.uint8), self.constant(high, np.uint8))

    def output(self, name: str, dtype: torch.dtype) -> None:
        """Make a value an output of the graph; codes come back in `dtype`, int8 or uint8, floats as they are."""
        kind = TensorProto.FLOAT if dtype == torch.float32 else TensorProto.UINT8
        self.outputs.append(helper.make_tensor_value_info(name, kind, None))
        self.dtypes.append(dtype)

    def weight(self, codes: Tensor, scales: Tensor, axis: int = 0) -> str:
        """A stored uint8 weight, dequantized per tensor or per channel."""
        stored = self.constant(as_stored(codes).numpy(), np.uint8)
        zero_points = self.constant(np.full(tuple(scales.shape), 128), np.uint8)
        given = {"axis": axis} if scales.dim() else {}
        return self.node("DequantizeLinear", stored, self.constant(scales.numpy(), np.float32), zero_points, **given)

    def bias(self, codes: Tensor, scales: Tensor) -> str:
        """A stored int32 bias, dequantized with zero point 0."""
        stored = self.constant(codes.numpy(), np.int32)
        zeros = self.constant(np.zeros(tuple(scales.shape)), np.int32)
        axis = {"axis": 0} if scales.dim() else {}
        return self.node("DequantizeLinear", stored, self.constant(scales.numpy(), np.float32), zeros, **axis)

    def run(self, threads: int = 1) -> tuple[list[Tensor], Counter[str]]:
        """Outputs in order, and how many ops of each type ONNX Runtime made of the file."""
        graph = helper.make_graph(self.nodes, "sweep", self.inputs, self.outputs, self.constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=10)
        with tempfile.TemporaryDirectory() as folder:
            path, optimized = Path(folder) / "sweep.onnx", Path(folder) / "optimized.onnx"
            onnx.save(model, path)
            session = open_session(path, threads=threads, save_optimized=optimized)
            made = Counter(node.op_type for node in onnx.load(optimized).graph.node)
        values = [torch.from_numpy(np.array(value)) for value in session.run(None, self.feed)]
        return [_back(value, dtype) for value, dtype in zip(values, self.dtypes, strict=True)], made


def _back(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value if value.is_floating_point() else as_program(value, dtype)


def pads(padding: Sequence[int]) -> list[int]:
    """Equal padding at both ends, as ONNX writes it."""
    return [*padding, *padding]

"""Processor seconds that the passes need on a chain of quantized convolutions, and how they grow with its length.

    python benchmarks/passes_slope.py --out runs/passes_slope.json

    slope = log2(seconds(2n) / seconds(n))        1 is linear, 2 quadratic

Exporting thousands of modules takes far longer than any pass, so the graph is written node by node: each layer has
codes, scales, zero points and a float bias of its own, and behind it stands one pair of q and dq that changes nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.export.exported_program import ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec, OutputKind, OutputSpec
from torch.export.graph_signature import TensorArgument as Argument
from torch.utils._pytree import tree_flatten

from qbench import passes
from qbench.graph.cleanup import remove_redundant_qdq
from qbench.graph.qdq import quantized_decomposed
from qbench.passes import quantize_bias

SHAPE = (1, 4, 8, 8)
CHANNELS = SHAPE[1]
INPUT = (0.02, 3, -128, 127, torch.int8)


class _Writer:
    """A graph under construction, its signature and its stored tensors."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.specs: list[InputSpec] = []
        self.stored: dict[str, Tensor] = {}
        self.mode = FakeTensorMode()
        self._values: dict[Any, Tensor] = {}

    def value(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A fake tensor, the same one for all nodes of a shape and dtype."""
        with self.mode:
            return self._values.setdefault((shape, dtype), torch.empty(shape, dtype=dtype))

    def buffer(self, key: str, tensor: Tensor) -> fx.Node:
        node = self._placeholder(f"b_{key}", InputKind.BUFFER, key, tuple(tensor.shape), tensor.dtype)
        self.stored[key] = tensor
        return node

    def user_input(self, name: str, shape: tuple[int, ...]) -> fx.Node:
        return self._placeholder(name, InputKind.USER_INPUT, None, shape, torch.float32)

    def call(self, target: Any, args: tuple[Any, ...], shape: tuple[int, ...], dtype: torch.dtype) -> fx.Node:
        node = self.graph.call_function(target, args)
        node.meta["val"] = self.value(shape, dtype)
        return node

    def _placeholder(
        self, name: str, kind: InputKind, key: str | None, shape: tuple[int, ...], dtype: torch.dtype
    ) -> fx.Node:
        node = self.graph.placeholder(name)
        node.meta["val"] = self.value(shape, dtype)
        persistent = True if kind is InputKind.BUFFER else None
        self.specs.append(InputSpec(kind, Argument(node.name), key, persistent))
        return node


def conv_chain(layers: int) -> ExportedProgram:
    """A Q/DQ program of `layers` 3×3 convolutions, each between dq and q, with float biases."""
    writer = _Writer()
    ops, aten = quantized_decomposed(), torch.ops.aten
    parameters = [_layer_buffers(writer, layer) for layer in range(layers)]
    x = writer.user_input("x", SHAPE)

    def qdq(node: fx.Node, grid: tuple[Any, ...]) -> fx.Node:
        codes = writer.call(ops.quantize_per_tensor.default, (node, *grid), SHAPE, torch.int8)
        return writer.call(ops.dequantize_per_tensor.default, (codes, *grid), SHAPE, torch.float32)

    node = qdq(x, INPUT)
    for layer, (codes, scales, zeros, bias) in enumerate(parameters):
        weight_args = (codes, scales, zeros, 0, -127, 127, torch.int8)
        shape = tuple(writer.stored[f"codes_{layer}"].shape)
        weight = writer.call(ops.dequantize_per_channel.default, weight_args, shape, torch.float32)
        args = (node, weight, bias, [1, 1], [1, 1])
        conv = writer.call(aten.conv2d.default, args, SHAPE, torch.float32)
        grid = (0.01 + 1e-6 * layer, layer % 7, -128, 127, torch.int8)
        node = qdq(qdq(conv, grid), grid)
    writer.graph.output((node,))
    return _program(writer, node)


def _layer_buffers(writer: _Writer, layer: int) -> tuple[fx.Node, ...]:
    generator = torch.Generator().manual_seed(layer)
    tensors = {
        "codes": torch.randint(-127, 128, (CHANNELS, CHANNELS, 3, 3), dtype=torch.int8, generator=generator),
        "scales": torch.rand(CHANNELS, generator=generator) * 0.02 + 0.001,
        "zero_points": torch.zeros(CHANNELS, dtype=torch.int64),
        "bias": torch.randn(CHANNELS, generator=generator),
    }
    return tuple(writer.buffer(f"{name}_{layer}", tensor) for name, tensor in tensors.items())


def _program(writer: _Writer, output: fx.Node) -> ExportedProgram:
    signature = ExportGraphSignature(
        writer.specs, [OutputSpec(OutputKind.USER_OUTPUT, Argument(output.name), target=None)]
    )
    example = ((torch.zeros(SHAPE),), {})
    in_spec, out_spec = tree_flatten(example)[1], tree_flatten(0)[1]
    call = ModuleCallSignature([], [], in_spec, out_spec)
    return ExportedProgram(
        root=torch.nn.Module(),
        graph=writer.graph,
        graph_signature=signature,
        state_dict=writer.stored,
        range_constraints={},
        module_call_graph=[ModuleCallEntry("", call)],
        example_inputs=example,
    )


def pass_list() -> dict[str, Callable[[ExportedProgram], object]]:
    """The passes in the order in which a program goes through them."""
    found: dict[str, Callable[[ExportedProgram], object]] = {
        "remove_redundant_qdq": remove_redundant_qdq,
        "quantize_bias": quantize_bias,
    }
    fuse_qdq = getattr(passes, "fuse_qdq", None)
    if fuse_qdq is not None:
        found["fuse_qdq"] = lambda program: fuse_qdq(program, target="onnxruntime")
    return found


def measure(layers: int) -> dict[str, float]:
    """Seconds of each pass on a chain of `layers` convolutions."""
    program = conv_chain(layers)
    seconds = {}
    for name, run in pass_list().items():
        started = time.process_time()
        run(program)
        seconds[name] = time.process_time() - started
    _check(program, layers)
    return seconds


def _check(program: ExportedProgram, layers: int) -> None:
    """The passes did their work: a fast pass that skips its nodes is no result."""
    biases = sum(tensor.dtype == torch.int32 for tensor in program.state_dict.values())
    names = [str(node.target) for node in program.graph.nodes]
    leftover = sum("quantize_per_tensor" in name for name in names)
    if biases != layers or leftover > 3 * layers + 2:
        raise SystemExit(f"{layers} layers: {biases} integer biases, {leftover} q and dq nodes per tensor are left")


def main() -> None:
    """Print the table, and write it where `--out` says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[1250, 2500, 5000, 10000])
    parser.add_argument("--out", type=Path, default=Path("runs/passes_slope.json"))
    options = parser.parse_args()
    measure(10)  # operators are registered and imports done
    rows = [{"layers": layers, **measure(layers)} for layers in sorted(options.layers)]
    names = list(pass_list())
    print(f"{'layers':>8} " + " ".join(f"{name:>22}" for name in names))
    for row in rows:
        print(f"{row['layers']:8.0f} " + " ".join(f"{row[name]:20.2f} s" for name in names))
    found = slopes(rows)
    print(f"{'slope':>8} " + " ".join(f"{found[name]:22.2f}" for name in found))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"torch": torch.__version__, "seconds": rows, "slope": found}, indent=1) + "\n")


def slopes(rows: list[dict[str, float]]) -> dict[str, float]:
    """Slope of each pass between the shortest and the longest chain; empty where there is only one."""
    first, last = rows[0], rows[-1]
    if first is last:
        return {}
    doublings = math.log(last["layers"] / first["layers"])
    return {name: math.log(last[name] / first[name]) / doublings for name in pass_list()}


if __name__ == "__main__":
    main()

"""Lowers Q/DQ programs to TOSA and runs them: `python worker.py FOLDER`, in the environment of `__init__.py`.

FOLDER/cases.pt holds a list of cases: dicts of plain values and tensors (see `FORMS`). FOLDER/codes.pt becomes the list
of their codes: one tensor a case, or the reason (a string) why it was not lowered or not valid.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

warnings.simplefilter("ignore")
logging.disable(logging.WARNING)

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.ao.quantization.fx._decomposed  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import tosa_reference_model  # noqa: E402
from executorch.backends.arm._passes.insert_table_ops import InsertTableOpsPass  # noqa: E402
from executorch.backends.arm._passes.quant_args import QuantArgs  # noqa: E402
from executorch.backends.arm.tosa.compile_spec import TosaCompileSpec  # noqa: E402
from executorch.backends.arm.tosa.partitioner import TOSAPartitioner  # noqa: E402
from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower  # noqa: E402
from torch import Tensor, nn  # noqa: E402

Case = dict[str, Any]
OPS = torch.ops.quantized_decomposed
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "tanh": torch.tanh,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.01),
}
CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
INT32 = (-(2**31), 2**31 - 1, torch.int32)


def dequantize(codes: Tensor, grid: tuple[Any, ...]) -> Tensor:
    """Codes to reals."""
    return OPS.dequantize_per_tensor.default(codes, *grid)


def quantize(x: Tensor, grid: tuple[Any, ...]) -> Tensor:
    """Reals to codes."""
    return OPS.quantize_per_tensor.default(x, *grid)


class Layer(nn.Module):
    """A convolution or matrix product with int8 weight codes and int32 bias codes."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        for name in ("weight", "weight_scales", "bias", "bias_scales"):
            self.register_buffer(name, case[name])
        self.register_buffer("zeros", torch.zeros(case["weight_scales"].shape, dtype=torch.int64))
        both = (case["weight_scales"], case["bias_scales"])
        self.literals = [float(scales) if scales.dim() == 0 else None for scales in both]

    def real(self, codes: Tensor, scales: Tensor, literal: float | None, axis: int, *span: Any) -> Tensor:
        """Codes of a parameter to reals."""
        if literal is not None:
            return OPS.dequantize_per_tensor.default(codes, literal, 0, *span)
        return OPS.dequantize_per_channel.default(codes, scales, self.zeros, axis, *span)

    def forward(self, codes: Tensor) -> Tensor:
        """Codes -> codes."""
        case, x = self.case, dequantize(codes, self.case["source"])
        axis = 1 if case["transposed"] else 0
        weight = self.real(self.weight, self.weight_scales, self.literals[0], axis, -127, 127, torch.int8)
        bias = self.real(self.bias, self.bias_scales, self.literals[1], 0, *INT32)
        if case["dims"] == 0:
            return quantize(F.linear(x, weight, bias), case["out"])
        options = [case["groups"], case["dilation"]]
        if case["transposed"]:
            y = TRANSPOSED[case["dims"] - 1](
                x, weight, bias, case["stride"], case["padding"], case["output_padding"], *options
            )
        else:
            y = CONVOLUTIONS[case["dims"] - 1](x, weight, bias, case["stride"], case["padding"], *options[::-1])
        return quantize(y, case["out"])


class Form(nn.Module):
    """An operation without parameters."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case

    def forward(self, *codes: Tensor) -> Tensor:
        """Codes -> codes."""
        return FORMS[self.case["form"]](self.case, *codes)


def binary(case: Case, a: Tensor, b: Tensor) -> Tensor:
    """add, sub, mul."""
    operator = {"add": torch.add, "sub": torch.sub, "mul": torch.mul}[case["function"]]
    return quantize(operator(dequantize(a, case["a"]), dequantize(b, case["b"])), case["out"])


def matmul(case: Case, a: Tensor, b: Tensor) -> Tensor:
    """A batch of products: `matmul` would become a product between views, without quantize nodes beside it."""
    return quantize(torch.bmm(dequantize(a, case["a"]), dequantize(b, case["b"])), case["out"])


def rescaled(codes: Tensor, case: Case) -> Tensor:
    """Codes on the grid `out`; nothing is written where that is the grid they have."""
    return codes if case["source"] == case["out"] else quantize(dequantize(codes, case["source"]), case["out"])


def table(case: Case, codes: Tensor) -> Tensor:
    """A function of one value."""
    return quantize(FUNCTIONS[case["function"]](dequantize(codes, case["source"])), case["out"])


def clamp(case: Case, codes: Tensor) -> Tensor:
    """relu6: CLAMP does not rescale, so it stands behind."""
    real = dequantize(rescaled(codes, case), case["out"])
    return quantize(FUNCTIONS[case["function"]](real), case["out"])


def rescale(case: Case, codes: Tensor) -> Tensor:
    """A part of a cat on another grid: a q after a dq alone is not delegated."""
    other = dequantize(codes, case["out"])
    joined = torch.cat([dequantize(rescaled(codes, case), case["out"]), other], 0)
    return quantize(joined, case["out"])


def average_pool(case: Case, codes: Tensor) -> Tensor:
    """AVG_POOL2D does not rescale, so a requantize stands behind."""
    pooled = F.avg_pool2d(dequantize(codes, case["source"]), *case["window"])
    return rescaled(quantize(pooled, case["source"]), case)


def max_pool(case: Case, codes: Tensor) -> Tensor:
    """One grid at both ends."""
    return quantize(F.max_pool2d(dequantize(codes, case["source"]), *case["window"]), case["source"])


FORMS: dict[str, Callable[..., Tensor]] = {
    function.__name__: function for function in (binary, matmul, table, clamp, rescale, average_pool, max_pool)
}


class Group(nn.Module):
    """Cases side by side, each with inputs of its own: lowering costs more than running."""

    def __init__(self, cases: list[Case]) -> None:
        super().__init__()
        self.counts = [len(case["inputs"]) for case in cases]
        self.forms = nn.ModuleList(Layer(case) if case["form"] == "layer" else Form(case) for case in cases)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The codes of each case."""
        left = iter(inputs)
        pairs = zip(self.forms, self.counts, strict=True)
        return tuple(form(*[next(left) for _ in range(count)]) for form, count in pairs)


def lowered(cases: list[Case]) -> Any:
    """The exported program of some cases, all of it in one TOSA delegate.

    Raises:
        ValueError: a part of the program stayed outside.
    """
    # One tensor twice would become one input.
    inputs = tuple(tensor.clone() for case in cases for tensor in case["inputs"])
    program = torch.export.export(Group(cases).eval(), inputs, strict=False)
    for node in program.graph.nodes:
        if node.op == "call_function" and "quantize" not in str(node.target):
            node.meta.setdefault("custom", {})["_arm_annotation_info"] = {"quantized": True}
    edge = to_edge_transform_and_lower(
        program,
        partitioner=[TOSAPartitioner(TosaCompileSpec("TOSA-1.0+INT"))],
        compile_config=EdgeCompileConfig(_check_ir_validity=False),
    ).exported_program()
    calls = [str(node.target) for node in edge.graph.nodes if node.op == "call_function"]
    outside = [name for name in calls if not ("executorch_call_delegate" in name or "getitem" in name)]
    delegates = len(list(edge.graph_module.named_children()))
    if outside or delegates != 1:
        raise ValueError(f"{delegates} delegates, outside of them {len(outside)} operators")
    return edge


def run(edge: Any, cases: list[Case]) -> list[Tensor]:
    """Codes of the cases; the delegate may order its inputs and outputs as it likes."""
    inputs = [tensor for case in cases for tensor in case["inputs"]]
    by_name = dict(zip(edge.graph_signature.user_inputs, inputs, strict=True))
    (call,) = [node for node in edge.graph.nodes if "executorch_call_delegate" in str(node.target)]
    given = [by_name[node.name].numpy() for node in call.args[1:]]
    (delegate,) = [child for _, child in edge.graph_module.named_children()]
    outputs, status = tosa_reference_model.run(delegate.processed_bytes, given, verbosity="NONE")
    if status != tosa_reference_model.GraphStatus.TOSA_VALID:
        raise ValueError(f"the model says {status}")
    (results,) = [node.args[0] for node in edge.graph.nodes if node.op == "output"]
    return [torch.from_numpy(np.ascontiguousarray(outputs[node.args[1]])) for node in results]


def codes_of(cases: list[Case]) -> list[Tensor | str]:
    """What the reference model computes for each case, or why there is nothing."""
    try:
        return list(run(lowered(cases), cases))
    except Exception as error:  # the backend raises whatever it comes across
        if len(cases) == 1:
            return [f"{type(error).__name__}: {str(error)[:160]}"]
        half = len(cases) // 2
        return codes_of(cases[:half]) + codes_of(cases[half:])


def tables_of(case: Case) -> Tensor:
    """The tables that the backend puts into TABLE, one for each pair of grids, (pairs, 256)."""
    maker = InsertTableOpsPass.__new__(InsertTableOpsPass)
    function = FUNCTIONS[case["function"]]
    made = [maker.generate_8bit_table_values(function, QuantArgs(*a), QuantArgs(*b))[0] for a, b in case["grids"]]
    return torch.stack(made)


def main(folder: Path) -> None:
    """Run every case of a folder."""
    torch.set_num_threads(1)
    cases = torch.load(folder / "cases.pt", weights_only=False)
    found = [tables_of(case) for case in cases] if cases[0]["form"] == "tables" else codes_of(cases)
    torch.save(found, folder / "codes.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

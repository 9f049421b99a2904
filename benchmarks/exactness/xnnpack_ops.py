"""The operations of XNNPACK against its own codes: small Q/DQ programs through `to_executorch`, run in this process.

A program takes codes and gives codes, so that no float step stands between what is compared. Several cases of one
operation share a file, because lowering costs more than running.
"""

from __future__ import annotations

import dataclasses
import struct
import tempfile
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

import executorch  # noqa: F401  fails where the runtime is not installed
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.exactness import cases, products
from benchmarks.exactness.operators import Operators
from benchmarks.exactness.results import OpResult, Tally
from qbench.export import to_executorch
from qbench.export.runtimes import run_executorch
from qbench.graph.qdq import quantized_decomposed
from qbench.numerics.arithmetic import Grid
from qbench.numerics.arithmetic.base import dequantize_codes

TARGET = "xnnpack"
OURS = Operators(TARGET)
#: Cases a file holds.
_CASES = 24
_CLAMPED = " (clamped)"
_LAYERS = ("linear", "conv1d", "conv2d", "conv2d" + _CLAMPED, "depthwise", "conv_transpose1d", "conv_transpose2d")
_BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"add": torch.add, "sub": torch.sub, "mul": torch.mul}
#: log2 of the ratios s / s_out between which XNNPACK takes the operation.
_RATIOS = {"add": (-10.0, 7.99), "sub": (-10.0, 7.99), "mul": (-10.0, 3.5)}
_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "gelu": F.gelu,
    "tanh": torch.tanh,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.01),
}
_PARAMETERS = {"leaky_relu": (0.01,)}
#: Functions of which a lowered file holds nothing but the two grids; the bounds of ReLU6 depend on them.
_EXCHANGED = tuple(name for name in _FUNCTIONS if name != "relu6")
_SPAN = (-128, 127)


@dataclasses.dataclass(frozen=True)
class Case:
    """One operation with its numbers.

    Attributes:
        compute: The Q/DQ form: the program's inputs -> codes.
        inputs: Codes or floats.
        expected: The codes of this library's function.
    """

    compute: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    expected: Tensor


class Program(nn.Module):
    """The cases as one program, each with inputs of its own."""

    def __init__(self, cases_: list[Case]) -> None:
        super().__init__()
        self.cases = cases_
        # Modules among them hold buffers, which only a registered module shows.
        self.layers = nn.ModuleList(case.compute for case in cases_ if isinstance(case.compute, nn.Module))

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The codes of each case."""
        left = iter(inputs)
        return tuple(case.compute(*[next(left) for _ in case.inputs]) for case in self.cases)


def lowered(cases_: list[Case], folder: Path) -> Path:
    """A file of all cases."""
    # Tensors that are one object would become one input: then all readers share one input's scale.
    inputs = tuple(tensor.clone() for case in cases_ for tensor in case.inputs)
    with torch.no_grad():
        program = torch.export.export(Program(cases_).eval(), inputs, strict=False)
        return Path(to_executorch(program, folder / "case.pte").path)


def runtime_codes(cases_: list[Case]) -> list[Tensor]:
    """What XNNPACK gives for each case."""
    inputs = [tensor.numpy() for case in cases_ for tensor in case.inputs]
    with tempfile.TemporaryDirectory() as folder:
        [outputs] = run_executorch(lowered(cases_, Path(folder)), [inputs], 1)
    return [torch.from_numpy(output) for output in outputs]


def quantize(x: Tensor, grid: Grid) -> Tensor:
    """Floats to codes in the program."""
    return quantized_decomposed().quantize_per_tensor.default(x, *grid)


def dequantize(codes: Tensor, grid: Grid) -> Tensor:
    """Codes to floats in the program."""
    return quantized_decomposed().dequantize_per_tensor.default(codes, *grid)


def quantize_case(rng: np.random.Generator) -> Case:
    """Floats -> codes."""
    out = cases.grid(rng)
    x = cases.floats(rng, 40_000, out)
    return Case(lambda x: quantize(x, out), (x,), OURS.quantize(x, out))


def binary_case(rng: np.random.Generator, op: str) -> Case:
    """All pairs of codes; one in three broadcast."""
    a_grid, b_grid, out = cases.binary_grids(rng, low=_RATIOS[op][0], high=_RATIOS[op][1])
    if op == "mul":  # The ratio of a product is of both scales.
        b_grid = b_grid._replace(scale=cases.float32(b_grid.scale / out.scale))
    a, b = cases.all_pairs()
    if rng.integers(3) == 0:
        a, b = a[:, :1].contiguous(), b[:1].contiguous()
    function = _BINARY[op]
    return Case(
        lambda a, b: quantize(function(dequantize(a, a_grid), dequantize(b, b_grid)), out),
        (a, b),
        OURS.binary(op, a, a_grid, b, b_grid, out),
    )


def layer_case(
    rng: np.random.Generator, layer: cases.Layer, kind: str, per_channel: bool, clamped: bool = False
) -> Case:
    """A convolution or matrix product."""
    data = cases.layer_data(rng, layer, kind, per_channel=per_channel, largest_ratio=2.0**8)
    if clamped:
        data = dataclasses.replace(data, out=cases.narrowed(rng, data.out))
    bias = data.bias.to(torch.float32) * data.bias_scales
    recovered = torch.round(bias * (1.0 / data.bias_scales)).to(torch.float64).clamp(-(2.0**31), 2.0**31 - 1)
    return Case(LayerForm(data, bias), (data.codes,), OURS.layer(data, recovered.to(torch.int32)))


class LayerForm(nn.Module):
    """A layer between dq and q; the partitioner wants scales and zero points as buffers."""

    def __init__(self, data: cases.LayerData, bias: Tensor) -> None:
        super().__init__()
        self.data = data
        self.register_buffer("codes", data.weight)
        self.register_buffer("scales", data.weight_scales)
        self.register_buffer("zero_points", torch.zeros(data.weight_scales.shape, dtype=torch.int64))
        self.register_buffer("bias", bias)
        self.scale = float(data.weight_scales) if not data.weight_scales.dim() else None

    def forward(self, codes: Tensor) -> Tensor:
        """Codes -> codes."""
        of, x, weight = self.data.layer, dequantize(codes, self.data.source), self._weight()
        if of.dims == 0:
            return quantize(F.linear(x, weight, self.bias), self.data.out)
        if of.transposed:
            transposed = (F.conv_transpose1d, F.conv_transpose2d)[of.dims - 1]
            y = transposed(x, weight, self.bias, of.stride, of.padding, of.output_padding, of.groups, of.dilation)
            return quantize(y, self.data.out)
        convolve = (F.conv1d, F.conv2d)[of.dims - 1]
        y = convolve(x, weight, self.bias, of.stride, of.padding, of.dilation, of.groups)
        return quantize(y, self.data.out)

    def _weight(self) -> Tensor:
        ops, span = quantized_decomposed(), (-127, 127, torch.int8)
        if self.scale is not None:
            return ops.dequantize_per_tensor.default(self.codes, self.scale, 0, *span)
        axis = 1 if self.data.layer.transposed else 0
        return ops.dequantize_per_channel.default(self.codes, self.scales, self.zero_points, axis, *span)


def max_pool_case(rng: np.random.Generator) -> Case:
    """Windows of 2 and 3, with padding; one grid at both ends."""
    grid = cases.grid(rng)
    codes = cases.codes(rng, (4, 16, 24, 24))
    kernel, stride, padding = [(2, 2, 0), (3, 2, 1), (3, 1, 1), (5, 2, 2)][rng.integers(4)]
    return Case(
        lambda x: quantize(F.max_pool2d(dequantize(x, grid), kernel, stride, padding), grid),
        (codes,),
        OURS.max_pool(codes, [kernel] * 2, [stride] * 2, [padding] * 2),
    )


def global_average_case(rng: np.random.Generator) -> Case:
    """Means of every sum that some sizes can have, near the ends and the middle."""
    size = [(1, 1), (1, 7), (2, 3), (2, 5), (3, 3), (5, 5), (7, 7), (8, 8), (14, 14), (9, 31)][rng.integers(10)]
    count = size[0] * size[1]
    source, out = cases.unary_grids(rng, low=-8.0, high=7.9)
    if rng.integers(2):  # Ties of the mean.
        out = out._replace(scale=cases.float32(source.scale * 2 / count * rng.integers(1, 4)))
    sums = torch.from_numpy(rng.integers(-128 * count, 127 * count + 1, 8192))
    spread = (sums // count)[:, None] + (torch.arange(count) < (sums % count)[:, None])
    x = spread.to(torch.int8).reshape(4, 2048, *size)
    return Case(
        lambda x: quantize(dequantize(x, source).mean([2, 3], keepdim=True), out),
        (x,),
        OURS.global_average(x, source, out),
    )


def average_pool_case(rng: np.random.Generator) -> Case:
    """Windows of 2 and 3; there is no operator, so PyTorch's float steps stand for one."""
    source, out = cases.unary_grids(rng, low=-4.0, high=4.0)
    codes, (kernel, stride) = cases.codes(rng, (4, 16, 24, 24)), [(2, 2), (3, 2), (3, 1)][rng.integers(3)]
    return _in_float(lambda x: F.avg_pool2d(x, kernel, stride), codes, source, out)


def softmax_case(rng: np.random.Generator) -> Case:
    """Rows of 100; the delegate takes it in float only."""
    source = cases.grid(rng, of_scale=cases.float32(2.0 ** rng.uniform(-6, -3)))
    out = Grid(cases.float32(2.0 ** rng.uniform(-10, -8)), -128, -128, 127)
    return _in_float(lambda x: torch.softmax(x, -1), cases.codes(rng, (64, 100)), source, out)


def matmul_case(rng: np.random.Generator) -> Case:
    """Products of two activations; there is no operator, so PyTorch's float steps stand for one.

    Of stacks alone: a matrix among the factors makes it an `mm`, which is not delegated, and whose kernel in ExecuTorch
    1.5.1 was handed zeros in the place of a factor that a delegate computed.
    """
    stacks = [shapes for shapes in products.SHAPES if min(map(len, shapes)) > 2]
    shapes = stacks[rng.integers(len(stacks))]
    data = products.product_data(rng, shapes, str(rng.choice(products.KINDS)))

    def compute(a: Tensor, b: Tensor) -> Tensor:
        return quantize(torch.matmul(dequantize(a, data.a_grid), dequantize(b, data.b_grid)), data.out)

    real = torch.matmul(dequantize_codes(data.a, data.a_grid), dequantize_codes(data.b, data.b_grid))
    return Case(compute, (data.a, data.b), OURS.quantize(real, data.out))


def _in_float(function: Callable[[Tensor], Tensor], codes: Tensor, source: Grid, out: Grid) -> Case:
    expected = OURS.in_float(function, codes, source, out)
    return Case(lambda x: quantize(function(dequantize(x, source)), out), (codes,), expected)


def cat_case(rng: np.random.Generator) -> Case:
    """Three parts, two of them on grids of their own, which the export moves to that of the output."""
    out = cases.grid(rng)
    ratios = (cases.scale_ratio(rng, -6.0, 4.0), cases.scale_ratio(rng, -6.0, 4.0))
    grids = [out, *(cases.grid(rng, of_scale=cases.float32(out.scale * ratio)) for ratio in ratios)]
    parts = tuple(cases.codes(rng, (8, int(rng.integers(1, 9)), 14, 14)) for _ in grids)

    def compute(*codes: Tensor) -> Tensor:
        return quantize(torch.cat([dequantize(x, grid) for x, grid in zip(codes, grids, strict=True)], 1), out)

    return Case(compute, parts, OURS.cat(parts, grids, 1, out))


def rescale_case(rng: np.random.Generator) -> Case:
    """All codes on another grid."""
    source, out = cases.unary_grids(rng)
    codes = cases.all_codes().repeat(8)
    return Case(lambda x: quantize(dequantize(x, source), out), (codes,), OURS.rescale(codes, source, out))


def table_grids(rng: np.random.Generator) -> tuple[Grid, Grid]:
    """(input, output) of a function."""
    source, out = cases.unary_grids(rng, low=-4.0, high=4.0)
    if rng.integers(4):  # The functions bend near zero.
        source = source._replace(scale=cases.float32(2.0 ** rng.uniform(-7, -3)))
        out = out._replace(scale=cases.float32(2.0 ** rng.uniform(-9, -3)))
    return source, out


def table_case(name: str, source: Grid, out: Grid) -> Case:
    """All codes through a function."""
    function = _FUNCTIONS[name]
    return Case(
        lambda x: quantize(function(dequantize(x, source)), out),
        (cases.all_codes(),),
        OURS.function(name, _PARAMETERS.get(name, ()), source, out),
    )


class TableFile:
    """One lowered file whose grids are exchanged: a table needs no new lowering, which takes a second for every few.

    The file holds each grid once, as float32 and int32, behind one another. That the exchanged file is the lowered one,
    byte by byte, is checked where it is made.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        # Numbers that stand nowhere else in the file; a zero point of 0 would not be stored.
        self.marks = [
            (Grid(0.0101 + 0.0013 * case, 11 + case, *_SPAN), Grid(0.0207 + 0.0017 * case, 51 + case, *_SPAN))
            for case in range(_CASES)
        ]
        self.content = self._lowered(self.marks)
        other = [(a._replace(scale=a.scale * 1.5), b._replace(zero_point=-b.zero_point)) for a, b in self.marks]
        if self._exchanged(other) != self._lowered(other):
            raise RuntimeError(f"a file of {name} holds more of its grids than their scales and zero points")

    def _lowered(self, grids: list[tuple[Grid, Grid]]) -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            return lowered([table_case(self.name, *pair) for pair in grids], Path(folder)).read_bytes()

    def _exchanged(self, grids: list[tuple[Grid, Grid]]) -> bytes:
        content = self.content
        for mark, grid in zip(chain(*self.marks), chain(*grids), strict=True):
            before, after = (struct.pack("<fi", of.scale, of.zero_point) for of in (mark, grid))
            if self.content.count(before) != 1:
                raise RuntimeError(f"{mark} stands {self.content.count(before)} times in a file of {self.name}")
            where = self.content.index(before)
            content = content[:where] + after + content[where + len(after) :]
        return content

    def codes(self, grids: list[tuple[Grid, Grid]]) -> list[Tensor]:
        """What XNNPACK gives for all codes of each of the `_CASES` pairs of grids."""
        inputs = [cases.all_codes().numpy() for _ in grids]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "tables.pte"
            path.write_bytes(self._exchanged(grids))
            [outputs] = run_executorch(path, [inputs], 1)
        return [torch.from_numpy(output) for output in outputs]


def draw(op: str, seed: int) -> Iterator[Case]:
    """The cases of an operation, without end."""
    rng = cases.generator(seed, TARGET, op)
    while True:
        if op in _BINARY:
            yield binary_case(rng, op)
        elif op in _LAYERS:
            for layer in cases.LAYERS[op.removesuffix(_CLAMPED)]:
                if layer.transposed and layer.groups > 1:
                    continue  # Not delegated as quantized.
                kind = cases.KINDS[rng.integers(len(cases.KINDS))]
                grown = dataclasses.replace(layer, batch=layer.batch * 8)
                yield layer_case(rng, grown, kind, bool(rng.integers(4)), op.endswith(_CLAMPED))
        elif op in _FUNCTIONS:
            yield table_case(op, *table_grids(rng))
        else:
            yield {**_OTHERS, **_IN_FLOAT}[op](rng)


_OTHERS = {
    "quantize": quantize_case,
    "max_pool2d": max_pool_case,
    "global_average": global_average_case,
    "cat": cat_case,
    "rescale": rescale_case,
}
EXACT = (*_OTHERS, *_BINARY, *_LAYERS, *_FUNCTIONS)
#: What the delegate computes in float, or in steps that no operator has: counted, not promised.
_IN_FLOAT = {"average_pool": average_pool_case, "matmul": matmul_case, "softmax": softmax_case}
OPS = (*EXACT, *_IN_FLOAT)


def sweep(op: str, codes: int, seed: int) -> OpResult:
    """Compare at least `codes` codes of an operation."""
    tally = Tally()
    if op in _IN_FLOAT:
        tally.note("in float")
    if op in _EXCHANGED:
        file, rng = TableFile(op), cases.generator(seed, TARGET, op)
        while tally.compared < codes:
            grids = [table_grids(rng) for _ in range(_CASES)]
            for pair, found in zip(grids, file.codes(grids), strict=True):
                tally.add(OURS.function(op, _PARAMETERS.get(op, ()), *pair), found)
        return tally.result(op, TARGET)
    source = draw(op, seed)
    while tally.compared < codes:
        group = [next(source) for _ in range(_CASES)]
        for case, found in zip(group, runtime_codes(group), strict=True):
            tally.add(case.expected, found)
    return tally.result(op, TARGET)

"""The operations of ONNX Runtime against its own codes: small quantized graphs, many cases a session.

Every session's optimized graph is looked at: a note says where the operation did not run in its integer kernel. The
input codes are graph inputs and the output codes graph outputs, so that no float step stands between what is compared.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.exactness import cases, products
from benchmarks.exactness.onnx_graphs import OnnxFile, pads
from benchmarks.exactness.operators import Operators
from benchmarks.exactness.results import OpResult, Tally
from qbench.graph.qdq import quantized_decomposed
from qbench.numerics.arithmetic import Grid, Window
from qbench.numerics.arithmetic.functions import FUNCTIONS

TARGET = "onnxruntime"
OURS = Operators(TARGET)


class Part(NamedTuple):
    """What one case adds to a file: the output's name, and the codes that it must have."""

    output: str
    expected: Tensor


class Op(NamedTuple):
    """How an operation is swept.

    Attributes:
        build: Adds one random case to a file.
        kernel: What ONNX Runtime must make of each case; `""`: there is no integer kernel, it runs in float.
        cases: How many share a file.
        opset: Of the file.
    """

    build: Callable[[OnnxFile, np.random.Generator], Part]
    kernel: str = ""
    cases: int = 24
    opset: int = 19


def sweep(op: str, codes: int, seed: int) -> OpResult:
    """Compare at least `codes` codes of an operation of `OPS`; sessions have one thread and two in turn."""
    entry, rng, tally, ran, fused = _TABLE[op], cases.generator(seed, TARGET, op), Tally(), 0, 0
    while tally.compared < codes:
        file = OnnxFile(entry.opset)
        parts = [entry.build(file, rng) for _ in range(entry.cases)]
        for part in parts:
            file.output(part.output, part.expected.dtype)
        found, made = file.run(threads=1 + ran // entry.cases % 2)
        for part, value in zip(parts, found, strict=True):
            tally.add(part.expected, value)
        ran += len(parts)
        fused += made[entry.kernel]
    if not entry.kernel:
        tally.note(f"{ran} cases, in float between dequantize and quantize")
    else:
        tally.note(f"{ran} cases, {entry.kernel}" if fused == ran else f"only {fused} of {ran} by {entry.kernel}")
    return tally.result(op, TARGET)


def _quantize(file: OnnxFile, rng: np.random.Generator) -> Part:
    out = cases.grid(rng)
    x = cases.floats(rng, 4096, out)
    return Part(file.quantize(file.input(x), out), OURS.quantize(x, out))


def _layer(file: OnnxFile, rng: np.random.Generator, name: str, clamped: bool = False) -> Part:
    of = cases.LAYERS[name][rng.integers(len(cases.LAYERS[name]))]
    # A weight scale for each output channel lies along one axis of the file's weight: not so in transposed groups.
    per_channel = bool(rng.integers(4)) and not (of.transposed and of.groups > 1)
    bits = int(rng.choice([8, 8, 4]))
    data = cases.layer_data(rng, of, str(rng.choice(cases.KINDS)), per_channel=per_channel, weight_bits=bits)
    if clamped:
        data = dataclasses.replace(data, out=cases.narrowed(rng, data.out))
    return Part(file.quantize(_float_layer(file, data), data.out), OURS.layer(data))


def _float_layer(file: OnnxFile, data: cases.LayerData) -> str:
    """The layer between dequantize and quantize, as the export writes it."""
    of = data.layer
    x = file.dequantize(file.input(data.codes), data.source)
    weight = file.weight(data.weight, data.weight_scales, axis=1 if of.transposed else 0)
    bias = file.bias(data.bias, data.bias_scales)
    if of.dims == 0:
        return file.node("Gemm", x, weight, bias, transB=1)
    options = {"strides": of.stride, "pads": pads(of.padding), "dilations": of.dilation, "group": of.groups}
    if not of.transposed:
        return file.node("Conv", x, weight, bias, **options)
    return file.node("ConvTranspose", x, weight, bias, output_padding=of.output_padding, **options)


#: Shapes that broadcast: gates, biases, runs that begin with the shorter operand, odd tails, ranks that differ.
_SHAPES = (
    ((2, 24, 9, 9), (2, 24, 1, 1)),
    ((2, 24, 1, 1), (2, 24, 9, 9)),
    ((1, 17, 13, 7), (17, 1, 1)),
    ((3, 5, 1, 1), (1, 5, 1, 1)),
    ((33, 65), (65,)),
    ((1,), (5, 7, 31)),
    ((256, 1), (1, 256)),
    ((1, 256), (256, 1)),
    ((4, 1, 8, 1), (4, 6, 8, 1)),
    ((4, 6, 1, 1), (4, 6, 8, 1)),
    ((2, 3, 11, 1), (2, 1, 11, 13)),
)


def _binary(file: OnnxFile, rng: np.random.Generator, op: str, broadcast: bool) -> Part:
    a_grid, b_grid, out = cases.binary_grids(rng, low=-30.0)
    if broadcast:
        shapes = _SHAPES[rng.integers(len(_SHAPES))]
        a, b = (cases.codes(rng, shape) for shape in shapes)
    else:
        pairs = cases.all_pairs()
        drawn = torch.from_numpy(rng.permutation(256 * 256)[:10007])
        a, b = (codes.reshape(-1)[drawn] for codes in pairs)
    x, y = file.dequantize(file.input(a), a_grid), file.dequantize(file.input(b), b_grid)
    return Part(file.quantize(file.node(op, x, y), out), OURS.binary(op.lower(), a, a_grid, b, b_grid, out))


def _matmul(file: OnnxFile, rng: np.random.Generator) -> Part:
    shapes = products.SHAPES[rng.integers(len(products.SHAPES))]
    data = products.product_data(rng, shapes, str(rng.choice(products.KINDS)))
    out = cases.narrowed(rng, data.out) if rng.integers(8) == 0 else data.out
    x, y = file.dequantize(file.input(data.a), data.a_grid), file.dequantize(file.input(data.b), data.b_grid)
    expected = OURS.matmul(data.a, data.a_grid, data.b, data.b_grid, out)
    return Part(file.quantize(file.node("MatMul", x, y), out), expected)


def _cat(file: OnnxFile, rng: np.random.Generator) -> Part:
    out = cases.grid(rng)
    names, parts, grids = [], [], []
    for _ in range(3):
        grid = cases.grid(rng, of_scale=cases.float32(out.scale * cases.scale_ratio(rng, -6.0, 4.0)))
        codes = cases.codes(rng, (4, int(rng.integers(1, 9)), 5, 11))
        names.append(file.dequantize(file.input(codes), grid))
        parts.append(codes)
        grids.append(grid)
    return Part(file.quantize(file.node("Concat", *names, axis=1), out), OURS.cat(parts, grids, 1, out))


def _rescale(file: OnnxFile, rng: np.random.Generator) -> Part:
    grid, out = cases.unary_grids(rng)
    while grid == out:  # ONNX Runtime leaves both ops out.
        grid, out = cases.unary_grids(rng)
    codes = cases.all_codes()
    return Part(file.quantize(file.dequantize(file.input(codes), grid), out), OURS.rescale(codes, grid, out))


def _global_average(file: OnnxFile, rng: np.random.Generator) -> Part:
    # Fewer than 2^-32 of an output step for each code is refused by the runtime.
    grid, out = cases.unary_grids(rng, low=-16.0)
    sizes = ((7, 7), (1, 1), (14, 9), (31,), (3, 4, 5), (56, 56), (2, 2))[rng.integers(7)]
    codes = cases.codes(rng, (8, 64 if len(sizes) < 2 or sizes[0] < 50 else 4, *sizes))
    x = file.dequantize(file.input(codes), grid)
    return Part(file.quantize(file.node("GlobalAveragePool", x), out), OURS.global_average(codes, grid, out))


def _softmax(file: OnnxFile, rng: np.random.Generator, probabilities: bool) -> Part:
    """Rows of 100, or rows of attention on the grid of probabilities, for which there is a kernel of its own."""
    grid = cases.grid(rng, of_scale=cases.float32(2.0 ** rng.uniform(-6, -3)))
    scale = 2.0**-8 if probabilities else cases.float32(2.0 ** rng.uniform(-10, -8))
    out = Grid(scale, -128, -128, 127)
    codes = cases.codes(rng, (64, int(rng.choice([2, 49, 64, 197])) if probabilities else 100))
    found = file.node("Softmax", file.dequantize(file.input(codes), grid), axis=-1)
    return Part(file.quantize(found, out), OURS.in_float(lambda x: torch.softmax(x, -1), codes, grid, out))


#: (height, width), kernel, stride, padding: Inception's, GoogLeNet's, DenseNet's and ShuffleNet's, odd ones, and one
#: window over everything, which is another kernel.
_WINDOWS = (
    ((17, 17), (3, 3), (1, 1), (1, 1)),
    ((35, 35), (3, 3), (2, 2), (0, 0)),
    ((28, 28), (2, 2), (2, 2), (0, 0)),
    ((15, 13), (3, 3), (2, 2), (1, 1)),
    ((14, 14), (5, 5), (3, 3), (0, 0)),
    ((16, 19), (3, 5), (2, 3), (1, 2)),
    ((7, 7), (7, 7), (1, 1), (0, 0)),
    ((9, 9), (2, 2), (2, 2), (1, 1)),
)


def _average_pool(file: OnnxFile, rng: np.random.Generator) -> Part:
    grid, out = cases.unary_grids(rng, low=-16.0)
    sizes, kernel, stride, padding = _WINDOWS[rng.integers(len(_WINDOWS))]
    window = Window(kernel, stride, padding, bool(rng.integers(2)), bool(rng.integers(2)))
    codes = cases.codes(rng, (2, 8, *sizes))
    pooled = file.node(
        "AveragePool",
        file.dequantize(file.input(codes), grid),
        kernel_shape=kernel,
        strides=stride,
        pads=pads(padding),
        ceil_mode=int(window.ceil_mode),
        count_include_pad=int(window.count_include_pad),
    )
    return Part(file.quantize(pooled, out), OURS.average_pool(codes, grid, out, window))


def _max_pool(file: OnnxFile, rng: np.random.Generator) -> Part:
    grid = cases.grid(rng)
    ceil_mode = bool(rng.integers(2))
    codes = cases.codes(rng, (2, 16, 23, 22))
    x = file.dequantize(file.input(codes), grid)
    pooled = file.node(
        "MaxPool", x, kernel_shape=(3, 3), strides=(2, 2), pads=pads((1, 1)), ceil_mode=int(ceil_mode)
    )  # fmt: skip
    return Part(file.quantize(pooled, grid), OURS.max_pool(codes, (3, 3), (2, 2), (1, 1), ceil_mode))


def _chain(file: OnnxFile, x: str, name: str, parameters: tuple[float, ...], opset: int) -> str:
    """A function as `to_onnx` writes it."""

    def number(value: float) -> str:
        return file.constant(value, np.float32)

    def half_times(x: str, inner: str) -> str:
        return file.node("Mul", x, file.node("Mul", number(0.5), file.node("Add", inner, number(1.0))))

    if name == "silu":
        return file.node("Mul", x, file.node("Sigmoid", x))
    if name == "hardsigmoid":
        return file.node("HardSigmoid", x, alpha=1 / 6, beta=0.5)
    if name == "leaky_relu":
        return file.node("LeakyRelu", x, alpha=parameters[0])
    if name == "gelu" and opset < 20:
        return half_times(x, file.node("Erf", file.node("Div", x, number(2**0.5))))
    if name == "gelu_tanh":  # `to_onnx` writes it out in every opset
        cubic = file.node("Mul", number(0.044715), file.node("Pow", x, number(3.0)))
        inner = file.node("Mul", number((2 / np.pi) ** 0.5), file.node("Add", x, cubic))
        return half_times(x, file.node("Tanh", inner))
    if name == "gelu":
        return file.node("Gelu", x, approximate="none")
    return file.node({"hardswish": "HardSwish", "sigmoid": "Sigmoid", "tanh": "Tanh"}[name], x)


def _unary(file: OnnxFile, rng: np.random.Generator, name: str, opset: int) -> Part:
    # A step of 1/16 or less is a table that bends; half of the outputs use the range that the function has.
    ratio = cases.scale_ratio(rng, -4.0, 6.0) if rng.integers(2) else cases.scale_ratio(rng, -8.0, 7.0)
    grid = cases.grid(rng, of_scale=cases.scale_ratio(rng, -9.0, 0.0))
    out = cases.grid(rng, of_scale=cases.float32(grid.scale / ratio))
    parameters = (cases.float32(rng.choice([0.01, 0.1, 0.2, 0.25])),) if name == "leaky_relu" else ()
    x = file.dequantize(file.input(cases.all_codes()), grid)
    expected = OURS.function(name, parameters, grid, out)
    if name == "relu6":
        # Two codes by the program's own quantize op, as `to_onnx` puts them into the clip.
        low, high = quantized_decomposed().quantize_per_tensor.default(torch.tensor([0.0, 6.0]), *out).tolist()
        return Part(file.quantize(x, out._replace(qmin=low, qmax=high)), expected)
    return Part(file.quantize(_chain(file, x, name, parameters, opset), out), expected)


def _functions() -> dict[str, Op]:
    kernels = {"sigmoid": "QLinearSigmoid", "leaky_relu": "QLinearLeakyRelu"}
    found = {name: Op(partial(_unary, name=name, opset=19), kernels.get(name, ""), cases=48) for name in FUNCTIONS}
    for name in ("gelu", "gelu_tanh"):
        found[f"{name} (opset 21)"] = Op(partial(_unary, name=name, opset=21), cases=48, opset=21)
    return found


def _binaries() -> dict[str, Op]:
    found = {}
    for op, kernel in (("Add", "QLinearAdd"), ("Sub", ""), ("Mul", "QLinearMul")):
        found[op.lower()] = Op(partial(_binary, op=op, broadcast=False), kernel)
        found[f"{op.lower()} (broadcast)"] = Op(partial(_binary, op=op, broadcast=True), kernel, cases=64)
    return found


_TABLE: dict[str, Op] = {
    "quantize": Op(_quantize, "QuantizeLinear"),
    "linear": Op(partial(_layer, name="linear"), "QGemm"),
    **{name: Op(partial(_layer, name=name), "QLinearConv") for name in ("conv1d", "conv2d", "depthwise", "conv3d")},
    "conv2d (clamped)": Op(partial(_layer, name="conv2d", clamped=True), "QLinearConv"),
    **{f"conv_transpose{dims}d": Op(partial(_layer, name=f"conv_transpose{dims}d")) for dims in (1, 2, 3)},
    **_binaries(),
    "matmul": Op(_matmul, "QLinearMatMul"),
    "cat": Op(_cat, "QLinearConcat"),
    "rescale": Op(_rescale, "QuantizeLinear", cases=48),
    "global_average": Op(_global_average, "QLinearGlobalAveragePool", cases=48),
    "average_pool": Op(_average_pool, "QLinearAveragePool"),
    "max_pool": Op(_max_pool, "MaxPool"),
    "softmax": Op(partial(_softmax, probabilities=False), cases=48),
    "softmax (probabilities)": Op(partial(_softmax, probabilities=True), "QLinearSoftmax", cases=48),
    **_functions(),
}
OPS = tuple(_TABLE)
#: All but those that ONNX Runtime computes in float sums or with an exponential of its own: counted, not promised.
EXACT = tuple(op for op in OPS if not op.startswith(("softmax", "conv_transpose")))

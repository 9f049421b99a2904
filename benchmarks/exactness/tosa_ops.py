"""TOSA's operations against its reference model: Q/DQ programs that ExecuTorch's Arm backend lowers, run by the model.

The model has an environment of its own, which `QBENCH_TOSA_PYTHON` names (see `benchmarks.exactness.tosa_reference`).
This side draws the cases and computes our codes; a worker over there lowers and runs them.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.exactness import cases, products, tosa_reference
from benchmarks.exactness.operators import Operators
from benchmarks.exactness.results import OpResult, Tally
from qbench.numerics.arithmetic import Grid, Window
from qbench.numerics.arithmetic.fixed_point import multiplier_and_shift

TARGET = "tosa"
OURS = Operators(TARGET)
PYTHON = os.environ.get("QBENCH_TOSA_PYTHON", "runs/tosa/bin/python")
if not Path(PYTHON).exists():
    raise ImportError(f"no reference model at QBENCH_TOSA_PYTHON={PYTHON}. {tosa_reference.__doc__}")

#: Cases that the worker lowers together, and pairs of grids of which it asks the backend for a table.
_GROUP = 16
_TABLE_PAIRS = 512
_BINARY = ("add", "sub", "mul")
_LAYERS = ("linear", "conv1d", "conv2d", "depthwise", "conv_transpose2d")
_TABLES = ("hardswish", "hardsigmoid", "sigmoid", "silu", "gelu", "gelu_tanh", "tanh", "leaky_relu")
_PARAMETERS = {"leaky_relu": (0.01,)}
OPS = (*_BINARY, "matmul", "rescale", "average_pool", "global_average", "max_pool2d", *_LAYERS, "relu6", *_TABLES)

Drawn = tuple[dict[str, Any], Tensor]


def _binary(rng: np.random.Generator, op: str) -> Drawn:
    a_grid, b_grid, out = cases.binary_grids(rng)
    if op == "mul":  # the ratio of a product is of both scales
        b_grid = b_grid._replace(scale=cases.float32(b_grid.scale / out.scale))
    a, b = cases.all_pairs()
    case = {"form": "binary", "function": op, "a": tuple(a_grid), "b": tuple(b_grid), "out": tuple(out)}
    return {**case, "inputs": [a, b]}, OURS.binary(op, a, a_grid, b, b_grid, out)


def _matmul(rng: np.random.Generator, op: str) -> Drawn:
    """A product whose sums TOSA defines: below 2^(shift − 1).

    Of three dims: that is what the operator takes.
    """
    while True:
        *_, rows, inner, columns = *products.SHAPES[rng.integers(len(products.SHAPES))][0], int(rng.integers(1, 40))
        batch = int(rng.integers(1, 6))
        shapes = (batch, rows, inner), (batch, inner, columns)
        data = products.product_data(rng, shapes, str(rng.choice(products.KINDS)))
        ratio = torch.tensor(data.a_grid.scale, dtype=torch.float64) * data.b_grid.scale / data.out.scale
        if float(data.sums().abs().max()) < 2.0 ** min(int(multiplier_and_shift(ratio)[1]) - 1, 31):
            break
    case = {"form": "matmul", "a": tuple(data.a_grid), "b": tuple(data.b_grid), "out": tuple(data.out)}
    expected = OURS.matmul(data.a, data.a_grid, data.b, data.b_grid, data.out)
    return {**case, "inputs": [data.a, data.b]}, expected


def _unary(form: str, source: Grid, out: Grid, codes: Tensor, **more: Any) -> dict[str, Any]:
    return {"form": form, "source": tuple(source), "out": tuple(out), "inputs": [codes], **more}


def _rescale(rng: np.random.Generator, op: str) -> Drawn:
    source, out = cases.unary_grids(rng)
    codes = cases.all_codes()
    return _unary("rescale", source, out, codes), torch.cat([OURS.rescale(codes, source, out), codes])


def _table_grids(rng: np.random.Generator) -> tuple[Grid, Grid]:
    source, out = cases.unary_grids(rng, low=-4.0, high=4.0)
    if rng.integers(4):  # the functions bend near zero
        source = source._replace(scale=cases.float32(2.0 ** rng.uniform(-7, -3)))
        out = out._replace(scale=cases.float32(2.0 ** rng.uniform(-9, -3)))
    return source, out


def _table(rng: np.random.Generator, op: str) -> Drawn:
    source, out = _table_grids(rng)
    expected = OURS.function(op, _PARAMETERS.get(op, ()), source, out)
    return _unary("clamp" if op == "relu6" else "table", source, out, cases.all_codes(), function=op), expected


def _tables(rng: np.random.Generator, op: str) -> Drawn:
    """Many tables from the backend's own generator, without a graph around each."""
    pairs = [_table_grids(rng) for _ in range(_TABLE_PAIRS)]
    expected = torch.stack([OURS.function(op, _PARAMETERS.get(op, ()), *pair) for pair in pairs])
    return {"form": "tables", "function": op, "grids": [(tuple(a), tuple(b)) for a, b in pairs]}, expected


def _average_pool(rng: np.random.Generator, op: str) -> Drawn:
    source, out = cases.unary_grids(rng, low=-4.0, high=4.0)
    out = source if rng.integers(2) else out
    height, width = (int(size) for size in rng.integers(6, 15, 2))
    codes = cases.codes(rng, (1, 512, height, width))
    if op == "global_average":
        expected = OURS.global_average(codes, source, out)
        return _unary("average_pool", source, out, codes, window=([height, width],)), expected
    kernel, stride = (int(n) for n in rng.integers(1, 5, 2))
    padding = int(rng.integers(0, kernel // 2 + 1))
    include = bool(rng.integers(2))
    window = Window((kernel, kernel), (stride, stride), (padding, padding), bool(rng.integers(2)), include)
    spelled = ([kernel, kernel], [stride, stride], [padding, padding], window.ceil_mode, include)
    expected = OURS.average_pool(codes, source, out, window)
    return _unary("average_pool", source, out, codes, window=spelled), expected


def _max_pool(rng: np.random.Generator, op: str) -> Drawn:
    grid = cases.grid(rng)
    codes = cases.codes(rng, (1, 64, 24, 24))
    window = [([2, 2], [2, 2], [0, 0]), ([3, 3], [2, 2], [1, 1]), ([3, 3], [1, 1], [1, 1])][rng.integers(3)]
    return _unary("max_pool", grid, grid, codes, window=window), OURS.max_pool(codes, *window)


def _layer(rng: np.random.Generator, op: str) -> Drawn:
    """A layer whose accumulators TOSA defines: within int32, and below 2^(shift − 1)."""
    while True:
        of = cases.LAYERS[op][rng.integers(len(cases.LAYERS[op]))]
        kind = cases.KINDS[rng.integers(len(cases.KINDS))]
        data = cases.layer_data(rng, of, kind, per_channel=bool(rng.integers(4)))
        acc = cases.accumulate(data)
        product = data.weight_scales.to(torch.float64) * data.source.scale
        ratio = data.spread_channels(product) / data.out.scale
        bound = 2.0 ** (multiplier_and_shift(ratio)[1] - 1).clamp(max=31).to(torch.float64)
        if bool((acc.abs() < bound).all()):
            break
    names = ("dims", "stride", "padding", "output_padding", "dilation", "groups", "transposed")
    case = {name: getattr(of, name) for name in names}
    case.update(weight=data.weight, weight_scales=data.weight_scales, bias=data.bias, bias_scales=data.bias_scales)
    return _unary("layer", data.source, data.out, data.codes, **case), OURS.layer(data)


_DRAW = {
    **dict.fromkeys(_BINARY, _binary),
    **dict.fromkeys(_LAYERS, _layer),
    **dict.fromkeys((*_TABLES, "relu6"), _table),
    "matmul": _matmul,
    "rescale": _rescale,
    "average_pool": _average_pool,
    "global_average": _average_pool,
    "max_pool2d": _max_pool,
}


def draw(op: str, seed: int) -> Iterator[list[Drawn]]:
    """Groups of cases and our codes, without end; of a TABLE's group all but the first are tables alone."""
    rng = cases.generator(seed, TARGET, op)
    yield [_DRAW[op](rng, op) for _ in range(_GROUP)]
    function = _tables if op in _TABLES else _DRAW[op]
    while True:
        yield [function(rng, op) for _ in range(_GROUP)]


def runtime_codes(drawn: list[dict[str, Any]]) -> list[Tensor | str]:
    """What the reference model computes for each case, or the reason why it does not."""
    with tempfile.TemporaryDirectory() as folder:
        torch.save(drawn, Path(folder) / "cases.pt")
        worker = Path(__file__).parent / "tosa_reference" / "worker.py"
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(
            [PYTHON, str(worker), folder], env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{PYTHON} {worker} failed:\n{done.stderr[-2000:]}")
        found: list[Tensor | str] = torch.load(Path(folder) / "codes.pt", weights_only=False)
    return found


def sweep(op: str, codes: int, seed: int) -> OpResult:
    """Compare at least `codes` codes of an operation; what is refused four groups running ends it, with the reason."""
    tally, source, empty = Tally(), draw(op, seed), 0
    refused: dict[str, int] = {}
    while tally.compared < codes and empty < 4:
        group = next(source)
        before = tally.compared
        for (_, expected), found in zip(group, runtime_codes([case for case, _ in group]), strict=True):
            if isinstance(found, str):
                refused[found] = refused.get(found, 0) + 1
            else:
                tally.add(expected, found)
        empty = empty + 1 if tally.compared == before else 0
    tally.note(*(f"{count} cases {reason}" for reason, count in refused.items()))
    return tally.result(op, TARGET)

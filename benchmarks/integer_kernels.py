"""How fast integer evaluation is: each layer of ResNet-18 at 224 px against the float32 eager model in eval.

    float     Conv2d → BatchNorm2d → ReLU (the stem's max pool, add → ReLU and the linear layer likewise)
    integer   the operator of `qbench.ops` that stands for them, codes in, codes out
    ratio     time of integer / time of float, both in one process, one after the other; the median over all rounds

    python benchmarks/integer_kernels.py --batch 1 8 --threads 2 --json integer_kernels.json

On a machine that does other work, `--threads 1 --clock cpu` times what the process itself computes.

The sum counts every layer as often as ResNet-18 has it; the whole network is timed as it stands, the float model
against `qbench.integer_model`. Weights are normal, quantized per channel to [−127, 127], so the number of float32 parts
of a layer is that of a fresh network.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import qbench
import qbench.ops.conv
from qbench.models import build_model
from qbench.numerics.arithmetic import Grid
from qbench.ops.geometry import Geometry

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
S_IN, Z_IN = 0.02, -128
OUT = (0.05, -128, -128, 127, torch.int8)


class Conv(NamedTuple):
    """A convolution of ResNet-18: channels in and out, kernel, stride, size of its input, how often it occurs."""

    inputs: int
    outputs: int
    kernel: int
    stride: int
    size: int
    times: int


CONVS = (
    Conv(3, 64, 7, 2, 224, 1),
    Conv(64, 64, 3, 1, 56, 4),
    Conv(64, 128, 3, 2, 56, 1),
    Conv(64, 128, 1, 2, 56, 1),
    Conv(128, 128, 3, 1, 28, 3),
    Conv(128, 256, 3, 2, 28, 1),
    Conv(128, 256, 1, 2, 28, 1),
    Conv(256, 256, 3, 1, 14, 3),
    Conv(256, 512, 3, 2, 14, 1),
    Conv(256, 512, 1, 2, 14, 1),
    Conv(512, 512, 3, 1, 7, 3),
)


class Pair(NamedTuple):
    """One layer in both forms."""

    name: str
    times: int
    parts: int
    float_call: Callable[[], Tensor]
    integer_call: Callable[[], Tensor]


def codes(*shape: int) -> Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8)


def real(x: Tensor) -> Tensor:
    return (x.float() - Z_IN) * S_IN


def weight_codes(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Per-channel codes and scales of a float weight."""
    scales = weight.flatten(1).abs().amax(1) / 127
    return torch.round(weight / scales.reshape(-1, *[1] * (weight.ndim - 1))).to(torch.int8), scales


def conv_pair(shape: Conv, batch: int, target: str) -> Pair:
    padding = shape.kernel // 2
    conv = nn.Conv2d(shape.inputs, shape.outputs, shape.kernel, shape.stride, padding, bias=False)
    nn.init.normal_(conv.weight)
    layer = nn.Sequential(conv, nn.BatchNorm2d(shape.outputs), nn.ReLU()).eval()
    x = codes(batch, shape.inputs, shape.size, shape.size)
    weight, scales = weight_codes(conv.weight.detach())
    scales = scales / 100
    bias = torch.randint(-5000, 5000, (shape.outputs,), dtype=torch.int32)
    sizes = [shape.stride] * 2, [padding] * 2, [1, 1], 1
    floats = real(x)
    geometry = Geometry((shape.stride,) * 2, (padding,) * 2, (1, 1))
    plan = qbench.ops.conv.plan_of(weight, bias, Grid(S_IN, Z_IN, -128, 127), geometry)
    return Pair(
        f"conv {shape.inputs}→{shape.outputs} k{shape.kernel} s{shape.stride} {shape.size}²",
        shape.times,
        len(plan.parts),
        lambda: layer(floats),
        lambda: torch.ops.qbench.conv2d_q8ta_q8csw_q8to(x, S_IN, Z_IN, weight, scales, bias, *sizes, *OUT, target),
    )


def other_pairs(batch: int, target: str) -> list[Pair]:
    """What ResNet-18 computes beside convolutions; the add at its four sizes."""
    x = codes(batch, 64, 112, 112)
    floats, pool = real(x), nn.MaxPool2d(3, 2, 1)
    sizes = [3, 3], [2, 2], [1, 1], [1, 1], False
    pairs = [Pair("max pool 64 112²", 1, 0, lambda: pool(floats), lambda: torch.ops.qbench.max_pool2d_q8ta(x, *sizes))]
    pairs += [add_pair(batch, channels, size, target) for channels, size in ((64, 56), (128, 28), (256, 14), (512, 7))]
    linear = nn.Linear(512, 1000)
    weight, scales = weight_codes(linear.weight.detach())
    bias = torch.zeros(1000, dtype=torch.int32)
    y = codes(batch, 512)
    rows = real(y)
    call = torch.ops.qbench.linear_q8ta_q8csw_q8to
    pairs.append(
        Pair(
            "linear 512→1000",
            1,
            1,
            lambda: linear(rows),
            lambda: call(y, S_IN, Z_IN, weight, scales, bias, *OUT, target),
        )
    )
    return pairs


def add_pair(batch: int, channels: int, size: int, target: str) -> Pair:
    a, b = codes(batch, channels, size, size), codes(batch, channels, size, size)
    real_a, real_b = real(a), real(b)
    call = torch.ops.qbench.add_q8ta_q8ta_q8to
    return Pair(
        f"add {channels} {size}²",
        2,
        0,
        lambda: torch.relu(real_a + real_b),
        lambda: call(a, S_IN, Z_IN, b, S_IN, Z_IN, *OUT, target),
    )


def model_pair(batch: int, target: str) -> Pair:
    """The whole network: the float model in eval against `qbench.integer_model` of its QAT form."""
    images = torch.randn(batch, 3, 224, 224)
    network = build_model("resnet18", 1000).eval()
    model = qbench.prepare_qat(qbench.fuse(network), qconfig=qbench.get_qconfig(target), example_inputs=(images,))
    with torch.no_grad():
        model.train()(images)
    deployed = qbench.integer_model(model, (images,), target=target)
    return Pair("ResNet-18", 1, 0, lambda: network(images), lambda: deployed(images))


def seconds(call: Callable[[], Tensor], clock: Callable[[], float]) -> float:
    start = clock()
    call()
    return clock() - start


def measure(
    pairs: list[Pair], rounds: int, clock: Callable[[], float]
) -> tuple[list[dict[str, object]], dict[str, float]]:
    """Every round runs every layer in both forms, one after the other; medians over rounds."""
    with torch.no_grad():
        for pair in pairs:
            pair.float_call(), pair.integer_call()
        times = [
            [(seconds(pair.float_call, clock), seconds(pair.integer_call, clock)) for pair in pairs]
            for _ in range(rounds)
        ]
    rows: list[dict[str, object]] = []
    for index, pair in enumerate(pairs):
        column = [line[index] for line in times]
        rows.append({"layer": pair.name, "times": pair.times, "parts": pair.parts, **medians(column)})
    sums = [
        (
            sum(p.times * t[0] for p, t in zip(pairs, line, strict=True)),
            sum(p.times * t[1] for p, t in zip(pairs, line, strict=True)),
        )
        for line in times
    ]
    return rows, medians(sums)


def medians(column: list[tuple[float, float]]) -> dict[str, float]:
    return {
        "float_ms": 1e3 * statistics.median(one for one, _ in column),
        "integer_ms": 1e3 * statistics.median(other for _, other in column),
        "ratio": statistics.median(other / one for one, other in column),
    }


def show(title: str, rows: list[dict[str, object]], total: dict[str, float]) -> None:
    print(f"\n{title}\n{'layer':28} {'times':>5} {'parts':>5} {'float ms':>9} {'integer ms':>10} {'ratio':>6}")
    for row in [*rows, {"layer": "sum", "times": "", "parts": "", **total}]:
        figures = f"{row['float_ms']:9.3f} {row['integer_ms']:10.3f} {row['ratio']:6.2f}"
        print(f"{row['layer']:28} {row['times']:>5} {row['parts'] or '':>5} {figures}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--target", default="onnxruntime")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    results = []
    for batch in options.batch:
        for group, pairs in (
            ("convolutions", [conv_pair(shape, batch, options.target) for shape in CONVS]),
            ("other layers", other_pairs(batch, options.target)),
            ("whole network", [model_pair(batch, options.target)]),
        ):
            rows, total = measure(pairs, options.rounds, CLOCKS[options.clock])
            show(f"{group}, batch {batch}, {options.threads} threads, arithmetic of {options.target}", rows, total)
            results.append({"group": group, "batch": batch, "rows": rows, "sum": total})
    if options.json:
        environment = {"torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability()}
        figures = {
            "threads": options.threads,
            "rounds": options.rounds,
            "clock": options.clock,
            "target": options.target,
            **environment,
        }
        options.json.write_text(json.dumps({**figures, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()

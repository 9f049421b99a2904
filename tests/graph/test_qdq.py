"""The quantized_decomposed operators: the library's where it exists, ours where it does not, with the same bits.

A namespace can be defined once in a process, so each of the two forms has a process of its own: one in which the
library's module cannot be imported, one in which it can. They get the same calls from a file and answer in files.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qbench.graph import qdq
from qbench.graph.qdq import quantized_decomposed

LIBRARY_MODULE = "torch.ao.quantization.fx._decomposed"
NAMES = ["quantize_per_tensor", "dequantize_per_tensor", "quantize_per_channel", "dequantize_per_channel"]

BLOCK = f"""
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name == {LIBRARY_MODULE!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocker())
"""

# What both processes do. A model whose scales are literals (activation) and buffers (weight), as `convert` makes them.
COMMON = f"""
import gc, sys, torch
from qbench.graph import qdq

folder = sys.argv[1]
torch.set_num_threads(1)
before = [name for name in {NAMES!r} if hasattr(torch.ops.quantized_decomposed, name)]
ops = qdq.quantized_decomposed()
again = qdq.quantized_decomposed()
gc.collect()
answers = {{
    "registered before": before,
    "second call is the first": again is ops,
    "defined here": bool(qdq._LIBRARIES),
    "library imported": {LIBRARY_MODULE!r} in sys.modules,
    "schemas": {{name: str(getattr(ops, name).default._schema) for name in {NAMES!r}}},
}}

def call(op, args, kwargs):
    return getattr(ops, op).default(*args, **kwargs)

def on_meta(value):
    return value.to("meta") if isinstance(value, torch.Tensor) else value

calls = torch.load(folder + "/calls.pt", weights_only=True)
answers["results"] = {{key: call(*request) for key, request in calls.items()}}
answers["meta"] = {{
    key: (lambda r: [str(r.dtype), list(r.shape), r.device.type])(call(op, [on_meta(a) for a in args], kwargs))
    for key, (op, args, kwargs) in calls.items()
}}
"""

EXPORT = """
class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("codes", torch.arange(-30, 30).reshape(4, 15).to(torch.int8))
        self.register_buffer("scales", torch.tensor([0.1, 0.03, 1 / 3, 0.7]))
        self.register_buffer("zero_points", torch.zeros(4, dtype=torch.int64))

    def forward(self, x):
        x = ops.quantize_per_tensor.default(x, 0.0371, 5, -128, 127, torch.int8)
        x = ops.dequantize_per_tensor.default(x, 0.0371, 5, -128, 127, torch.int8)
        weight = ops.dequantize_per_channel.default(
            self.codes, self.scales, self.zero_points, 0, -127, 127, torch.int8
        )
        x = torch.nn.functional.linear(x, weight)
        return ops.quantize_per_channel.default(x, self.scales, self.zero_points, 1, -128, 127, torch.int8)

x = torch.load(folder + "/x.pt", weights_only=True)
batch = torch.export.Dim("batch", min=2, max=64)
program = torch.export.export(Model(), (x,), strict=False, dynamic_shapes=({0: batch},))
program.validate()
answers["targets"] = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
answers["eager"], answers["program"] = Model()(x), program.module()(x)
answers["smaller batch"] = torch.equal(program.module()(x[:3]), Model()(x[:3]))
torch.export.save(program, folder + "/program.pt2")
torch.save(answers, folder + "/defined.pt")
"""

LOAD = """
x = torch.load(folder + "/x.pt", weights_only=True)
answers["program"] = torch.export.load(folder + "/program.pt2").module()(x)
torch.save(answers, folder + "/found.pt")
"""

Call = tuple[str, list[Any], dict[str, Any]]


def per_tensor_calls() -> dict[str, Call]:
    calls: dict[str, Call] = {}
    ranges = {
        "int4": (-8, 7, torch.int8),
        "int8": (-128, 127, torch.int8),
        "narrow": (-127, 127, torch.int8),
        "uint8": (0, 255, torch.uint8),
        "int16": (-(2**15), 2**15 - 1, torch.int16),
        "int32": (-(2**31), 2**31 - 1, torch.int32),
    }
    for name, (qmin, qmax, dtype) in ranges.items():
        for scale in (2.0**-100, 3.1e-5, 0.1, 1 / 3, 1.0, 1e20):
            # steps of a half: every second value is a tie
            x = torch.randint(2 * max(qmin, -(2**23)), 2 * min(qmax, 2**23), (500,)) / 2 * scale
            x = torch.cat([x.float(), torch.randn(500) * scale * 40, torch.tensor([0.0, -0.0, -torch.inf])])
            for zero_point in (0, 3):
                grid = [scale, zero_point, qmin, qmax, dtype]
                calls[f"q {name} {scale} {zero_point}"] = ("quantize_per_tensor", [x, *grid], {})
                codes = torch.randint(qmin, qmax + 1, (1000,)).to(dtype)
                calls[f"dq {name} {scale} {zero_point}"] = ("dequantize_per_tensor", [codes, *grid], {})
    half = torch.randn(300).to(torch.bfloat16)
    codes = torch.arange(-128, 128).to(torch.int8)
    grid = [0.1, 3, -128, 127, torch.int8]
    calls["q bfloat16"] = ("quantize_per_tensor", [half, *grid], {})
    calls["q float16"] = ("quantize_per_tensor", [half.half(), *grid], {})
    calls["dq to float16"] = ("dequantize_per_tensor", [codes, *grid], {"out_dtype": torch.float16})
    calls["dq to bfloat16"] = ("dequantize_per_tensor", [codes, *grid], {"out_dtype": torch.bfloat16})
    return calls


def per_channel_calls() -> dict[str, Call]:
    calls: dict[str, Call] = {}
    scales = torch.tensor([2.0**-20, 0.1, 1 / 3, 1.0, 77.7])
    zero_points = torch.tensor([0, 1, -3, 7, -8])
    for axis, shape in [(0, (5,)), (0, (5, 60)), (1, (4, 5, 30)), (3, (2, 3, 4, 5))]:
        across = scales.reshape([-1 if dim == axis else 1 for dim in range(len(shape))])
        x = torch.randint(-300, 300, shape) / 2 * across
        codes = torch.randint(-127, 128, shape).to(torch.int8)
        grid = [scales, zero_points, axis, -127, 127, torch.int8]
        calls[f"q channel {axis} {shape}"] = ("quantize_per_channel", [x, *grid], {})
        calls[f"dq channel {axis} {shape}"] = ("dequantize_per_channel", [codes, *grid], {})
        calls[f"dq channel {axis} {shape} no zero points"] = (
            "dequantize_per_channel",
            [codes, scales, None, *grid[2:]],
            {},
        )
    bias = torch.tensor([2**31 - 1, -(2**31), 2**24 + 1, -(2**22), 12345], dtype=torch.int32)
    grid = [scales, torch.zeros(5, dtype=torch.int64), 0, -(2**31), 2**31 - 1, torch.int32]
    calls["dq int32 bias"] = ("dequantize_per_channel", [bias, *grid], {})
    return calls


CALLS_SEED = 11


def library_calls() -> dict[str, Call]:
    torch.manual_seed(CALLS_SEED)
    return {**per_tensor_calls(), **per_channel_calls()}


@dataclasses.dataclass(frozen=True)
class Answers:
    """What the two processes answered: ours in `defined`, the library's in `found`."""

    defined: dict[str, Any]
    found: dict[str, Any]


def run_python(code: str, folder: Path) -> None:
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Answers:
    folder = tmp_path_factory.mktemp("qdq")
    torch.save(library_calls(), folder / "calls.pt")
    torch.save(torch.randn(60, 15), folder / "x.pt")
    run_python(BLOCK + COMMON + EXPORT, folder)
    run_python(COMMON + LOAD, folder)
    defined, found = (torch.load(folder / f"{name}.pt", weights_only=True) for name in ("defined", "found"))
    return Answers(defined, found)


def same_bits(left: Tensor, right: Tensor) -> bool:
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    as_bytes = [t.contiguous().reshape(-1).view(torch.uint8) for t in (left, right)]
    return torch.equal(*as_bytes)


def test_each_process_is_what_it_says(answers: Answers) -> None:
    assert answers.defined["defined here"] and not answers.defined["library imported"]
    assert answers.found["library imported"] and not answers.found["defined here"]


def test_importing_the_module_registers_nothing(answers: Answers) -> None:
    assert answers.defined["registered before"] == []
    assert answers.found["registered before"] == []


def test_a_second_call_is_harmless(answers: Answers) -> None:
    assert answers.defined["second call is the first"]
    assert answers.found["second call is the first"]


@pytest.mark.parametrize("name", NAMES)
def test_schemas_are_the_librarys(answers: Answers, name: str) -> None:
    assert answers.defined["schemas"][name] == answers.found["schemas"][name]


@pytest.mark.parametrize("key", library_calls())
def test_bits_are_the_librarys(answers: Answers, key: str) -> None:
    assert same_bits(answers.defined["results"][key], answers.found["results"][key])


def test_bits_are_those_of_the_operators_in_this_process(answers: Answers) -> None:
    """Whatever registered them here, in a process where nothing was blocked."""
    ops = quantized_decomposed()
    for key, (name, args, kwargs) in library_calls().items():
        assert same_bits(getattr(ops, name).default(*args, **kwargs), answers.defined["results"][key]), key


def test_meta_tensors_give_dtype_and_shape(answers: Answers) -> None:
    for key, result in answers.defined["results"].items():
        assert answers.defined["meta"][key] == [str(result.dtype), list(result.shape), "meta"], key
    assert answers.defined["meta"] == answers.found["meta"]


def test_they_stay_whole_in_an_exported_program(answers: Answers) -> None:
    expected = ["quantize_per_tensor", "dequantize_per_tensor", "dequantize_per_channel", "quantize_per_channel"]
    quantized = [target for target in answers.defined["targets"] if target.startswith("quantized_decomposed")]
    assert quantized == [f"quantized_decomposed.{name}.default" for name in expected]
    assert "aten.linear.default" in answers.defined["targets"]


def test_an_exported_program_computes_what_eager_does(answers: Answers) -> None:
    assert same_bits(answers.defined["program"], answers.defined["eager"])
    assert answers.defined["smaller batch"]
    assert answers.defined["eager"].unique().numel() > 30  # the comparison has something to compare


def test_a_program_saved_with_ours_runs_with_the_librarys(answers: Answers) -> None:
    assert same_bits(answers.found["program"], answers.defined["program"])


def test_the_first_call_here_warns_of_nothing_and_returns_the_namespace() -> None:
    """Warnings are errors in these tests: finding the library's operators must not raise its deprecation."""
    assert quantized_decomposed() is torch.ops.quantized_decomposed
    assert quantized_decomposed() is torch.ops.quantized_decomposed


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dequantize_per_channel_to_half_precision(dtype: torch.dtype) -> None:
    codes, scales = torch.arange(-60, 60).reshape(3, 40).to(torch.int8), torch.tensor([0.1, 1 / 3, 0.7])
    args = (codes, scales, torch.tensor([3, 0, -1]), 0, -128, 127, torch.int8)
    expected = quantized_decomposed().dequantize_per_channel(*args, out_dtype=dtype)
    assert expected.dtype == dtype
    assert same_bits(qdq._dequantize_per_channel(*args, out_dtype=dtype), expected)

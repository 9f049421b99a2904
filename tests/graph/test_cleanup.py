"""Removing redundant q/dq: what goes is counted, and outputs are compared bit for bit before and after."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from qbench.errors import PassError
from qbench.graph.cleanup import remove_redundant_qdq
from qbench.graph.qdq import quantized_decomposed
from qbench.graph.recognise import is_dequantize, is_quantize

# torch.export's own deepcopy, inside run_decompositions.
pytestmark = pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec:FutureWarning")

ARGS = (0.05, 3, -128, 127, torch.int8)
OTHER = (0.04, 3, -128, 127, torch.int8)
CLIPS = (0.05, 3, -100, 100, torch.int8)
WIDE = (1e-6, 0, -(2**31), 2**31 - 1, torch.int32)
# 1/s overflows in float32, so codes do not come back.
TINY = (1e-39, 0, -128, 127, torch.int8)


def q(x: Tensor, args: tuple = ARGS) -> Tensor:
    return quantized_decomposed().quantize_per_tensor.default(x, *args)


def dq(x: Tensor, args: tuple = ARGS) -> Tensor:
    return quantized_decomposed().dequantize_per_tensor.default(x, *args)


def fq(x: Tensor, args: tuple = ARGS) -> Tensor:
    return dq(q(x, args), args)


def export(function: Callable[..., object], *inputs: Tensor) -> ExportedProgram:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("weight", torch.randint(-127, 128, (4, 4), dtype=torch.int8))
            self.register_buffer("unused", torch.ones(3))

        def forward(self, *args: Tensor) -> object:
            return function(*args, self.weight) if function.__code__.co_argcount > len(args) else function(*args)

    return torch.export.export(Model(), inputs, strict=False)


def count(program: ExportedProgram) -> tuple[int, int]:
    nodes = list(program.graph.nodes)
    return sum(map(is_quantize, nodes)), sum(map(is_dequantize, nodes))


def write_in_place(x: Tensor) -> Tensor:
    first = fq(x)
    return torch.relu_(first) + fq(x)


def write_between(x: Tensor) -> Tensor:
    y = x * 2
    before = fq(y)
    y.add_(1.0)
    return before + fq(y)


def write_through_view(x: Tensor) -> Tensor:
    y = x * 2
    before = fq(y)
    y.view(-1)[1:].add_(1.0)
    return before + fq(y)


# name: (function, (q, dq) before, (q, dq) after)
CASES = {
    "same q, same dq": (lambda x: fq(x).relu() + fq(x), (2, 2), (1, 1)),
    "other scale stays": (lambda x: fq(x) + fq(x, OTHER), (2, 2), (2, 2)),
    "dq q dq": (lambda x: fq(fq(x)).relu(), (2, 2), (1, 1)),
    "dq q dq q dq": (lambda x: fq(fq(fq(x))).relu(), (3, 3), (1, 1)),
    "requantize stays": (lambda x: fq(fq(x), OTHER).relu(), (2, 2), (2, 2)),
    "narrower limits stay": (lambda x: fq(fq(x), CLIPS).relu(), (2, 2), (2, 2)),
    "codes from a wider q stay": (lambda x: fq(dq(q(x), CLIPS), CLIPS), (2, 2), (2, 2)),
    "codes from a narrower q": (lambda x: fq(dq(q(x, CLIPS))), (2, 2), (1, 1)),
    "int32 stays": (lambda x: fq(fq(x, WIDE), WIDE), (2, 2), (2, 2)),
    "scale that loses codes stays": (lambda x: fq(fq(x, TINY), TINY), (2, 2), (2, 2)),
    "a view between stays": (lambda x: fq(fq(x).view(-1)), (2, 2), (2, 2)),
    "stored codes": (lambda x, w: x @ fq(dq(w)) + dq(w), (1, 3), (0, 1)),
    "both are outputs": (lambda x: (fq(x), fq(x)), (2, 2), (1, 1)),
    "codes are an output": (lambda x: (q(x), q(dq(q(x)))), (3, 1), (1, 0)),
    "dead code": (lambda x: (fq(x, OTHER), fq(x).relu())[1], (2, 2), (1, 1)),
    "dq written in place stays": (write_in_place, (2, 2), (1, 2)),
    "input written between stays": (write_between, (2, 2), (2, 2)),
    "input written through a view stays": (write_through_view, (2, 2), (2, 2)),
}


@pytest.mark.parametrize("name", CASES)
def test_counts_and_values(name: str) -> None:
    function, before, after = CASES[name]
    x = torch.randn(4, 4) * 5
    program = export(function, x)
    expected = program.module()(x.clone())
    assert count(program) == before
    removed = remove_redundant_qdq(program)
    assert count(program) == after
    assert removed == sum(before) - sum(after)
    assert remove_redundant_qdq(program) == 0
    program.validate()
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    for form in (program, torch.export.load(file)):
        torch.testing.assert_close(form.module()(x.clone()), expected, rtol=0, atol=0)


def test_unused_stored_tensors_go() -> None:
    program = export(lambda x: fq(x), torch.randn(4))
    assert {"weight", "unused"} <= set(program.state_dict)
    remove_redundant_qdq(program)
    assert not program.state_dict and len(program.graph_signature.input_specs) == 1


def test_on_a_graph_module() -> None:
    x = torch.randn(4, 4) * 5
    module = export(lambda x: fq(fq(x)).relu() + fq(x), x).module()
    expected = module(x)
    assert remove_redundant_qdq(module) == 4
    assert torch.equal(module(x), expected)


def test_buffer_that_is_written_back_keeps_its_own_q() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("last", torch.zeros(4, dtype=torch.int8))

        def forward(self, x: Tensor) -> Tensor:
            self.last.copy_(q(x))
            return dq(q(x)).relu()

    program = torch.export.export(Model(), (torch.randn(4),), strict=False).run_decompositions({})
    x = torch.randn(4)
    remove_redundant_qdq(program)
    module = program.module()
    assert torch.equal(module(x), fq(x).relu())
    assert torch.equal(module.last, q(x))


def test_something_else_is_refused() -> None:
    with pytest.raises(PassError, match=r"got Linear.*qbench\.convert"):
        remove_redundant_qdq(nn.Linear(1, 1))

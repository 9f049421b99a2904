"""No rewrite changes a value, and each gives the form that its runtime matches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import hand_programs as hand
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import ExportedProgram

from qbench.export.onnx_form import to_onnx_form
from qbench.export.program import copy_program, output_names
from qbench.export.xnnpack_form import to_xnnpack_form
from qbench.graph.dialect import packet
from qbench.graph.qdq import quantized_decomposed

aten = torch.ops.aten
FOUR_BITS = (-8, 7, torch.int8)
UINT8 = (0, 255, torch.uint8)
IMAGE = (2, 8, 9, 9)


class Between(nn.Module):
    """A convolution, then `body` on its reals."""

    def __init__(self, body: Callable[[Tensor], Tensor], **options: object) -> None:
        super().__init__()
        self.body = body
        self.conv = hand.Layer((8, 8, 3, 3), 0.02, (0.02, 5), padding=1, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.conv(hand.qdq(x, 0.02, 3)))


class After(nn.Module):
    """A layer of its own after `body`."""

    def __init__(self, body: Callable[[Tensor], Tensor], shape: tuple[int, ...], **options: object) -> None:
        super().__init__()
        self.body, self.layer = body, hand.Layer(shape, 0.02, (0.03, -4), **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.body(hand.qdq(x, 0.02, 3)))


class Codes(nn.Module):
    """Codes are read by a dequantize op and are an output as well."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        ops = quantized_decomposed()
        codes = ops.quantize_per_tensor.default(x, 0.03125, 3, *hand.INT8)
        return codes, ops.dequantize_per_tensor.default(codes, 0.03125, 3, *hand.INT8)


def clamped(bounds: Callable[[Tensor], Tensor], span: tuple = hand.INT8, zero_point: int = 5) -> nn.Module:
    scale = 0.3 if span is FOUR_BITS else 0.02
    module = Between(lambda x: x)
    module.conv.activation, module.conv.span, module.conv.out = bounds, span, (scale, min(zero_point, span[1]))
    return module


def joined(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=1)
    return hand.qdq(F.relu6(first + second), 0.02, 0)


def shuffled(x: Tensor) -> Tensor:
    return joined(hand.qdq(torch.cat(x.split([3, 1, 4], dim=-3)[::-1], 1), 0.02, 0))


CASES: dict[str, nn.Module] = {
    "relu at a bound": clamped(F.relu, zero_point=-128),
    "relu inside the range": clamped(F.relu),
    "relu6 inside the range": clamped(F.relu6),
    "hardtanh": clamped(lambda x: F.hardtanh(x, -0.7, 0.4)),
    "clamp from below": clamped(lambda x: x.clamp(min=-0.3)),
    "clamp from above": clamped(lambda x: x.clamp(max=0.3)),
    "clamp of a clamp": clamped(lambda x: F.hardtanh(F.relu6(x), -1.0, 0.3)),
    "clamps that do not overlap": clamped(lambda x: F.hardtanh(x.clamp(max=-0.5), 0.2, 0.4)),
    "four bits": clamped(lambda x: x, FOUR_BITS),
    "four bits, relu": clamped(F.relu, FOUR_BITS, -3),
    "uint8": clamped(F.relu, UINT8, 128),
    "add, relu6, four bits": Between(lambda x: hand.qdq(F.relu6(x + x), 0.3, -8, FOUR_BITS)),
    "chunks, add": Between(joined),
    "uneven splits, from the end": Between(shuffled),
    "a part that nothing reads": Between(lambda x: hand.qdq(F.relu6(x.split(3, 1)[1]), 0.02, 0)),
    "view before a linear": After(lambda x: x.flatten(1), (5, 648)),
    "linear on 4 dims": After(lambda x: x, (5, 9)),
    "linear on 4 dims, relu": After(lambda x: x.permute(0, 2, 3, 1), (5, 8), activation=F.relu),
    "linear on 1 dim": After(lambda x: x.flatten(), (24, 1296)),
    "max pool before a conv": After(lambda x: F.max_pool2d(x, 2), (5, 8, 3, 3)),
    "relu before a conv": After(F.relu, (5, 8, 3, 3)),
    "zero pad before a conv": After(lambda x: F.pad(x, (1, 1, 1, 1)), (5, 8, 3, 3)),
    "mean without its dims": After(lambda x: hand.qdq(x.mean([2, 3]), 0.02, -3), (5, 8)),
    "mean that is the output": Between(lambda x: hand.qdq(x.mean((-1, -2)), 0.02, -3)),
    "mean over channels": Between(lambda x: hand.qdq(x.mean(1), 0.02, -3)),
    "4-bit weights": After(lambda x: x, (5, 8, 3, 3), levels=7, weight_range=(-8, 7)),
    "codes as an output": Codes(),
}


@pytest.mark.parametrize("form", [to_onnx_form, to_xnnpack_form])
@pytest.mark.parametrize("case", CASES)
def test_no_value_changes(case: str, form: Callable[[ExportedProgram], ExportedProgram]) -> None:
    program = hand.export(CASES[case], torch.randn(IMAGE))
    before = str(program.graph)
    rewritten = form(copy_program(program))
    rewritten.validate()
    # A real copy of the program runs, so a broken signature (an output that was renamed) shows.
    rewritten = torch.export.export(rewritten.module(), (torch.randn(IMAGE),), strict=False)
    x = torch.randn(IMAGE)
    expected, got = (torch.utils._pytree.tree_leaves(p.module()(x)) for p in (program, rewritten))
    assert len(expected[0].unique()) >= (1 if "overlap" in case else 5)
    for a, b in zip(expected, got, strict=True):
        assert torch.equal(a, b) and a.dtype == b.dtype
    assert str(program.graph) == before, "the caller's program changed"


@pytest.mark.parametrize("case", [case for case in CASES if case not in ("4-bit weights", "codes as an output")])
def test_every_onnx_op_stands_between_dequantize_and_quantize(case: str) -> None:
    ops = quantized_decomposed()
    program = to_onnx_form(copy_program(hand.export(CASES[case], torch.randn(IMAGE))))
    compute = [node for node in program.graph.nodes if packet(node.target) in (aten.conv2d, aten.linear, aten.add)]
    assert compute
    for node in compute:
        assert node.args[0].target is ops.dequantize_per_tensor.default
        assert [reader.target for reader in node.users] == [ops.quantize_per_tensor.default]
        assert next(iter(node.users)).args[3:] == UINT8
        assert packet(node.target) is not aten.linear or node.args[0].meta["val"].dim() == 2


@pytest.mark.parametrize(
    ("case", "clips"),
    [("relu at a bound", 0), ("relu inside the range", 1), ("four bits", 1), ("uint8", 1), ("4-bit weights", 0)],
)
def test_a_clip_stands_only_where_the_range_does_not_do_it(case: str, clips: int) -> None:
    program = to_onnx_form(copy_program(hand.export(CASES[case], torch.randn(IMAGE))))
    found = Counter(packet(node.target) for node in program.graph.nodes)
    assert found[aten.clamp] == clips and found[aten.relu] == 0


@pytest.mark.parametrize(
    ("case", "activations"),
    [
        ("relu inside the range", [aten.relu]),
        ("relu6 inside the range", [aten.hardtanh]),
        ("clamp from below", [aten.hardtanh]),
        ("four bits", [aten.hardtanh]),
        ("add, relu6, four bits", [aten.hardtanh]),
    ],
)
def test_xnnpack_gets_activations_that_it_fuses(case: str, activations: list) -> None:
    program = to_xnnpack_form(copy_program(hand.export(CASES[case], torch.randn(IMAGE))))
    found = [packet(node.target) for node in program.graph.nodes]
    assert [op for op in found if op in (aten.relu, aten.relu6, aten.clamp, aten.hardtanh)] == activations
    for node in program.graph.nodes:
        if node.target is quantized_decomposed().quantize_per_tensor.default:
            assert node.args[3:] == hand.INT8


def test_xnnpack_gets_slices_for_splits() -> None:
    program = to_xnnpack_form(copy_program(hand.export(CASES["uneven splits, from the end"], torch.randn(IMAGE))))
    found = Counter(packet(node.target) for node in program.graph.nodes)
    assert found[aten.slice] == 5 and not found.keys() & {aten.split, aten.split_with_sizes, aten.chunk}


def test_a_dynamic_batch_is_inferred_and_not_computed() -> None:
    program = hand.residual()
    for form in (to_onnx_form, to_xnnpack_form):
        rewritten = form(copy_program(program))
        assert not any(node.target is aten.sym_size.int for node in rewritten.graph.nodes)
        for count in (1, 5, 33):
            x = torch.randn(count, 3, 32, 32)
            assert torch.equal(rewritten.module()(x), program.module()(x))


class Outputs(nn.Module):
    def __init__(self, wrap: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.wrap = wrap

    def forward(self, x: Tensor) -> object:
        return self.wrap(hand.qdq(x, 0.02, 3))


@pytest.mark.parametrize(
    ("wrap", "names"),
    [
        (lambda y: y, ["output"]),
        (lambda y: (y, y + 1), ["output_0", "output_1"]),
        (lambda y: {"out": y, "aux": y + 1}, ["out", "aux"]),
        (lambda y: {"x": y, "nested": (y + 1, y + 2)}, ["x_out", "nested_0", "nested_1"]),
    ],
)
def test_outputs_have_the_names_of_what_the_model_returns(wrap: Callable, names: list[str]) -> None:
    assert output_names(hand.export(Outputs(wrap), torch.randn(2, 3))) == names

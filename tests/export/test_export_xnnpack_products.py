"""Matrix products in ExecuTorch files, loaded in a fresh process.

Those by a stored matrix have the integer program's codes, every one; those that ExecuTorch computes in float have them
up to the rounding of float sums.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import hand_programs as hand
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from qbench.errors import ExportError
from qbench.export import to_executorch
from qbench.export.processes import FileRunner
from qbench.graph.qdq import quantized_decomposed
from qbench.passes import fuse_qdq

pytest.importorskip("executorch")

FIRST, SECOND, OUT = (0.02, 3), (0.03, -7), (0.05, 4)
SIZES = (5, 1, 8, 3)


class Products(nn.Module):
    """`q(call(activations, w, b))`, its activations behind a linear each, `w` (8, 8) with 8 scales or one."""

    def __init__(
        self, call: Callable[..., Tensor], *, zero_point: int = 0, per_channel: bool = False, quantized: bool = True
    ) -> None:
        super().__init__()
        self.call, self.zero_point, self.per_channel, self.quantized = call, zero_point, per_channel, quantized
        self.layers = nn.ModuleList(hand.Layer((8, 8), 0.02, grid) for grid in (FIRST, SECOND))
        self.register_buffer("codes", torch.randint(-127, 128, (8, 8), dtype=torch.int8))
        self.register_buffer("scales", 0.002 + 0.01 * torch.rand(8))
        self.register_buffer("zeros", torch.zeros(8, dtype=torch.int64))
        self.register_buffer("bias", torch.randn(8))

    def forward(self, *inputs: Tensor) -> Tensor:
        ops = quantized_decomposed()
        real = [layer(hand.qdq(x, 0.02, 0)) for layer, x in zip(self.layers, inputs, strict=False)]
        if self.per_channel:
            w = ops.dequantize_per_channel.default(self.codes, self.scales, self.zeros, 1, -127, 127, torch.int8)
        else:
            w = ops.dequantize_per_tensor.default(self.codes, hand.f32(0.007), self.zero_point, *hand.INT8)
        y = self.call(*real, w, self.bias)
        return hand.qdq(y, *OUT) if self.quantized else y


def addmm(x: Tensor, y: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return torch.addmm(b, x, y)


STACK, MATRICES = ((5, 6, 8),), ((5, 8), (8, 8))
STORED = {
    "a matrix by a stored one": (Products(lambda x, w, b: x @ w), ((5, 8),)),
    "a stack by a stored matrix": (Products(lambda x, w, b: x @ w), STACK),
    "four dims by a stored matrix": (Products(lambda x, w, b: x @ w), ((5, 2, 3, 8),)),
    "a scale per column": (Products(lambda x, w, b: x @ w, per_channel=True), STACK),
    "a view of a stored matrix": (Products(lambda x, w, b: x @ w.t()), STACK),
    "a relu": (Products(lambda x, w, b: F.relu(x @ w)), STACK),
    "a relu6": (Products(lambda x, w, b: F.relu6(x @ w)), STACK),
}
FLOAT = {
    "two matrices": (Products(lambda x, y, w, b: x @ y), MATRICES),
    "mm": (Products(lambda x, y, w, b: torch.mm(x, y)), MATRICES),
    "a transposed one": (Products(lambda x, y, w, b: x @ y.t()), MATRICES),
    "clamped": (Products(lambda x, y, w, b: F.relu6(x @ y)), MATRICES),
    "probabilities": (Products(lambda x, y, w, b: x.softmax(-1) @ y), MATRICES),
    "addmm": (Products(addmm), MATRICES),
    "addmm with factors": (Products(lambda x, y, w, b: torch.addmm(b, x, y, alpha=0.5, beta=2)), MATRICES),
    "addmm of a stored matrix, with factors": (Products(lambda x, w, b: torch.addmm(b, x, w, alpha=0.5)), ((5, 8),)),
    "addmm to an activation": (Products(lambda x, y, w, b: torch.addmm(x, x, y)), MATRICES),
    "a stack by an activation": (Products(lambda x, y, w, b: x @ y), ((5, 6, 8), (8, 8))),
    "a zero point": (Products(lambda x, w, b: x @ w, zero_point=9), STACK),
    "a bias behind": (Products(lambda x, w, b: x @ w + b), STACK),
    "probabilities by a stored one": (Products(lambda x, w, b: x.softmax(-1) @ w), STACK),
    "scales along the rows": (Products(lambda x, w, b: x @ w.t(), per_channel=True), STACK),
}  # fmt: skip
KEPT = {
    "addmm of a stored matrix, with factors": "its result is read in float",
    "a zero point": "its weight has a zero point",
    "a bias behind": "its result is read in float",
    "probabilities by a stored one": "its input is in float",
    "scales along the rows": "differ within an output channel",
}
CASES = STORED | FLOAT


def export(case: str) -> ExportedProgram:
    """The program, with a dynamic batch in the first input."""
    model, shapes = CASES[case]
    dynamic = ({0: Dim("batch", min=1, max=16)}, *[None for _ in shapes[1:]])
    return hand.export(model, *map(torch.randn, shapes), dynamic_shapes=(dynamic,))


def batches(case: str) -> list[list[Tensor]]:
    torch.manual_seed(len(case))
    first, *others = CASES[case][1]
    return [[torch.randn(size, *first[1:]) * 2, *[torch.randn(shape) * 2 for shape in others]] for size in SIZES]


#: Every path once; the others take minutes.
QUICK = ("a stack by a stored matrix", "two matrices", "a zero point")


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case in QUICK else pytest.mark.slow) for case in CASES]
)
def test_codes_are_those_of_the_integer_program(case: str, tmp_path: Path) -> None:
    program = export(case)
    with torch.no_grad():
        report = to_executorch(program, tmp_path / "products.pte")
    reasons = [layer.reason for layer in report.kept_in_float]
    assert len(reasons) == (case in KEPT) and all(KEPT[case] in reason for reason in reasons), reasons
    fused = fuse_qdq(program, target="xnnpack")
    assert (case in STORED) == fused.integer == (report.float_nodes == ()), (str(fused), str(report))
    found = []
    with FileRunner("executorch", [report.path]) as runner, torch.no_grad():
        for batch in batches(case):
            [got] = runner.run([x.numpy() for x in batch])
            codes, wanted = (hand.output_codes(y, *OUT) for y in (got, program.module()(*batch).numpy()))
            # A product in float sums in an order of its own: a value at the middle between two codes may go either way.
            assert int(np.abs(codes - wanted).max()) <= (case in FLOAT)
            assert int((codes != wanted).sum()) <= (0.02 * codes.size if case in FLOAT else 0)
            found.append(codes)
    assert len(np.unique(np.concatenate(found))) > 15


@pytest.mark.parametrize("call", [addmm, lambda x, y, w, b: F.linear(x, y), lambda x, y, w, b: F.linear(x, y, b)])
def test_a_computed_weight_is_called_that(call: Callable[..., Tensor]) -> None:
    program = hand.export(Products(call), *map(torch.randn, MATRICES))
    report = fuse_qdq(program, target="onnxruntime")
    assert [entry for entry in report.left_float if "its weight is computed while the program runs" in entry.reason]
    assert "zero point" not in str(report)


@pytest.mark.slow
def test_a_linear_read_in_float_is_computed_in_float(tmp_path: Path) -> None:
    model = Products(lambda x, w, b: F.linear(x, w, b), quantized=False)
    program = hand.export(model, x := torch.randn(5, 8))
    report = to_executorch(program, tmp_path / "linear.pte")
    assert [layer.reason for layer in report.kept_in_float] == ["its result is read in float"]
    with FileRunner("executorch", [report.path]) as runner:
        [got] = runner.run([x.numpy()])
    assert float(np.abs(got - program.module()(x).numpy()).max()) < 1e-5 < float(np.abs(got).max())


def test_what_would_be_wrong_is_refused(tmp_path: Path) -> None:
    """A convolution whose weight is computed, for which there is no other form."""

    def convolve(image: Tensor, kernel: Tensor) -> Tensor:
        return hand.qdq(F.conv2d(F.relu(hand.qdq(image, *FIRST)), hand.qdq(kernel, *SECOND)), *OUT)

    class Convolve(nn.Module):
        def forward(self, image: Tensor, kernel: Tensor) -> Tensor:
            return convolve(image, kernel)

    program = hand.export(Convolve(), torch.randn(2, 4, 6, 6), torch.randn(8, 4, 3, 3))
    with pytest.raises(ExportError, match=r"aten.convolution \(.*outside of XNNPACK.*exclude=True"):
        to_executorch(program, tmp_path / "convolve.pte")
    assert not (tmp_path / "convolve.pte").exists()

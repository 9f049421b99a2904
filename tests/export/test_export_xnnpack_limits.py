"""What XNNPACK refuses at load: files of it load, run, and give the program's values; the report says what changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import hand_programs as hand
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qbench.errors import ExportError
from qbench.export import ExecutorchReport, to_executorch
from qbench.export.runtimes import run_executorch
from qbench.graph.qdq import quantized_decomposed
from qbench.numerics.arithmetic import Grid, xnnpack

pytest.importorskip("executorch")


class Calls(nn.Module):
    def __init__(self, function: Callable[..., object]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> object:
        return self.function(*inputs)


def quantize(x: Tensor, scale: float, zero_point: int) -> Tensor:
    return quantized_decomposed().quantize_per_tensor.default(x, hand.f32(scale), zero_point, *hand.INT8)


def dequantize(x: Tensor, scale: float, zero_point: int) -> Tensor:
    return quantized_decomposed().dequantize_per_tensor.default(x, hand.f32(scale), zero_point, *hand.INT8)


def run(model: nn.Module, folder: Path, *inputs: Tensor) -> tuple[ExecutorchReport, list[np.ndarray], list[Tensor]]:
    """The report, what the file gives and what the program gives."""
    with torch.no_grad():
        program = hand.export(model, *inputs)
        expected = program.module()(*inputs)
        report = to_executorch(program, folder / "limits.pte")
    [outputs] = run_executorch(report.path, [[x.numpy() for x in inputs]], 1)
    return report, outputs, list(expected) if isinstance(expected, (tuple, list)) else [expected]


def steep(shape: tuple[int, ...], ratio: float, **options: object) -> hand.Layer:
    """A layer with `s_in·s_w / s_out` of `ratio` in one channel, input scale 0.02, output scale 0.015."""
    layer = hand.Layer(shape, 0.02, (0.015, 9), **options)
    scales = layer.scales.clone()
    scales[-1] = ratio * hand.f32(0.015) / 0.02
    layer.bias = layer.bias / layer.scales * scales
    layer.scales = scales
    return layer


class Volume(nn.Module):
    """A convolution of three dimensions, its weight per tensor or per channel."""

    def __init__(self, per_channel: bool) -> None:
        super().__init__()
        self.per_channel = per_channel
        self.register_buffer("codes", torch.randint(-127, 128, (8, 4, 3, 3, 3), dtype=torch.int8))
        self.register_buffer("scales", torch.full((8,), 0.01))
        self.register_buffer("zeros", torch.zeros(8, dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        ops, span = quantized_decomposed(), (-127, 127, torch.int8)
        if self.per_channel:
            weight = ops.dequantize_per_channel.default(self.codes, self.scales, self.zeros, 0, *span)
        else:
            weight = ops.dequantize_per_tensor.default(self.codes, 0.01, 0, *span)
        return hand.qdq(F.conv3d(hand.qdq(x, 0.02, 3), weight), 0.05, 3)


@pytest.mark.parametrize("per_channel", [True, False])
def test_a_convolution_of_three_dimensions_is_refused(per_channel: bool, tmp_path: Path) -> None:
    """The file would be written, and fail at its first batch."""
    program = hand.export(Volume(per_channel), torch.randn(1, 4, 6, 6, 6))
    with pytest.raises(ExportError, match=r"no convolution of three dimensions \(conv3d\): use\s+to_onnx"):
        to_executorch(program, tmp_path / "volume.pte")
    assert not (tmp_path / "volume.pte").exists()


class Steep(nn.Module):
    """A convolution and a linear at the limit, a clamped convolution below it."""

    def __init__(self) -> None:
        super().__init__()
        self.beyond = steep((6, 4, 3, 3), 257.0, padding=1)
        self.below = steep((6, 6, 1, 1), 255.9, activation=F.relu6)
        self.linear = steep((5, 6), 1000.0)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = hand.qdq(x, 0.02, 3)
        first = self.beyond(x)
        second = self.below(hand.qdq(first, 0.02, 3))
        pooled = hand.qdq(F.adaptive_avg_pool2d(hand.qdq(second, 0.02, 1), 1), 0.02, 1)
        return first, second, self.linear(torch.flatten(pooled, 1))


def test_a_ratio_of_scales_beyond_the_limit_stays_in_float_and_is_named(tmp_path: Path) -> None:
    torch.manual_seed(0)
    report, outputs, expected = run(Steep().eval(), tmp_path, torch.randn(4, 4, 12, 12))
    assert [kept.op for kept in report.kept_in_float] == ["aten.conv2d", "aten.linear"]
    assert [kept.name.split("/")[0] for kept in report.kept_in_float] == ["beyond", "linear"]
    assert "s_out is 257, and XNNPACK takes less than 256" in report.kept_in_float[0].reason
    assert "; kept in float: aten.conv2d beyond/" in str(report)
    assert {node.op for node in report.float_nodes} == {"aten.convolution", "aten.linear"}
    assert report.not_delegated == ()
    assert sum(node.op == "aten.convolution" and node.quantized for node in report.delegated) == 1
    for got, want in zip(outputs, expected, strict=True):
        codes = hand.output_codes(got, 0.015, 9)
        assert len(np.unique(codes)) > 3
        assert np.mean(codes != hand.output_codes(want.numpy(), 0.015, 9)) < 2e-3


def test_a_grouped_transposed_convolution_per_channel_stays_in_float(tmp_path: Path) -> None:
    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.register_buffer("codes", torch.randint(-127, 128, (4, 2, 2, 2), dtype=torch.int8))
            self.register_buffer("scales", torch.tensor([0.01, 0.02]))
            self.register_buffer("zero_points", torch.zeros(2, dtype=torch.int64))

        def forward(self, x: Tensor) -> Tensor:
            weight = quantized_decomposed().dequantize_per_channel.default(
                self.codes, self.scales, self.zero_points, 1, -127, 127, torch.int8
            )
            return quantize(F.conv_transpose2d(hand.qdq(x, 0.02, 3), weight, None, 2, groups=2), 0.05, 9)

    report, [got], [want] = run(Transposed(), tmp_path, torch.randn(2, 4, 9, 9))
    assert [kept.op for kept in report.kept_in_float] == ["aten.conv_transpose2d"]
    assert "2 groups" in str(report)
    assert len(np.unique(got)) > 50 and np.count_nonzero(got != want.numpy()) <= 1


GRID, OTHER = (0.1, 1), (0.03, -20)
#: Operations whose output codes are those of the program, whatever the two grids.
MOVES: dict[str, Callable[[Tensor], Tensor]] = {
    "view": lambda x: x.reshape(1, 16, 4, 4),
    "permute": lambda x: x.permute(0, 2, 1, 3),
    "max_pool2d": lambda x: F.max_pool2d(x, 2),
    "relu": F.relu,
    "relu6": F.relu6,
}


def all_codes() -> Tensor:
    return torch.arange(-128, 128).to(torch.int8).reshape(1, 4, 8, 8)


@pytest.mark.parametrize("from_codes", [True, False])
def test_moves_from_one_grid_to_another(tmp_path: Path, from_codes: bool) -> None:
    def all_moves(*inputs: Tensor) -> tuple[Tensor, ...]:
        reals = [dequantize(x, *GRID) if from_codes else hand.qdq(x, *GRID) for x in inputs]
        return tuple(quantize(move(x), *OTHER) for move, x in zip(MOVES.values(), reals, strict=True))

    given = [all_codes() if from_codes else dequantize(all_codes(), *GRID) for _ in MOVES]
    report, outputs, expected = run(Calls(all_moves), tmp_path, *given)
    assert report.not_delegated == () and report.kept_in_float == () and report.float_nodes == ()
    for name, got, want in zip(MOVES, outputs, expected, strict=True):
        assert np.count_nonzero(got != want.numpy()) == 0 and len(np.unique(got)) > 10, name


def test_cat_of_several_grids_and_several_readers(tmp_path: Path) -> None:
    def join(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        x, y, z = hand.qdq(a, *GRID), hand.qdq(b, *OTHER), hand.qdq(c, 0.05, 40, (0, 255, torch.uint8))
        joined = quantize(torch.cat([x, y, z, y], 1), 0.08, 5)
        return joined, quantize(y + x, 0.1, 3), quantize(F.relu6(torch.cat([y, x], 1)), 0.03, -100)

    inputs = [torch.randn(2, 4, 8, 8) * scale for scale in (4.0, 2.0, 3.0)]
    report, outputs, expected = run(Calls(join), tmp_path, *inputs)
    assert report.float_nodes == () and report.not_delegated == ()
    assert report.delegated_ops["aten.cat"] == 2
    x_grid, y_grid = (Grid(hand.f32(scale), zero_point, -128, 127) for scale, zero_point in (GRID, OTHER))
    x, y = xnnpack.quantize(inputs[0], x_grid), xnnpack.quantize(inputs[1], y_grid)
    # The sum is in fixed point there: at ties it is not that of the program.
    expected[1] = xnnpack.add(y, y_grid, x, x_grid, Grid(hand.f32(0.1), 3, -128, 127))
    for index, (got, want) in enumerate(zip(outputs, expected, strict=True)):
        assert len(np.unique(got)) > 50, index
        assert np.count_nonzero(got != want.numpy()) == 0, index


def test_gelu_keeps_its_tanh_form(tmp_path: Path) -> None:
    """On a fine grid the two GELUs differ in many codes; a file that holds the wrong one would not pass."""
    scale, x = 1e-4, torch.linspace(-3.2, -2.4, 4096)

    def both(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x, y = hand.qdq(x, 0.01, 120), hand.qdq(y, 0.01, 120)
        return quantize(F.gelu(x, approximate="tanh"), scale, 127), quantize(F.gelu(y), scale, 127)

    report, outputs, expected = run(Calls(both), tmp_path, x, x.clone())
    assert report.not_delegated == () and report.delegated_ops["aten.gelu"] == 1
    assert int((expected[0] != expected[1]).sum()) > 500
    for got, want in zip(outputs, expected, strict=True):
        assert np.count_nonzero(got != want.numpy()) == 0

"""Hand-made Q/DQ programs as `convert` emits them, and their codes by integer arithmetic, with no torch in it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import ExportedProgram

from qbench.graph.qdq import quantized_decomposed

INT8 = (-128, 127, torch.int8)


def f32(value: float) -> float:
    return float(np.float32(value))


def qdq(x: Tensor, scale: float, zero_point: int, span: tuple[int, int, torch.dtype] = INT8) -> Tensor:
    ops = quantized_decomposed()
    arguments = (f32(scale), zero_point, *span)
    return ops.dequantize_per_tensor.default(ops.quantize_per_tensor.default(x, *arguments), *arguments)


class Layer(nn.Module):
    """A convolution (4-dim weight) or linear (2-dim weight) of a converted model: `dq → op → activation → q → dq`.

    `levels` is the largest weight code; weights are drawn so that all codes up to it occur.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        s_in: float,
        out: tuple[float, int],
        *,
        activation: Any = None,
        span: tuple[int, int, torch.dtype] = INT8,
        levels: int = 127,
        weight_range: tuple[int, int] = (-127, 127),
        **options: Any,
    ) -> None:
        super().__init__()
        self.activation, self.out, self.span, self.options = activation, out, span, options
        self.weight_range = weight_range
        codes = torch.randint(-levels, levels + 1, shape)
        scales = (0.5 + torch.rand(shape[0])) / levels / float(np.sqrt(np.prod(shape[1:])))
        self.register_buffer("codes", codes.to(torch.int8))
        self.register_buffer("scales", scales)
        self.register_buffer("zero_points", torch.zeros(shape[0], dtype=torch.int64))
        bias_scales = f32(s_in) * scales
        bias_codes = torch.round(torch.randn(shape[0]) * 0.3 / bias_scales)
        self.register_buffer("bias", bias_codes * bias_scales)
        self.bias_codes = bias_codes.long().numpy()
        self.bias_scales = bias_scales.numpy()

    def forward(self, x: Tensor) -> Tensor:
        weight = quantized_decomposed().dequantize_per_channel.default(
            self.codes, self.scales, self.zero_points, 0, *self.weight_range, torch.int8
        )
        call = F.linear if self.codes.dim() == 2 else F.conv2d
        y = call(x, weight, self.bias, **self.options)
        return qdq(y if self.activation is None else self.activation(y), *self.out, self.span)

    def emulate(self, codes: np.ndarray, zero_point: int, *, relu: bool = False) -> np.ndarray:
        """`clamp(rne(f32(acc)·f32(s_b/s_out)) + z_out)` with an exact int64 `acc`; codes in, codes out."""
        x = codes.astype(np.int64) - zero_point
        weight = self.codes.numpy().astype(np.int64)
        acc = x @ weight.T if weight.ndim == 2 else _convolve(x, weight, **self.options)
        lead = (1, -1) if weight.ndim == 2 else (1, -1, 1, 1)
        acc = acc + self.bias_codes.reshape(lead)
        assert np.abs(acc).max() < 2**31
        ratio = (self.bias_scales / np.float32(self.out[0])).astype(np.float32).reshape(lead)
        rounded = np.rint(acc.astype(np.float32) * ratio).astype(np.int64) + self.out[1]
        return np.clip(rounded, self.out[1] if relu else -128, 127)


def _convolve(x: np.ndarray, weight: np.ndarray, *, stride: int = 1, padding: int = 0, groups: int = 1) -> np.ndarray:
    """2-d convolution of integers, one kernel position at a time, in float64 (exact below 2^53)."""
    x, weight = x.astype(np.float64), weight.astype(np.float64)
    x = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    count, _, height, width = x.shape
    out, per_group, rows, columns = weight.shape
    high, wide = (height - rows) // stride + 1, (width - columns) // stride + 1
    x = x.reshape(count, groups, per_group, height, width)
    weight = weight.reshape(groups, out // groups, per_group, rows, columns)
    acc = np.zeros((count, groups, out // groups, high, wide))
    for i in range(rows):
        for j in range(columns):
            window = x[..., i : i + stride * high : stride, j : j + stride * wide : stride]
            acc += np.einsum("ngchw,goc->ngohw", window, weight[..., i, j], optimize=True)
    return acc.reshape(count, out, high, wide).astype(np.int64)


def input_codes(x: np.ndarray, scale: float, zero_point: int) -> np.ndarray:
    """`clamp(rne(x·f32(1/s)) + z)`: XNNPACK's rule, and ORT's (which divides) unless `x` is at a tie."""
    inverse = np.float32(1.0 / f32(scale))
    return np.clip(np.rint(x.astype(np.float32) * inverse).astype(np.int64) + zero_point, -128, 127)


def output_codes(y: np.ndarray, scale: float, zero_point: int) -> np.ndarray:
    """The codes of reals that lie on the grid."""
    return np.rint(y.astype(np.float64) / f32(scale)).astype(np.int64) + zero_point


class SingleLayers(nn.Module):
    """A convolution, a depthwise one, a ReLU that does not saturate at a bound of the range, and a linear."""

    image_grid, row_grid = (0.02, 3), (0.03, -7)

    def __init__(self) -> None:
        super().__init__()
        s_in = self.image_grid[0]
        self.conv = Layer((32, 8, 3, 3), s_in, (0.02, 5), padding=1)
        self.depthwise = Layer((8, 1, 3, 3), s_in, (0.02, -128), activation=F.relu, groups=8, padding=1)
        self.rectified = Layer((16, 8, 1, 1), s_in, (0.015, -20), activation=F.relu)
        self.linear = Layer((64, 48), self.row_grid[0], (0.03, 9))

    def forward(self, image: Tensor, rows: Tensor) -> dict[str, Tensor]:
        x = qdq(image, *self.image_grid)
        return {
            "conv": self.conv(x),
            "depthwise": self.depthwise(x),
            "rectified": self.rectified(x),
            "linear": self.linear(qdq(rows, *self.row_grid)),
        }

    def emulate(self, image: np.ndarray, rows: np.ndarray) -> dict[str, np.ndarray]:
        x = input_codes(image, *self.image_grid)
        return {
            "conv": self.conv.emulate(x, self.image_grid[1]),
            "depthwise": self.depthwise.emulate(x, self.image_grid[1], relu=True),
            "rectified": self.rectified.emulate(x, self.image_grid[1], relu=True),
            "linear": self.linear.emulate(input_codes(rows, *self.row_grid), self.row_grid[1]),
        }


def single_layers() -> tuple[SingleLayers, tuple[Tensor, Tensor]]:
    """The layers with inputs that give 131072 codes or more each."""
    torch.manual_seed(1)
    return SingleLayers().eval(), (torch.randn(16, 8, 32, 32), torch.randn(2048, 48))


class Residual(nn.Module):
    """A small ResNet: stem, max pool, two residual blocks, a depthwise convolution, global pool, classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Layer((16, 3, 3, 3), 0.02, (0.02, -128), activation=F.relu, stride=2, padding=1)
        self.blocks = nn.ModuleList(
            nn.ModuleList(
                [
                    Layer((16, 16, 3, 3), 0.02, (0.02, -128), activation=F.relu, padding=1),
                    Layer((16, 16, 3, 3), 0.02, (0.02, 5), padding=1),
                ]
            )
            for _ in range(2)
        )
        self.depthwise = Layer((16, 1, 3, 3), 0.02, (0.02, -128), activation=F.relu, groups=16, padding=1)
        self.classifier = Layer((10, 16), 0.01, (0.02, 7))

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(qdq(image, 0.02, 3))
        x = qdq(F.max_pool2d(x, 3, 2, 1), 0.02, -128)
        for first, second in self.blocks:
            x = qdq(F.relu(x + second(first(x))), 0.02, -128)
        x = self.depthwise(x)
        x = qdq(F.adaptive_avg_pool2d(x, 1), 0.01, -128)
        return self.classifier(torch.flatten(x, 1))


def residual() -> ExportedProgram:
    """The small ResNet with a dynamic batch of up to 64 images of 3×32×32."""
    torch.manual_seed(2)
    batch = torch.export.Dim("batch", min=1, max=64)
    return export(Residual(), torch.randn(2, 3, 32, 32), dynamic_shapes=({0: batch},))


def export(model: nn.Module, *inputs: Tensor, **options: Any) -> ExportedProgram:
    return torch.export.export(model.eval(), inputs, strict=False, **options)

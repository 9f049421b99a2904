"""The ranges that every sweep covers: grids, layers and floats, random and adversarial, reproducible from a seed.

    scale ratio     log-uniform from 2^−30 to what the runtime takes; a third are powers of two and a third odd
                    multiples of powers of two, so that acc · M lands on .5 often
    zero point      both ends, the middle, or anything
    accumulator     spread over the output codes, or far beyond 2^24, with the bias near its bound or not

All scales are float32 values, all codes are of the dtype that a program stores: int8, or uint8.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from qbench.numerics.arithmetic import Grid

#: Bias codes that every runtime recovers from a float bias end here.
BIAS_BOUND = 2**22


def generator(seed: int, *names: str) -> np.random.Generator:
    """The stream of one sweep: other names give other numbers, the same names the same."""
    return np.random.default_rng([seed, *"/".join(names).encode()])


def float32(value: float) -> float:
    """The nearest float32, as a Python number."""
    return float(np.float32(value))


def scale_ratio(rng: np.random.Generator, low: float = -30.0, high: float = 7.0) -> float:
    """A positive ratio of scales between 2^low and 2^high; two thirds of them make ties."""
    kind = rng.integers(3)
    if kind == 0:
        return float32(2.0 ** rng.uniform(low, high))
    exponent = int(rng.integers(math.ceil(low), math.floor(high) + 1))
    if kind == 1:
        return 2.0**exponent
    return float(rng.choice([3, 5, 7])) * 2.0 ** max(exponent - 3, math.ceil(low))


def scale(rng: np.random.Generator, low: float = -12.0, high: float = 2.0) -> float:
    """A scale as training finds one; half of them are powers of two."""
    return scale_ratio(rng, low, high) if rng.integers(2) else float32(2.0 ** rng.uniform(low, high))


def zero_point(rng: np.random.Generator, dtype: torch.dtype = torch.int8) -> int:
    """A zero point: both ends, the middle and anything, equally often."""
    info = torch.iinfo(dtype)
    middle, anything = (info.min + info.max + 1) // 2, int(rng.integers(info.min, info.max + 1))
    return (info.min, info.max, middle, anything)[rng.integers(4)]


def grid(rng: np.random.Generator, dtype: torch.dtype = torch.int8, of_scale: float | None = None) -> Grid:
    """A full-range grid with a hostile zero point; `of_scale` fixes the scale."""
    info = torch.iinfo(dtype)
    return Grid(of_scale or scale(rng), zero_point(rng, dtype), info.min, info.max, dtype)


def narrowed(rng: np.random.Generator, of: Grid) -> Grid:
    """A grid with two random codes of it as its ends, as after a clamp; its zero point may lie outside."""
    low, high = sorted(rng.integers(of.qmin, of.qmax + 1, 2).tolist())
    return of._replace(qmin=low, qmax=high)


def unary_grids(
    rng: np.random.Generator, dtype: torch.dtype = torch.int8, low: float = -30.0, high: float = 7.0
) -> tuple[Grid, Grid]:
    """(input, output) with input scale over output scale between 2^low and 2^high, mostly near 1.

    Beyond 2^±4 nearly every code saturates or is the zero point, so only a quarter of the cases go there.
    """
    near = rng.integers(4) > 0
    ratio = scale_ratio(rng, max(low, -4.0), min(high, 4.0)) if near else scale_ratio(rng, low, high)
    source = grid(rng, dtype)
    return source, grid(rng, dtype, float32(source.scale / ratio))


def binary_grids(
    rng: np.random.Generator, dtype: torch.dtype = torch.int8, low: float = -10.0, high: float = 7.0
) -> tuple[Grid, Grid, Grid]:
    """(a, b, output): each input's scale over the output's lies between 2^low and 2^high, mostly near 1."""
    out = grid(rng, dtype)
    near = rng.integers(4) > 0
    limits = (max(low, -4.0), min(high, 3.0)) if near else (low, high)
    scales = [float32(out.scale * scale_ratio(rng, *limits)) for _ in range(2)]
    return grid(rng, dtype, scales[0]), grid(rng, dtype, scales[1]), out


def all_codes(dtype: torch.dtype = torch.int8) -> Tensor:
    """The 256 codes of a dtype, ascending, (256,)."""
    info = torch.iinfo(dtype)
    return torch.arange(info.min, info.max + 1).to(dtype)


def all_pairs(dtype: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
    """Every pair of codes, two tensors (256, 256)."""
    codes = all_codes(dtype)
    return codes[:, None].expand(256, 256).contiguous(), codes[None, :].expand(256, 256).contiguous()


def codes(rng: np.random.Generator, shape: tuple[int, ...], dtype: torch.dtype = torch.int8) -> Tensor:
    """Uniform codes; one tensor in four is full of the two extremes."""
    info = torch.iinfo(dtype)
    drawn = rng.integers(info.min, info.max + 1, shape)
    if rng.integers(4) == 0:
        drawn = np.where(drawn % 2 == 0, info.min, info.max)
    return torch.from_numpy(drawn).to(dtype)


def floats(rng: np.random.Generator, count: int, of: Grid) -> Tensor:
    """Float32 inputs of a quantizer, (count,): on the grid, ties, next to ties, NaN, ±inf, ±0, huge, denormal."""
    steps = rng.integers(of.qmin - 3, of.qmax + 4, count) - of.zero_point
    step = np.float32(of.scale)
    kind = rng.integers(8, size=count)
    with np.errstate(over="ignore"):
        ties = ((steps + 0.5) * np.float64(step)).astype(np.float32)
        values = np.select(
            [kind == 0, kind <= 3, kind == 4, kind == 5],
            [
                (steps * np.float64(step)).astype(np.float32),
                ties,
                np.nextafter(ties, np.float32(np.inf)),
                np.nextafter(ties, np.float32(-np.inf)),
            ],
            (rng.normal(size=count) * step * 80).astype(np.float32),
        ).astype(np.float32)
    special = [np.nan, np.inf, -np.inf, 0.0, -0.0, 3.4e38, -3.4e38, 1e-45, -1e-45, 2.0**31, -(2.0**31), 2.0**63]
    where = rng.permutation(count)[: min(count, 4 * len(special))]
    values[where] = np.resize(np.array(special, dtype=np.float32), len(where))
    return torch.from_numpy(values)


@dataclasses.dataclass(frozen=True)
class Layer:
    """Geometry of a convolution (`dims` 1, 2, 3) or a matrix product (`dims` 0)."""

    dims: int
    in_channels: int
    out_channels: int
    size: tuple[int, ...] = ()
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    transposed: bool = False
    output_padding: tuple[int, ...] = ()
    batch: int = 2

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """As PyTorch stores it."""
        if self.transposed:
            return (self.in_channels, self.out_channels // self.groups, *self.kernel)
        return (self.out_channels, self.in_channels // self.groups, *self.kernel)

    @property
    def fan_in(self) -> int:
        """Products an output sums at most."""
        return self.in_channels // self.groups * math.prod(self.kernel)


def layer(dims: int, channels: tuple[int, int], size: int, kernel: int, **options: Any) -> Layer:
    """A layer from numbers that stand for every spatial dim; `stride`, `padding`, `dilation`, `output_padding` too."""
    spatial = {name: (int(options.pop(name, default)),) * dims for name, default in _DEFAULTS.items()}
    return Layer(dims, *channels, size=(size,) * dims, kernel=(kernel,) * dims, **spatial, **options)


_DEFAULTS = {"stride": 1, "padding": 0, "dilation": 1, "output_padding": 0}

#: Padding, stride, dilation, groups, depthwise, wide sums, odd sizes.
LAYERS: dict[str, tuple[Layer, ...]] = {
    "linear": (
        Layer(0, 37, 29, batch=64),
        Layer(0, 512, 100, batch=33),
        Layer(0, 4096, 16, batch=5),
        Layer(0, 1, 3, batch=128),
    ),
    "conv1d": (
        layer(1, (16, 24), 65, 3, padding=1),
        layer(1, (8, 8), 64, 5, stride=2, padding=4, dilation=2),
        layer(1, (12, 18), 33, 3, groups=3),
        layer(1, (16, 16), 40, 3, padding=1, groups=16),
    ),
    "conv2d": (
        layer(2, (16, 24), 14, 3, padding=1),
        layer(2, (3, 16), 19, 7, stride=2, padding=3),
        layer(2, (32, 40), 9, 1),
        layer(2, (33, 17), 8, 1, stride=2),
        layer(2, (24, 32), 11, 3, padding=2, dilation=2, groups=4),
        layer(2, (512, 8), 7, 3, padding=1),
    ),
    "depthwise": (
        layer(2, (32, 32), 14, 3, padding=1, groups=32),
        layer(2, (19, 19), 13, 5, stride=2, padding=2, groups=19),
        layer(2, (8, 16), 12, 3, padding=1, groups=8),
        layer(2, (16, 16), 15, 3, padding=2, dilation=2, groups=16),
    ),
    "conv3d": (
        layer(3, (4, 6), 7, 3, padding=1),
        layer(3, (8, 8), 6, 3, stride=2, padding=1, groups=2),
        layer(3, (6, 6), 6, 3, padding=1, groups=6),
        layer(3, (5, 9), 6, 1),
    ),
    "conv_transpose1d": (layer(1, (12, 8), 24, 4, stride=2, padding=1, transposed=True),),
    "conv_transpose2d": (
        layer(2, (12, 8), 9, 3, stride=2, padding=1, output_padding=1, transposed=True),
        layer(2, (16, 16), 8, 4, stride=2, padding=1, transposed=True),
        layer(2, (8, 8), 8, 3, padding=1, dilation=2, transposed=True),
        layer(2, (8, 12), 7, 2, stride=2, groups=4, transposed=True),
    ),
    "conv_transpose3d": (layer(3, (4, 6), 5, 2, stride=2, transposed=True),),
}

#: How a layer's numbers are drawn: see `layer_data`.
KINDS = ("spread", "ties", "tiny", "large", "wide", "narrow")


@dataclasses.dataclass(frozen=True)
class LayerData:
    """A layer with its numbers.

    Attributes:
        layer: Its geometry.
        codes: Input codes, (batch, in, …).
        source: Their grid.
        weight: int8 weight codes with zero point 0, in PyTorch's layout.
        weight_scales: float32, (out,) or () for one of the tensor.
        bias: int32 codes at `f32(source.scale · weight_scales)`, (out,).
        out: The output's grid.
    """

    layer: Layer
    codes: Tensor
    source: Grid
    weight: Tensor
    weight_scales: Tensor
    bias: Tensor
    out: Grid

    @property
    def bias_scales(self) -> Tensor:
        """`f32(s_in · s_w)`, () or (out,)."""
        return torch.tensor(self.source.scale, dtype=torch.float32) * self.weight_scales

    def spread_channels(self, values: Tensor) -> Tensor:
        """(out,) -> (1, out, 1, …), to broadcast over the accumulator; () stays."""
        return values.reshape(-1, *[1] * self.layer.dims) if values.dim() else values


def layer_data(
    rng: np.random.Generator,
    of: Layer,
    kind: str,
    *,
    dtype: torch.dtype = torch.int8,
    per_channel: bool = True,
    weight_bits: int = 8,
    largest_ratio: float = 2.0**7,
) -> LayerData:
    """Numbers of a layer.

    Args:
        rng: The stream.
        of: The geometry.
        kind: `"spread"`: output codes spread over their range. `"ties"`: ratios that are powers of two, so that many
            results lie half way. `"tiny"`: ratios down to 2^−30 with biases near the int32 bound. `"large"`: ratios up
            to `largest_ratio` with few inputs off zero. `"wide"`: nearly all codes at one extreme, accumulators as
            large as the layer makes them, bias up to 2^22. `"narrow"`: 4-bit activation codes in 8-bit storage.
        dtype: Of the activations' codes.
        per_channel: Whether each output channel has a weight scale of its own.
        weight_bits: Weight codes lie in ±(2^(bits − 1) − 1).
        largest_ratio: What the runtime takes of `s_in · s_w / s_out`.
    """
    source = grid(rng, dtype)
    inputs, weight, bias = _drawn(rng, of, kind, source, 2 ** (weight_bits - 1) - 1)
    drawn = LayerData(of, inputs.to(dtype), source, weight.to(torch.int8), torch.ones(()), bias.to(torch.int32), source)
    acc = accumulate(drawn)
    ratios = _ratios(rng, kind, acc, of.out_channels if per_channel else 1, largest_ratio)
    out = grid(rng, dtype)
    if kind == "wide":  # One sign of sums: the other end would saturate all of them.
        out = out._replace(zero_point=out.qmin if acc.mean() > 0 else out.qmax)
    scales = torch.from_numpy((np.float64(out.scale) * ratios / source.scale).astype(np.float32))
    return dataclasses.replace(drawn, weight_scales=scales if per_channel else scales.reshape(()), out=out)


def _drawn(rng: np.random.Generator, of: Layer, kind: str, source: Grid, bound: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of input, weight (within ±bound) and bias, int64."""

    def uniform(low: int, high: int, shape: tuple[int, ...]) -> Tensor:
        return torch.from_numpy(rng.integers(low, high + 1, shape))

    shape, channels = (of.batch, of.in_channels, *of.size), (of.out_channels,)
    inputs, weight = uniform(source.qmin, source.qmax, shape), uniform(-bound, bound, of.weight_shape)
    bias_bound = min(BIAS_BOUND, 200 * of.fan_in)
    if kind == "ties":
        # Sums are multiples of the step, so that a power of two as the ratio leaves one in a few at .5.
        step = (bound + 1) // 2
        return inputs, (weight.sign() * step), uniform(-bias_bound // step, bias_bound // step, channels) * step
    if kind == "wide":
        far = source.qmax if source.qmax - source.zero_point > source.zero_point - source.qmin else source.qmin
        inputs = torch.where(uniform(0, 9, shape) > 0, far, inputs)
        return inputs, torch.where(uniform(0, 9, of.weight_shape) > 0, bound, weight), uniform(0, BIAS_BOUND, channels)
    if kind == "large":
        sparse = (source.zero_point + uniform(-1, 1, shape)).clamp(source.qmin, source.qmax)
        inputs = torch.where(uniform(0, 19, shape) == 0, sparse, source.zero_point)
        return inputs, weight.sign() * (weight.abs() > 0.97 * bound), uniform(-2, 2, channels)
    if kind == "narrow":
        low = int(rng.choice([source.qmin, source.qmin + 120, source.qmax - 15]))
        return uniform(low, low + 15, shape), weight, uniform(-bias_bound, bias_bound, channels)
    if kind == "tiny":
        bias_bound = 2**31 - 1 - of.fan_in * 255 * bound
    return inputs, weight, uniform(-bias_bound, bias_bound, channels)


def _ratios(rng: np.random.Generator, kind: str, acc: Tensor, count: int, largest: float) -> np.ndarray[Any, Any]:
    """`s_in · s_w / s_out` for each of `count` channels, (count,) float64."""
    if kind == "tiny":
        return np.array([scale_ratio(rng, -30, -20) for _ in range(count)])
    if kind == "large":
        return np.array([scale_ratio(rng, 0, math.log2(largest) - 2e-2) for _ in range(count)])
    spread = max(float(acc.abs().max()), 1.0)
    ratios = 2.0 ** rng.uniform(-1, 3, count) * 60 / spread
    ratios = np.minimum(ratios, largest * 0.99)
    if kind == "ties":
        odd = rng.choice([1, 1, 3, 5], count)
        return odd * 2.0 ** np.floor(np.log2(ratios / odd))
    return ratios


def accumulate(data: LayerData) -> Tensor:
    """`Σ (x − z)·w + bias`, exact, in float64: (batch, out, …)."""
    of = data.layer
    x = data.codes.to(torch.float64) - data.source.zero_point
    weight, bias = data.weight.to(torch.float64), data.bias.to(torch.float64)
    if of.dims == 0:
        return F.linear(x, weight, bias)
    if of.transposed:
        convolve = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[of.dims - 1]
        return convolve(x, weight, bias, of.stride, of.padding, of.output_padding, of.groups, of.dilation)
    convolve = (F.conv1d, F.conv2d, F.conv3d)[of.dims - 1]
    return convolve(x, weight, bias, of.stride, of.padding, of.dilation, of.groups)

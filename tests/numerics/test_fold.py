"""Folding a BatchNorm: against the layer followed by its BatchNorm in float64, and against loops in numpy."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from qbench.errors import NumericsError
from qbench.numerics.fold import BatchNormTensors, WeightLayout, fold, fold_factor

from .support import generator, same_bits

UNIT = 2.0**-53  # relative error of one float64 operation
UNIT32 = 2.0**-24


@dataclasses.dataclass(frozen=True)
class Layer:
    """A linear layer, the shape of an input to it and the BatchNorm that follows."""

    name: str
    make: Callable[[bool], nn.Module]
    input_shape: tuple[int, ...]
    bn_type: type[nn.modules.batchnorm._BatchNorm]
    layout: WeightLayout = dataclasses.field(default_factory=WeightLayout)


def conv(
    conv_type: type[nn.modules.conv._ConvNd],
    inputs: int,
    outputs: int,
    groups: int,
    dims: int,
    bn_type: type[nn.modules.batchnorm._BatchNorm],
) -> Layer:
    def make(bias: bool) -> nn.Module:
        return conv_type(inputs, outputs, 3, stride=2, padding=1, groups=groups, bias=bias)  # type: ignore[arg-type]

    transposed = issubclass(conv_type, nn.modules.conv._ConvTransposeNd)
    name = f"{conv_type.__name__}({inputs}, {outputs}, groups={groups})"
    return Layer(name, make, (2, inputs, *[5] * dims), bn_type, WeightLayout(transposed, groups if transposed else 1))


# (inputs, outputs, groups): plain, grouped with unequal sides, depthwise, depthwise with a multiplier
CHANNELS = [(3, 5, 1), (4, 6, 2), (6, 4, 2), (4, 4, 4), (3, 6, 3)]
TYPES = [
    (nn.Conv1d, 1, nn.BatchNorm1d),
    (nn.Conv2d, 2, nn.BatchNorm2d),
    (nn.Conv3d, 3, nn.BatchNorm3d),
    (nn.ConvTranspose1d, 1, nn.BatchNorm1d),
    (nn.ConvTranspose2d, 2, nn.BatchNorm2d),
    (nn.ConvTranspose3d, 3, nn.BatchNorm3d),
]
LAYERS = [
    conv(conv_type, *channels, dims, bn_type)  # type: ignore[arg-type]
    for (conv_type, dims, bn_type), channels in itertools.product(TYPES, CHANNELS)
] + [Layer("Linear(7, 5)", lambda bias: nn.Linear(7, 5, bias=bias), (4, 7), nn.BatchNorm1d)]

EPS = [1e-5, 1e-3, 0.37]

by_layer = pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name)
by_bias = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
by_affine = pytest.mark.parametrize("affine", [True, False], ids=["affine", "no affine"])


def batch_norm(layer: Layer, channels: int, affine: bool, eps: float) -> nn.modules.batchnorm._BatchNorm:
    """Statistics as after training; γ negative, zero and large in some channels; a variance far below every ε."""
    random = generator(channels)
    bn = layer.bn_type(channels, eps=eps, affine=affine).double().eval()
    assert bn.running_mean is not None and bn.running_var is not None
    bn.running_mean.copy_(torch.from_numpy(random.normal(0, 3, channels)))
    bn.running_var.copy_(torch.from_numpy(random.uniform(0.01, 9, channels)))
    bn.running_var[-1] = 1e-9
    if affine:
        gamma = random.normal(0, 2, channels)
        gamma[0], gamma[1] = 0.0, -1.5
        bn.weight.data.copy_(torch.from_numpy(gamma))
        bn.bias.data.copy_(torch.from_numpy(random.normal(0, 2, channels)))
    return bn


def tensors_of(bn: nn.modules.batchnorm._BatchNorm) -> BatchNormTensors:
    assert bn.running_mean is not None and bn.running_var is not None
    gamma, beta = (None, None) if not bn.affine else (bn.weight.data, bn.bias.data)
    return BatchNormTensors(gamma, beta, bn.running_mean, bn.running_var, bn.eps)


def build(layer: Layer, bias: bool, affine: bool, eps: float) -> tuple[nn.Module, nn.modules.batchnorm._BatchNorm]:
    module = layer.make(bias).double()
    channels = module.out_features if isinstance(module, nn.Linear) else module.out_channels
    assert isinstance(channels, int)
    return module, batch_norm(layer, channels, affine, eps)


def run(module: nn.Module, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The layer with other parameters (a layer that has no bias cannot be given one: add it)."""
    if module.bias is None:
        y = functional_call(module, {"weight": weight}, (x,))
        return y + bias.reshape(1, -1, *[1] * (y.ndim - 2))
    return functional_call(module, {"weight": weight, "bias": bias}, (x,))


def numpy_fold(
    weight: np.ndarray, bias: np.ndarray | None, bn: nn.modules.batchnorm._BatchNorm, layout: WeightLayout
) -> tuple[np.ndarray, np.ndarray]:
    """One output channel after the other, by its definition."""
    assert bn.running_mean is not None and bn.running_var is not None
    mean, var = bn.running_mean.numpy(), bn.running_var.numpy()
    folded, folded_bias = weight.copy(), np.empty(len(mean))
    for channel in range(len(mean)):
        k = (bn.weight[channel].item() if bn.affine else 1.0) / np.sqrt(var[channel] + bn.eps)
        shift = bn.bias[channel].item() if bn.affine else 0.0
        folded_bias[channel] = shift + k * ((0.0 if bias is None else bias[channel]) - mean[channel])
        if layout.transposed:
            outputs, inputs = weight.shape[1], weight.shape[0] // layout.groups
            group, place = divmod(channel, outputs)
            folded[group * inputs : (group + 1) * inputs, place] *= k
        else:
            folded[channel] *= k
    return folded, folded_bias


@by_layer
@by_bias
@by_affine
@pytest.mark.parametrize("eps", EPS)
def test_fold_is_the_layer_and_its_batch_norm(layer: Layer, bias: bool, affine: bool, eps: float) -> None:
    module, bn = build(layer, bias, affine, eps)
    weight, own_bias = module.weight.data, module.bias.data if bias else None
    folded_weight, folded_bias = fold(weight, own_bias, tensors_of(bn), layer.layout)
    x = torch.randn(layer.input_shape, dtype=torch.float64)
    with torch.no_grad():
        expected = bn(module(x))
        actual = run(module, x, folded_weight, folded_bias)
        # Both sides sum the same products in some order. Each operation has a relative error of UNIT, so what they sum,
        # taken without sign, times the number of operations bounds the difference.
        offset = tensors_of(bn).mean.abs() * fold_factor(tensors_of(bn)).abs()
        offset = offset + folded_bias.abs() + (bn.bias.abs() if affine else 0.0)
        size = run(module, x.abs(), folded_weight.abs(), offset)
    operations = weight.numel() + 16
    assert ((actual - expected).abs() <= operations * UNIT * size).all()
    assert actual.abs().max() > 0.1


@by_layer
@by_bias
@by_affine
def test_fold_is_the_loop_over_channels(layer: Layer, bias: bool, affine: bool) -> None:
    module, bn = build(layer, bias, affine, eps=0.013)
    own_bias = module.bias.data if bias else None
    weight, folded_bias = fold(module.weight.data, own_bias, tensors_of(bn), layer.layout)
    expected = numpy_fold(module.weight.data.numpy(), None if own_bias is None else own_bias.numpy(), bn, layer.layout)
    # The same operations in the same order; but torch.sqrt is not always the nearest float, as numpy's is.
    np.testing.assert_allclose(weight.numpy(), expected[0], rtol=8 * UNIT, atol=0)
    np.testing.assert_allclose(folded_bias.numpy(), expected[1], rtol=0, atol=64 * UNIT * np.abs(expected[1]).max())


@pytest.mark.parametrize("layer", LAYERS[::5] + LAYERS[-1:], ids=lambda layer: layer.name)
@by_affine
def test_float32_stays_within_its_rounding(layer: Layer, affine: bool) -> None:
    module, bn = build(layer, True, affine, eps=1e-3)
    weight, bias = fold(module.weight.data, module.bias.data, tensors_of(bn), layer.layout)
    module, bn = module.float(), bn.float()
    weight32, bias32 = fold(module.weight.data, module.bias.data, tensors_of(bn), layer.layout)
    assert weight32.dtype == bias32.dtype == torch.float32
    # W, γ and σ² are rounded, then σ² + ε, √ (by a whole ulp), the quotient and the product: at most 8
    assert ((weight32 - weight).abs() <= 8 * UNIT32 * weight.abs()).all()
    parts = fold_factor(tensors_of(bn)).abs() * (module.bias.data.abs() + tensors_of(bn).mean.abs())
    parts = parts + (bn.bias.data.abs() if affine else 0.0)
    assert ((bias32 - bias).abs() <= 12 * UNIT32 * parts).all()


@given(
    eps=st.floats(1e-12, 10),
    var=st.floats(0, 1e6),
    mean=st.floats(-1e3, 1e3),
    gamma=st.floats(-1e3, 1e3) | st.none(),
    beta=st.floats(-1e3, 1e3) | st.none(),
    bias=st.floats(-1e3, 1e3) | st.none(),
)
def test_one_channel_by_hand(
    eps: float, var: float, mean: float, gamma: float | None, beta: float | None, bias: float | None
) -> None:
    def channel(value: float | None) -> Tensor | None:
        return None if value is None else torch.tensor([value], dtype=torch.float64)

    statistics = torch.tensor([mean], dtype=torch.float64), torch.tensor([var], dtype=torch.float64)
    bn = BatchNormTensors(channel(gamma), channel(beta), *statistics, eps)
    weight, folded = fold(torch.ones(1, 1, dtype=torch.float64), channel(bias), bn)
    k = (1.0 if gamma is None else gamma) / (var + eps) ** 0.5
    assert weight.item() == pytest.approx(k, rel=8 * UNIT, abs=0)
    size = abs(beta or 0.0) + abs(k) * (abs(bias or 0.0) + abs(mean))
    assert abs(folded.item() - ((beta or 0.0) + k * ((bias or 0.0) - mean))) <= 16 * UNIT * size


def test_gamma_zero_folds_to_zero_weight_and_beta() -> None:
    bn = BatchNormTensors(torch.zeros(2), torch.tensor([0.5, -2.0]), torch.ones(2), torch.zeros(2), 1e-5)
    weight, bias = fold(torch.randn(2, 3), torch.randn(2), bn)
    assert torch.equal(weight, torch.zeros(2, 3))
    assert torch.equal(bias, torch.tensor([0.5, -2.0]))


def test_eps_is_the_batch_norms_own() -> None:
    """With ε of 1e-2 and a small variance, assuming 1e-5 is wrong by a factor of 10."""
    bn = BatchNormTensors(None, None, torch.zeros(1), torch.full((1,), 1e-4), 1e-2)
    assert fold(torch.ones(1, 1), None, bn)[0].item() == pytest.approx(1 / (1e-4 + 1e-2) ** 0.5, rel=1e-6)


def test_what_is_folded_is_not_changed() -> None:
    module, bn = build(LAYERS[0], True, True, 1e-5)
    before = [t.clone() for t in (module.weight, module.bias, *bn.state_dict().values())]
    fold(module.weight.data, module.bias.data, tensors_of(bn))
    assert all(map(torch.equal, (module.weight, module.bias, *bn.state_dict().values()), before))


@pytest.mark.parametrize(
    ("weight_shape", "channels", "layout"),
    [
        ((5, 3, 3, 3), 4, WeightLayout()),
        ((5, 3, 3, 3), 1, WeightLayout()),  # would broadcast in silence
        ((5, 3), 3, WeightLayout()),
        ((4, 3, 3, 3), 4, WeightLayout(transposed=True)),
        ((4, 3, 3, 3), 3, WeightLayout(transposed=True, groups=2)),
    ],
)
def test_a_batch_norm_of_another_width(weight_shape: tuple[int, ...], channels: int, layout: WeightLayout) -> None:
    bn = BatchNormTensors(None, None, torch.zeros(channels), torch.ones(channels), 1e-5)
    weight = torch.ones(weight_shape)
    with pytest.raises(NumericsError) as caught:
        fold(weight, None, bn, layout)
    message = str(caught.value)
    assert f"{layout.out_channels(weight)} channels" in message
    assert str(weight_shape) in message and f"({channels},)" in message


# WeightLayout ---------------------------------------------------------------------------------------------------------


@by_layer
def test_layout_counts_and_spreads_the_output_channels(layer: Layer) -> None:
    """Weights scaled by a number per output channel scale the outputs by it: what `spread` must mean."""
    module = layer.make(False).double()
    weight, layout = module.weight.data, layer.layout
    x = torch.randn(layer.input_shape, dtype=torch.float64)
    with torch.no_grad():
        y = module(x)
        assert layout.out_channels(weight) == y.shape[1]
        factors = 2.0 ** torch.arange(y.shape[1], dtype=torch.float64)  # powers of two: every product is exact
        scaled = functional_call(module, {"weight": weight * layout.spread(factors, weight)}, (x,))
    assert torch.equal(scaled, y * factors.reshape(1, -1, *[1] * (y.ndim - 2)))


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_channels_that_share_a_scale(groups: int) -> None:
    """A transposed weight (in, out/groups, …) has one scale for the same place in every group."""
    layout = WeightLayout(transposed=True, groups=groups)
    values = torch.tensor(generator(groups).permutation(groups * 4)).float()
    shared = layout.reduce_max(values)
    expected = [max(values[group * 4 + place].item() for group in range(groups)) for place in range(4)]
    assert shared.tolist() == expected
    assert layout.per_channel(shared).tolist() == [expected[channel % 4] for channel in range(groups * 4)]
    assert layout.axis == 1


def test_channels_that_share_nothing() -> None:
    layout = WeightLayout()
    values = torch.arange(5.0)
    assert layout.axis == 0
    assert same_bits(layout.reduce_max(values), values)
    assert same_bits(layout.per_channel(values), values)
    assert layout.per_channel(torch.tensor(2.0)).shape == ()
    assert WeightLayout(transposed=True, groups=2).per_channel(torch.tensor(2.0)).shape == ()

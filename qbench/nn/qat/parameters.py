"""From the parameters of a layer to what its forward computes with: the grid of the folded weight, and the bias.

    k    = γ/sqrt(σ² + ε)        W_f = k·W        b_f = β + k·(b − μ)
    s_b  = s_in·s_w              and s_w no smaller than the bias needs
    e    = b̂ − b_f               the bias error, which training adds behind BatchNorm

Functions of tensors and of two quantizers that keep no tensors, so that they can be compiled as they stand.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import torch
from torch import Tensor

from qbench.fake_quantize import BiasQuantizer, FakeQuantize
from qbench.fake_quantize.base import is_hooked
from qbench.numerics.blocks import at_hand, channels_are_last, from_memory_order, in_memory_order, in_rows
from qbench.numerics.fold import BatchNormTensors, WeightLayout, fold_bias, fold_factor
from qbench.numerics.generated import DEVICES, BothWays, Generated, Tensors, generated, standing_for
from qbench.numerics.generated_rounding import learned_code, round_learned
from qbench.numerics.layer_step import TrainingParameters
from qbench.numerics.qparams import QParams
from qbench.numerics.straight_through import round_to_grid, straight_through
from qbench.numerics.weights import WeightGrid, folded_grid, moving_grid


@dataclasses.dataclass(frozen=True)
class Folding:
    """How a layer folds and quantizes.

    Attributes:
        layout: Where the weight keeps its output channels.
        weight_quantizer: Finds the weight's grid.
        bias_quantizer: Finds the bias's; None where the bias stays float.
        fast_path: Whether generated code may round a weight whose scale is learned.
    """

    layout: WeightLayout
    weight_quantizer: FakeQuantize
    bias_quantizer: BiasQuantizer | None
    fast_path: bool = False

    @property
    def straight(self) -> bool:
        """Whether the gradient to `W` is that to `Ŵ/k`: its own range a channel, clipping nothing."""
        quantizer = self.weight_quantizer
        plain = type(quantizer) is FakeQuantize and quantizer.fake_quant_enabled and quantizer.stateless
        per_channel = quantizer.spec.axis == self.layout.axis and quantizer.spec.group_size is None
        return plain and per_channel and quantizer.scales_with_tensor and not quantizer.clips

    def parameters(
        self, weight: Tensor, bias: Tensor | None, bn: BatchNormTensors | None, input_scale: Tensor | None
    ) -> tuple[WeightGrid, Tensor, Tensor | None]:
        """Grid of the folded weight, folded bias `b_f` (out,), and the bias scale.

        The scale is None where there is none: the input or the weight is in float.

        Args:
            weight: `W`.
            bias: `b`, (out,), or None.
            bn: The BatchNorm's tensors, or None.
            input_scale: `s_in`, (), or None.
        """
        factor = None if bn is None else fold_factor(bn)
        if bn is not None and factor is not None:
            folded = fold_bias(bias, bn, factor)
        else:
            folded = weight.new_zeros(self.layout.out_channels(weight)) if bias is None else bias
        quantizer = self.bias_quantizer
        grid = self._grid(weight, factor, None)
        if input_scale is None or quantizer is None:
            return grid, folded, None
        scale = quantizer.scale(folded, input_scale, grid.channel_scale())
        if not quantizer.surely_fits(folded, scale):
            grid = self._grid(weight, factor, quantizer.weight_scale_floor(folded, input_scale))
            scale = quantizer.scale(folded, input_scale, grid.channel_scale())
        return grid, folded, scale

    def _grid(self, weight: Tensor, factor: Tensor | None, floor: Tensor | None) -> WeightGrid:
        quantizer, layout = self.weight_quantizer, self.layout
        weight = quantizer.shaped(weight) if quantizer.fake_quant_enabled else weight
        if quantizer.scales_with_tensor and not (layout.transposed and layout.groups > 1):
            moving = self._round if quantizer.clips else None
            return moving_grid(weight, factor, layout, quantizer.qparams_of(weight), floor, moving)
        power_of_two, rounding = quantizer.spec.power_of_two, quantizer.fake_quantize
        return folded_grid(
            weight, factor, layout, quantizer.qparams_of, floor, power_of_two=power_of_two, rounding=rounding
        )


    def _round(self, weight: Tensor, grid: QParams) -> Tensor:
        found = _generated_rounding(weight, grid, self.weight_quantizer) if self.fast_path else None
        return self.weight_quantizer.fake_quantize(weight, grid) if found is None else found


def bias_error(folding: Folding, folded: Tensor, scale: Tensor | None) -> Tensor | None:
    """`e = b̂ − b_f`, (out,); None where the bias stays float. Its scale may carry a gradient: those that learn."""
    quantizer = folding.bias_quantizer
    return None if scale is None or quantizer is None else quantizer(folded, scale) - folded


def training_parameters(
    folding: Folding, weight: Tensor, bias: Tensor | None, bn: BatchNormTensors | None, input_scale: Tensor | None
) -> TrainingParameters:
    """`Ŵ/k` and `e`; arguments as of `Folding.parameters`, without the gradients that `e` shall not hand on."""
    grid, folded, scale = folding.parameters(weight, bias, bn, input_scale)
    value = grid.unfolded() if folding.weight_quantizer.fake_quant_enabled else grid.weight
    silenced = None if grid.effect is None else grid.effect.silenced
    error = bias_error(folding, folded, scale)
    return TrainingParameters(value.to(weight.dtype), grid.unfolded_qparams(), error, silenced)


def parameter_code(folding: Folding, weight: Tensor, eps: float | None) -> Generated | None:
    """Generated code for the parameters; None where there is none for it: quantizers that clip, scales that learn.

    Args:
        folding: How.
        weight: `W`.
        eps: The BatchNorm's, for `generated_parameters`; None without a BatchNorm, for `generated_weight_and_bias`.
    """
    if not folding.straight or folding.layout.transposed or not at_hand(weight, DEVICES):
        return None
    if is_hooked(folding.weight_quantizer, folding.weight_quantizer.observer) or channels_are_last(weight) is None:
        return None
    if eps is None:
        code = generated(_weight_and_bias, _sample_without_bn, _rule_of(folding), weight.device.type)
    else:
        code = generated(_training_parameters, _sample, _rule_of(folding), eps, weight.device.type)
    return code if code.ready() else None


def generated_parameters(
    folding: Folding,
    weight: Tensor,
    bias: Tensor | None,
    bn: BatchNormTensors,
    input_scale: Tensor | None,
    code: Generated,
) -> TrainingParameters:
    """`training_parameters` by generated code.

    Args:
        folding: How.
        weight: `W`, float32.
        bias: `b`, (out,), or None.
        bn: The BatchNorm's tensors.
        input_scale: `s_in`, (), without a gradient, or None.
        code: Of `parameter_code`.
    """
    last = bool(channels_are_last(weight))
    given = in_memory_order(weight, last).flatten(1), bias, bn.gamma, bn.beta, bn.mean, bn.var, input_scale
    value, step, error, silenced = code(*given)
    assert value is not None and step is not None
    value = from_memory_order(value, weight, last)
    return TrainingParameters(straight_through(weight, value), _grid_of(step, folding), error, silenced)


def generated_weight_and_bias(
    folding: Folding, weight: Tensor, bias: Tensor | None, input_scale: Tensor | None, code: Generated
) -> tuple[Tensor, Tensor | None, QParams]:
    """`Ŵ`, `b̂` (None where it is float) and the grid of `Ŵ` of a layer without BatchNorm, by generated code.

    Args:
        folding: How.
        weight: `W`, float32.
        bias: `b`, (out,), or None.
        input_scale: `s_in`, (), without a gradient, or None.
        code: Of `parameter_code`.
    """
    last = bool(channels_are_last(weight))
    value, step, rounded = code(in_memory_order(weight, last).flatten(1), bias, input_scale)
    assert value is not None and step is not None
    value = straight_through(weight, from_memory_order(value, weight, last))
    rounded = rounded if rounded is None or bias is None else straight_through(bias, rounded)
    return value, rounded, _grid_of(step, folding)


def _grid_of(step: Tensor, folding: Folding) -> QParams:
    spec = folding.weight_quantizer.spec
    return QParams(step, _zeros(len(step), step.device), spec.qmin, spec.qmax, spec.axis)


@functools.lru_cache(maxsize=1024)
def _zeros(channels: int, device: torch.device) -> Tensor:
    """The zero points of symmetric grids, which nobody writes to."""
    return torch.zeros(channels, dtype=torch.int32, device=device)


@dataclasses.dataclass(frozen=True)
class StraightParameters:
    """The parameters of a layer whose weight gets the gradient of `Ŵ/k`, and whose scales get none.

    Attributes:
        folding: How.
        bn: The BatchNorm.
        source: The quantizer of the input where it is on a grid; else None.
        code: Of `parameter_code`, or None.
    """

    folding: Folding
    bn: Any
    source: FakeQuantize | None
    code: Generated | None

    @classmethod
    def of(cls, folding: Folding, bn: Any, source: FakeQuantize | None, weight: Tensor) -> StraightParameters | None:
        """Those of a layer; None where its parameters are not of this kind."""
        source = source if source is not None and source.active else None
        if not folding.straight or (source is not None and source.learned):
            return None
        return cls(folding, bn, source, parameter_code(folding, weight, bn.eps) if folding.fast_path else None)

    def __call__(
        self, weight: Tensor, bias: Tensor | None, gamma: Tensor | None, beta: Tensor | None
    ) -> TrainingParameters:
        """Found from what these are now, without gradients."""
        bn = BatchNormTensors(gamma, beta, self.bn.running_mean, self.bn.running_var, self.bn.eps)
        input_scale = None if self.source is None else self.source.scale.float()
        if self.code is None:
            return training_parameters(self.folding, weight, bias, bn, input_scale)
        return generated_parameters(self.folding, weight, bias, bn, input_scale, self.code)

    def again(self, weight: Tensor, qparams: QParams) -> Tensor:
        """`Ŵ/k` from W and its grid."""
        code = None if self.code is None else _rounding_code(weight, qparams, self.folding.weight_quantizer)
        if code is None:
            return round_to_grid(weight, qparams.spread(qparams.scale, weight), qparams.qmin, qparams.qmax)
        value = torch.empty_like(weight)
        code.forward(in_rows(value), in_rows(weight), qparams.scale[:, None], qparams.zero_point[:, None])
        return value


def _generated_rounding(weight: Tensor, grid: QParams, quantizer: FakeQuantize) -> Tensor | None:
    """`fake_quantize` of a weight with learned scales by generated code; None where there is none for it."""
    last, code = channels_are_last(weight), _rounding_code(weight, grid, quantizer)
    if last is None or code is None or quantizer.grid_gradient != "residual":
        return None
    scale, zero_point = grid.scale[:, None], grid.zero_point[:, None]
    rows = in_memory_order(weight, last).flatten(1)
    return from_memory_order(round_learned(rows, (scale.detach(), zero_point), (scale, None), code), weight, last)


def _rounding_code(weight: Tensor, grid: QParams, quantizer: FakeQuantize) -> BothWays | None:
    """Code that rounds a weight to a grid per channel; None where there is none for it."""
    if not at_hand(weight, DEVICES) or grid.axis != 0 or grid.group_size is not None:
        return None
    gradient = quantizer.grid_gradient
    if gradient is None or channels_are_last(weight) is None:
        return None
    code = learned_code(-math.inf, math.inf, quantizer.spec, None, weight.device.type, gradient)
    return code if code.ready() else None


def _training_parameters(
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    var: Tensor,
    input_scale: Tensor | None,
    folding: Folding,
    eps: float,
    device: str,
) -> Tensors:
    """`Ŵ/k`, (out, …), its step (out,), `e` and the channels that are silenced, (out,)."""
    grid, folded, scale = folding.parameters(weight, bias, BatchNormTensors(gamma, beta, mean, var, eps), input_scale)
    qparams = grid.unfolded_qparams()
    assert qparams is not None
    return grid.unfolded(), qparams.scale, bias_error(folding, folded, scale), grid.silenced


def _weight_and_bias(
    weight: Tensor, bias: Tensor | None, input_scale: Tensor | None, folding: Folding, device: str
) -> Tensors:
    """`Ŵ`, (out, …), its scale (out,), and `b̂`, (out,), where there is one."""
    grid, folded, scale = folding.parameters(weight, bias, None, input_scale)
    quantizer = folding.bias_quantizer
    rounded = None if scale is None or quantizer is None else quantizer(folded, scale)
    return grid.folded(), grid.qparams.scale, rounded


def _sample_without_bn(folding: Folding, device: str) -> list[Tensor | None]:
    """Arguments of `_weight_and_bias` with channels of every kind."""
    weight, _, _, bias, *_, input_scale = _sample(folding, 0.0, device)
    return [weight, bias, input_scale]


def _sample(folding: Folding, eps: float, device: str) -> list[Tensor | None]:
    """Arguments of `_training_parameters` with channels of every kind: usual ones, γ = 0, no weights, a huge bias."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 45, generator=generator)
    weight[3] = 0.0
    gamma, beta, mean = torch.randn(3, 24, generator=generator)
    gamma[5], beta[7] = 0.0, 1e6
    var = torch.rand(24, generator=generator) + 0.1
    found = [weight, gamma, beta, mean, var, torch.tensor(0.02)]
    weight, *others = (value.to(device) for value in found)
    return [weight, None, *others]


def _rule_of(folding: Folding) -> Folding:
    observer, quantizer = folding.weight_quantizer.observer, folding.bias_quantizer
    key = folding.weight_quantizer.spec, type(observer), observer.settings(), quantizer and quantizer.spec
    return standing_for(folding, Folding, *key)

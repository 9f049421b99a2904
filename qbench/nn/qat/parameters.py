"""From the parameters of a layer to what its forward computes with: the grid of the folded weight, and the bias.

    k    = γ/sqrt(σ² + ε)        W_f = k·W        b_f = β + k·(b − μ)
    s_b  = s_in·s_w              and s_w no smaller than the bias needs
    e    = b̂ − b_f               the bias error, which training adds behind BatchNorm

Functions of tensors and of two quantizers that keep no tensors, so that they can be compiled as they stand.
"""

from __future__ import annotations

import dataclasses
import math

from torch import Tensor

from qbench.fake_quantize import BiasQuantizer, FakeQuantize
from qbench.numerics.blocks import at_hand, channels_are_last, from_memory_order, in_memory_order
from qbench.numerics.fold import BatchNormTensors, WeightLayout, fold_bias, fold_factor
from qbench.numerics.generated import DEVICES, BothWays
from qbench.numerics.generated_rounding import learned_code, round_learned
from qbench.numerics.layer_step import TrainingParameters
from qbench.numerics.native.steps import round_weight, weight_rounding
from qbench.numerics.qparams import LearnedScale, QParams
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

    @property
    def learned(self) -> bool:
        """Whether the steps of `W` are learned a channel, symmetric, with the gradient of LSQ."""
        quantizer = self.weight_quantizer
        per_channel = quantizer.spec.axis == self.layout.axis and quantizer.spec.group_size is None
        plain = type(quantizer).shaped is FakeQuantize.shaped and quantizer.grid_gradient == "residual"
        learned = quantizer.learned and quantizer.fake_quant_enabled and quantizer.scales_with_tensor
        return learned and per_channel and plain

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
        found = _fast_rounding(weight, grid, self.weight_quantizer) if self.fast_path else None
        return self.weight_quantizer.fake_quantize(weight, grid) if found is None else found


def bias_error(folding: Folding, folded: Tensor, scale: Tensor | None) -> Tensor | None:
    """`e = b̂ − b_f`, (out,); None where the bias stays float. Its scale may carry a gradient: those that learn."""
    quantizer = folding.bias_quantizer
    return None if scale is None or quantizer is None else quantizer(folded, scale) - folded


def training_parameters(
    folding: Folding,
    weight: Tensor,
    bias: Tensor | None,
    bn: BatchNormTensors | None,
    input_scale: Tensor | None,
    room: Tensor | None = None,
) -> TrainingParameters:
    """`Ŵ/k` and `e`; arguments as of `Folding.parameters`, without the gradients that `e` shall not hand on.

    Where `room` is given, like W, `Ŵ/k` may be put there.
    """
    grid, folded, scale = folding.parameters(weight, bias, bn, input_scale)
    value = grid.unfolded(room) if folding.weight_quantizer.fake_quant_enabled else grid.weight
    silenced = None if grid.effect is None else grid.effect.silenced
    error = bias_error(folding, folded, scale)
    return TrainingParameters(value.to(weight.dtype), grid.unfolded_qparams(), error, silenced)


def _fast_rounding(weight: Tensor, grid: QParams, quantizer: FakeQuantize) -> Tensor | None:
    """`fake_quantize` of a weight with learned scales by C++ or generated code; None where there is neither for it."""
    if quantizer.grid_gradient != "residual":
        return None
    if at_hand(weight) and grid.axis == 0 and grid.group_size is None and quantizer.spec.symmetric:
        functions = weight_rounding(quantizer.spec)
        found = functions and round_weight(weight, grid.scale, grid.qmin, grid.qmax, functions)
        if found is not None:
            return found
    last, code = channels_are_last(weight), rounding_code(weight, grid, quantizer)
    if last is None or code is None:
        return None
    rows, scale = in_memory_order(weight, last).flatten(1), LearnedScale(grid.scale[:, None])
    return from_memory_order(round_learned(rows, scale, None, grid.zero_point[:, None], code), weight, last)


def rounding_code(weight: Tensor, grid: QParams, quantizer: FakeQuantize) -> BothWays | None:
    """Code that rounds a weight to a grid per channel; None where there is none for it."""
    if not at_hand(weight, DEVICES) or grid.axis != 0 or grid.group_size is not None:
        return None
    gradient = quantizer.grid_gradient
    if gradient is None or channels_are_last(weight) is None:
        return None
    code = learned_code(-math.inf, math.inf, quantizer.spec, None, weight.device.type, gradient)
    return code if code.ready() else None

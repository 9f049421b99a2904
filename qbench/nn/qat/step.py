"""The training step of a convolution with BatchNorm, as the one function that serves it: `numerics.layer_step`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from qbench.fake_quantize import FakeQuantize
from qbench.fake_quantize.learned import LearnedFakeQuantize
from qbench.fake_quantize.producers import codes_of, note_producer, producer_of
from qbench.nn.qat.batch_norm import TrainingBatchNorm
from qbench.nn.qat.epilogue import (
    ByNative,
    Clip,
    InBlocks,
    bounds_of,
    chain_of,
    clip_of,
    fastest,
    leaves_output,
    rounding_of,
)
from qbench.nn.qat.fast_parameters import LearnedParameters, StraightParameters
from qbench.nn.qat.prepared import prepared
from qbench.numerics.blocks import at_hand, dense, in_rows
from qbench.numerics.layer_step import NOTHING_LEARNED, LayerStep, Learned, layer_step
from qbench.numerics.native.steps import LearnedRounding, learned_rounding
from qbench.numerics.saved_codes import Coded, encode

if TYPE_CHECKING:
    from qbench.nn.qat.layer import QatLayer


def training_step(layer: QatLayer, x: Tensor) -> Tensor | None:
    """The output of a layer in training from one function, given `x̂`; None where there is none for it."""
    plan = _plan_for(layer, x)
    step = None if plan is None else plan.step
    if plan is None or step is None:
        return None
    learned = NOTHING_LEARNED if plan.learns is None else plan.learns(layer, x, step)
    return None if learned is None else _taken(layer, x, plan, step, learned)


def image_step(layer: QatLayer, x: Tensor) -> Tensor | None:
    """The same of a layer that rounds its input itself, given that, where only its scale needs the gradient to `x̂`."""
    plan = None if x.requires_grad or producer_of(x) is not None else _plan_for(layer, x)
    if plan is None or plan.image is None or not dense(x).is_contiguous():
        return None
    assert plan.step is not None and plan.learns is not None and plan.learns.of_input is not None
    quantizer = plan.learns.of_input
    grid, learned = quantizer.learned_grid(x.shape), plan.learns(layer, x, plan.step)
    if learned is None:
        return None
    rounded, (scale, _) = torch.empty_like(x), grid.scale.resolved()
    plan.image.forward(in_rows(rounded), in_rows(x), scale, grid.place)
    slopes = functools.partial(plan.image.rounding.slopes, scale=scale, zero_point=grid.place)
    return _taken(layer, note_producer(rounded, quantizer), plan, plan.step, learned._replace(image=x, slopes=slopes))


def _plan_for(layer: QatLayer, x: Tensor) -> Plan | None:
    """What serves a layer, given its input; None where nothing does."""
    if torch.compiler.is_compiling():
        return None
    plan = prepared(layer, plan_of, _others)
    if x.ndim != layer.linear_weight.ndim or not at_hand(x) or torch.is_autocast_enabled("cpu"):
        return None
    return plan


def _taken(layer: QatLayer, x: Tensor, plan: Plan, step: LayerStep, learned: Learned) -> Tensor:
    bn: Any = layer.bn
    out, coded = layer_step(x, layer.linear_weight, layer.linear_bias, bn.weight, bn.bias, step, learned)
    layer.note_path(step.follow.path)
    if learned.scale is not None:
        assert isinstance(plan.quantizer, LearnedFakeQuantize)
        out = plan.quantizer.regularized(out)
    out = note_producer(out, plan.quantizer, coded)
    return out if plan.quantizer is layer.output_quantizer else layer.activated(out, plan.clip)


class Plan(NamedTuple):
    """What serves a layer.

    Attributes:
        step: Up to its first quantizer; None where nothing does.
        quantizer: That quantizer.
        clip: The output's quantizer where that is another one, and may write to what comes before it; else None.
        learns: Finds what is learned of the grids at the layer; None where nothing is.
        image: Rounds an input that comes in float to a grid that is learned; None where that is not for this function.
    """

    step: LayerStep | None
    quantizer: FakeQuantize | None
    clip: Clip | None = None
    learns: Learns | None = None
    image: LearnedRounding | None = None


@dataclasses.dataclass(frozen=True)
class Learns:
    """The quantizers at a layer that learn their grid; None for one that does not.

    Attributes:
        of_input: That of the input.
        of_weight: That of the weight.
        of_output: That of the output.
    """

    of_input: LearnedFakeQuantize | None
    of_weight: LearnedFakeQuantize | None
    of_output: LearnedFakeQuantize | None

    def __call__(self, layer: QatLayer, x: Tensor, step: LayerStep) -> Learned | None:
        """What is learned, as it is now; None where tensors are not as C++ expects them."""
        weight, parameters = layer.linear_weight, step.parameters
        assert isinstance(parameters, LearnedParameters)
        if not parameters.serves(weight, layer.linear_bias):
            return None
        input_scale = None if self.of_input is None else self.of_input.learned_scale()
        of_weight = None if self.of_weight is None else self.of_weight.learned_scale_of(weight)
        if self.of_output is None:
            return Learned(input_scale, of_weight)
        return Learned(input_scale, of_weight, *self.of_output.learned_grid(step.linear.output_shape(x, weight)))


def _others(layer: QatLayer) -> tuple[nn.Module | None, ...]:
    quantizers = layer.output_quantizer, layer.pre_activation_quantizer, layer.weight_quantizer
    there = [one for one in quantizers if one is not None]
    return layer.bn, layer.activation_module, _source_of(layer), *there, *(one.observer for one in there)


def _source_of(layer: QatLayer) -> FakeQuantize | None:
    return layer.sources[0] if layer.sources else None


def plan_of(layer: QatLayer) -> Plan:
    """What serves a layer as it is now."""
    before, last = layer.pre_activation_quantizer, layer.output_quantizer
    first, bounds = (last, bounds_of(layer.activation_module)) if before is None else (before, bounds_of(None))
    learns, clip = _learns(layer, first), None
    if before is not None and layer.fast_path and leaves_output(layer.activation_module):
        clip = clip_of(bounds_of(None), last, "cpu", layer.low_memory)
    step = _step_of(layer, first, bounds, learns)
    return Plan(step, first, clip, learns, None if step is None else _image_of(layer, learns))


def _step_of(
    layer: QatLayer, quantizer: FakeQuantize | None, bounds: tuple[float, float] | None, learns: Learns | None
) -> LayerStep | None:
    linear, source = layer.convolution(), layer.active_source()
    if not layer.uses_batch_statistics() or layer.sources is None:
        return None
    if quantizer is None or linear is None:
        return None
    bn = TrainingBatchNorm(layer.bn, layer.batch_norm_type, None, None, layer.channel_axis)
    if not bn.plain(layer.linear_weight):
        return None
    kind = StraightParameters if learns is None else LearnedParameters
    parameters = kind.of(layer.folding(), layer.bn, source, layer.linear_weight)
    chain = chain_of(bounds, quantizer)
    in_blocks = None if chain is None else InBlocks(bn, chain)
    rounding = rounding_of(bounds, quantizer, "cpu") if layer.fast_path else None
    follow = in_blocks if rounding is None else fastest(bn, quantizer, rounding, in_blocks, layer.low_memory)
    if parameters is None or follow is None or (in_blocks is None and not isinstance(follow, ByNative)):
        return None
    return LayerStep(linear, parameters, follow, _coder(layer, source))


def _learns(layer: QatLayer, quantizer: FakeQuantize | None) -> Learns | None:
    there = layer.active_source(), layer.weight_quantizer, quantizer
    learning = [one if isinstance(one, LearnedFakeQuantize) else None for one in there]
    return Learns(*learning) if any(one is not None for one in learning) else None


def _image_of(layer: QatLayer, learns: Learns | None) -> LearnedRounding | None:
    quantizer = None if learns is None else learns.of_input
    if quantizer is None or list(layer.input_quantizers.values()) != [quantizer]:
        return None
    kind, base = type(quantizer), LearnedFakeQuantize
    if (kind.regularized, kind.zero_point_of) != (base.regularized, base.zero_point_of):
        return None  # more than the scale learns
    rounding = rounding_of(bounds_of(None), quantizer, "cpu")
    return None if rounding is None else learned_rounding(*rounding)


def _coder(layer: QatLayer, source: FakeQuantize | None) -> Callable[[Tensor], Coded | None] | None:
    if not layer.low_memory or source is None:
        return None
    fast = layer.fast_path
    return lambda x: codes_of(x) or encode(x, source.snapshot(), fast_path=fast)

"""Everything that follows the linear part of a QAT layer.

    train     conv  →  BN_batch, + e  →  [pre-activation quantizer]  →  activation  →  output quantizer
    eval      conv  →                    [pre-activation quantizer]  →  activation  →  output quantizer

The bias error `e = b̂ − b_f` stands outside what BN normalises: before it, `e` would be a constant per channel that the
batch mean removes, and training would never see it.

`epilogue` runs the steps one by one and is what compilers see. In eager training on a CPU, a chain that ends in a plain
quantizer is one function instead (`qbench.numerics.fused`), with the same values and the same gradients. Where
`enable_fast_path` asks for it, that function is generated code (`qbench.numerics.generated_epilogue`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qbench.fake_quantize import FakeQuantize
from qbench.fake_quantize.base import is_hooked
from qbench.fake_quantize.learned import LearnedFakeQuantize
from qbench.fake_quantize.producers import note_producer
from qbench.nn.qat.batch_norm import TrainingBatchNorm
from qbench.numerics import fused
from qbench.numerics.blocks import at_hand, channels_are_last, dense
from qbench.numerics.generated import DEVICES, standing_for
from qbench.numerics.generated_epilogue import Code, Moved, generated_code, normalize_clip_quantize
from qbench.numerics.generated_rounding import Learned, clip_code, clip_quantize, learned_code, round_learned
from qbench.numerics.interval import is_served
from qbench.observers import Observer

Step = Callable[[Tensor], Tensor]


def epilogue(y: Tensor, *steps: Step | None) -> Tensor:
    """Apply the steps that are given, in order."""
    for step in steps:
        if step is not None:
            y = step(y)
    return y


def fused_epilogue(
    y: Tensor,
    bn: TrainingBatchNorm | None,
    bounds: tuple[float, float] | None,
    quantizer: FakeQuantize | None,
) -> Tensor | None:
    """BatchNorm, an activation that clamps, and the quantizer behind it from one function; None where there is none.

    Args:
        y: Output of the linear part, (batch, out, …), that nothing else needs: without BatchNorm it is written to.
        bn: BatchNorm over the batch's own statistics.
        bounds: Of the activation; None where it is of another form.
        quantizer: Observes, then quantizes with the range that includes this batch.
    """
    if quantizer is None or bounds is None or not at_hand(y) or not quantizer.rounds_plainly or quantizer.learned:
        return None
    if not is_served(quantizer.spec):
        return None
    chain = fused.Chain(*bounds, quantizer.observer.by_ends, quantizer.watch)
    if bn is None:
        return None if y._is_view() else note_producer(fused.clip_quantize(y, chain), quantizer)
    if not bn.plain(y) or y.numel() == y.shape[1]:  # one value per channel: PyTorch refuses, in its own words
        return None
    with bn.keeping_silenced():
        bn.holder._check_input_dim(y)
        out = fused.normalize_clip_quantize(y, bn.holder.weight, bn.shift, bn.count(), chain)
        return note_producer(out, quantizer)


def generated_epilogue(
    y: Tensor,
    bn: TrainingBatchNorm | None,
    bounds: tuple[float, float] | None,
    quantizer: FakeQuantize | None,
) -> Tensor | None:
    """`fused_epilogue` by generated code; None where there is none for it.

    Args:
        y: As there.
        bn: As there.
        bounds: As there.
        quantizer: As there.
    """
    if quantizer is None or bounds is None or not at_hand(y, DEVICES) or not quantizer.rounds_plainly:
        return None
    if quantizer.scale.dtype != torch.float32:
        return None
    if isinstance(quantizer, LearnedFakeQuantize):
        out = _on_learned_grid(y, bn, bounds, quantizer)
    else:
        out = _on_observed_grid(y, bn, bounds, quantizer)
    return None if out is None else note_producer(out, quantizer)


def _on_observed_grid(
    y: Tensor, bn: TrainingBatchNorm | None, bounds: tuple[float, float], quantizer: FakeQuantize
) -> Tensor | None:
    observes = quantizer.training and quantizer.observer_enabled
    if observes and not quantizer.observer.by_ends:
        return None
    rule = rule_of(quantizer.observer) if observes else None
    rounding = *bounds, quantizer.spec, rule, y.device.type
    grid = quantizer.scale, quantizer.zero_point
    state = quantizer.observer.state() if observes else ()
    if bn is None:
        code = clip_code(*rounding)
        if y._is_view() or not dense(y).is_contiguous() or not code.ready():
            return None
        out = clip_quantize(y, *grid, state, code)
    else:
        both = _normalizing_code(y, bn, rounding)
        if both is None:
            return None
        out = _normalized(y, bn, Moved(bn.count(), bn.silenced, *grid, state), both)
    quantizer.seen_data = True
    return out


def _on_learned_grid(
    y: Tensor, bn: TrainingBatchNorm | None, bounds: tuple[float, float], quantizer: LearnedFakeQuantize
) -> Tensor | None:
    rounding = *bounds, quantizer.spec, None, y.device.type, quantizer.grid_gradient
    if bn is None:
        code = learned_code(*rounding)
        if not dense(y).is_contiguous() or not code.ready():
            return None
        out = round_learned(y, *_learned_grid(y, quantizer), code)
    else:
        both = _normalizing_code(y, bn, rounding)
        if both is None:
            return None
        grid, learned = _learned_grid(y, quantizer)
        out = _normalized(y, bn, Moved(bn.count(), bn.silenced, *grid, ()), both, learned)
    return quantizer.regularized(out)


def _learned_grid(y: Tensor, quantizer: LearnedFakeQuantize) -> tuple[tuple[Tensor, Tensor], Learned]:
    """The grid for `y`, `s` and `z`, and the same with their gradients."""
    if quantizer.training:
        quantizer.note_size(y)
    snapshot = quantizer.snapshot()
    return (snapshot.scale.detach(), snapshot.zero_point), (snapshot.scale, quantizer.zero_point_of(snapshot))


def _normalizing_code(y: Tensor, bn: TrainingBatchNorm, rounding: tuple[Any, ...]) -> Code | None:
    """Code for a BatchNorm and what follows it; None where there is none for it."""
    last = channels_are_last(y)
    if last is None or y.numel() == y.shape[1] or not bn.plain(y):
        return None
    code = generated_code(last, bn.holder.momentum, bn.holder.eps, *rounding)
    if not code.ready():
        return None
    bn.holder._check_input_dim(y)
    return code


def _normalized(y: Tensor, bn: TrainingBatchNorm, moved: Moved, code: Code, learned: Learned = (None, None)) -> Tensor:
    return normalize_clip_quantize(y, bn.holder.weight, bn.holder.bias, bn.error, moved, code, learned)


def rule_of(observer: Observer) -> Observer:
    """The observer that stands for all which follow ranges as this one does: asked how they move, not what it saw."""
    return standing_for(observer, type(observer), observer.settings())


def bounds_of(activation: nn.Module | None) -> tuple[float, float] | None:
    """Where an activation cuts: `clamp(x, low, high)`; None where it is not of that form, or somebody watches it."""
    if activation is None:
        return -math.inf, math.inf
    if is_hooked(activation):
        return None
    if type(activation) is nn.ReLU:
        return 0.0, math.inf
    if isinstance(activation, nn.Hardtanh) and type(activation) in (nn.ReLU6, nn.Hardtanh):
        return activation.min_val, activation.max_val
    return None

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

import dataclasses
import functools
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
from qbench.numerics.generated_rounding import clip_code, clip_quantize, learned_code, round_learned
from qbench.numerics.interval import is_served
from qbench.numerics.layer_step import Follow, Learned, normalized
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
    chain = chain_of(bounds, quantizer) if at_hand(y) else None
    if chain is None:
        return None
    if bn is None:
        return None if y._is_view() else note_producer(fused.clip_quantize(y, chain), quantizer)
    return note_producer(_normalized(y, bn, InBlocks(bn, chain)), quantizer) if _is_plain(bn, y) else None


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
    if quantizer is None or not at_hand(y, DEVICES):
        return None
    rounding = rounding_of(bounds, quantizer, y.device.type)
    if rounding is None:
        return None
    if isinstance(quantizer, LearnedFakeQuantize):
        out = _on_learned_grid(y, bn, rounding, quantizer)
    else:
        out = _on_observed_grid(y, bn, rounding, quantizer)
    return None if out is None else note_producer(out, quantizer)


def _on_observed_grid(
    y: Tensor, bn: TrainingBatchNorm | None, rounding: tuple[Any, ...], quantizer: FakeQuantize
) -> Tensor | None:
    if bn is not None:
        follow = ByCode(bn, quantizer, rounding)
        return _normalized(y, bn, follow) if _is_plain(bn, y) and follow.serves(y) else None
    code = clip_code(*rounding)
    if y._is_view() or not dense(y).is_contiguous() or not code.ready():
        return None
    quantizer.seen_data = True
    return clip_quantize(y, quantizer.scale, quantizer.zero_point, observed_state(quantizer), code)


def _on_learned_grid(
    y: Tensor, bn: TrainingBatchNorm | None, rounding: tuple[Any, ...], quantizer: LearnedFakeQuantize
) -> Tensor | None:
    if bn is None:
        code = learned_code(*rounding)
        if not dense(y).is_contiguous() or not code.ready():
            return None
        return quantizer.regularized(round_learned(y, *_learned_grid(y, quantizer), code))
    follow = ByCode(bn, quantizer, rounding)
    if not (_is_plain(bn, y) and follow.serves(y)):
        return None
    grid, learned = _learned_grid(y, quantizer)
    return quantizer.regularized(_normalized(y, bn, functools.partial(follow, grid=grid), learned))


def _learned_grid(y: Tensor, quantizer: LearnedFakeQuantize) -> tuple[tuple[Tensor, Tensor], Learned]:
    """The grid for `y`, `s` and `z`, and the same with their gradients."""
    if quantizer.training:
        quantizer.note_size(y)
    snapshot = quantizer.snapshot()
    return (snapshot.scale.detach(), snapshot.zero_point), (snapshot.scale, quantizer.zero_point_of(snapshot))


def _is_plain(bn: TrainingBatchNorm, y: Tensor) -> bool:
    """Whether a BatchNorm can be part of a function; one that refuses its input does so here, in its own words."""
    if y.numel() == y.shape[1] or not bn.plain(y):  # one value a channel: PyTorch refuses that
        return False
    bn.holder._check_input_dim(y)
    return True


def _normalized(y: Tensor, bn: TrainingBatchNorm, follow: Follow, learned: Learned = (None, None)) -> Tensor:
    return normalized(y, bn.holder.weight, bn.holder.bias, bn.error, bn.silenced, follow, learned)


def chain_of(bounds: tuple[float, float] | None, quantizer: FakeQuantize | None) -> fused.Chain | None:
    """An activation and a quantizer for the function in blocks; None where they are not for it."""
    if quantizer is None or bounds is None or not quantizer.rounds_plainly or quantizer.learned:
        return None
    return fused.Chain(*bounds, quantizer.observer.by_ends, quantizer.watch) if is_served(quantizer.spec) else None


def rounding_of(bounds: tuple[float, float] | None, quantizer: FakeQuantize, device: str) -> tuple[Any, ...] | None:
    """The same for generated code: what `Rounding` is made of."""
    if bounds is None or not quantizer.rounds_plainly or not is_served(quantizer.spec):
        return None
    if quantizer.scale.dtype != torch.float32:
        return None
    if isinstance(quantizer, LearnedFakeQuantize):
        return *bounds, quantizer.spec, None, device, quantizer.grid_gradient
    observes = quantizer.training and quantizer.observer_enabled
    if observes and not quantizer.observer.by_ends:
        return None
    return *bounds, quantizer.spec, rule_of(quantizer.observer) if observes else None, device


def observed_state(quantizer: FakeQuantize) -> tuple[Tensor, ...]:
    """What the observer remembers, where it observes."""
    return quantizer.observer.state() if quantizer.training and quantizer.observer_enabled else ()


@dataclasses.dataclass(frozen=True)
class InBlocks:
    """What follows a linear part, by PyTorch's operators in blocks: a `Follow`.

    Attributes:
        bn: The BatchNorm.
        chain: What follows it.
    """

    bn: TrainingBatchNorm
    chain: fused.Chain

    def __call__(
        self, y: Tensor, gamma: Tensor | None, beta: Tensor | None, error: Tensor | None, silenced: Tensor | None
    ) -> fused.Followed:
        """See `Follow`."""
        bn = dataclasses.replace(self.bn, error=error, silenced=silenced)
        with bn.keeping_silenced():
            return fused.normalize_clip_quantize(y, gamma, bn.shift, bn.count(), self.chain)


@dataclasses.dataclass(frozen=True)
class ByCode:
    """The same by generated code.

    Attributes:
        bn: The BatchNorm.
        quantizer: What follows it.
        rounding: Of `rounding_of`.
        otherwise: What to do where there is no code for a tensor; None where that is asked for before.
    """

    bn: TrainingBatchNorm
    quantizer: FakeQuantize
    rounding: tuple[Any, ...]
    otherwise: InBlocks | None = None

    def code(self, last: bool) -> Code:
        """For one of the two orders in memory."""
        return generated_code(last, self.bn.holder.momentum, self.bn.holder.eps, *self.rounding)

    def serves(self, y: Tensor) -> bool:
        """Whether there is code for the order in which `y` lies in memory."""
        last = channels_are_last(y)
        return last is not None and self.code(last).ready()

    def __call__(
        self,
        y: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        error: Tensor | None,
        silenced: Tensor | None,
        grid: tuple[Tensor, Tensor] | None = None,
    ) -> fused.Followed:
        """See `Follow`; with the grid where that is learned."""
        if self.otherwise is not None and not self.serves(y):
            return self.otherwise(y, gamma, beta, error, silenced)
        quantizer = self.quantizer
        state = observed_state(quantizer) if grid is None else ()
        scale, zero_point = (quantizer.scale, quantizer.zero_point) if grid is None else grid
        moved = Moved(self.bn.count(), silenced, scale, zero_point, state)
        found = normalize_clip_quantize(y, gamma, beta, error, moved, self.code(bool(channels_are_last(y))))
        if not quantizer.seen_data:
            quantizer.seen_data = True
        return found


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

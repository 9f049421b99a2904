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
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qbench.fake_quantize import FakeQuantize
from qbench.fake_quantize.base import is_hooked
from qbench.fake_quantize.learned import LearnedFakeQuantize
from qbench.fake_quantize.producers import note_producer
from qbench.nn.qat.batch_norm import TrainingBatchNorm
from qbench.numerics import fused
from qbench.numerics.blocks import at_hand, channels_are_last, dense
from qbench.numerics.generated import DEVICES, Generated, standing_for
from qbench.numerics.generated_epilogue import Code, Moved, generated_code, normalize_clip_quantize
from qbench.numerics.generated_rounding import RoundingCode, clip_code, clip_quantize, learned_code, round_learned
from qbench.numerics.interval import is_served
from qbench.numerics.layer_step import Follow, normalized
from qbench.numerics.native.steps import Clipping, Following, Remembered, clipping, following, learned_rounding
from qbench.numerics.qparams import LearnedScale, to_learned
from qbench.observers import Observer

Step = Callable[[Tensor], Tensor]

_NEED_INPUT_ALONE = (nn.SiLU, nn.Hardswish, nn.Hardsigmoid, nn.GELU, nn.Mish)


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
) -> tuple[Tensor, str] | None:
    """`fused_epilogue` by C++ or generated code, and which it was; None where there is neither for it.

    Args:
        y: As there.
        bn: As there.
        bounds: As there.
        quantizer: As there.
    """
    if quantizer is None or not at_hand(y, DEVICES):
        return None
    if bn is None:
        clip = clip_of(bounds, quantizer, y.device.type)
        clipped = None if clip is None else clip(y)
        return None if clip is None or clipped is None else (clipped, clip.path)
    rounding = rounding_of(bounds, quantizer, y.device.type)
    if rounding is None or not _is_plain(bn, y):
        return None
    chain = chain_of(bounds, quantizer)
    follow = fastest(bn, quantizer, rounding, None if chain is None else InBlocks(bn, chain))
    if isinstance(follow, ByCode) and follow.code(y) is None:
        return None
    if not isinstance(quantizer, LearnedFakeQuantize):
        out = _normalized(y, bn, follow)
    elif channels_are_last(y) is None:
        return None
    else:
        scale, zero_point, place = quantizer.learned_grid(y.shape)
        by_grid = functools.partial(follow, grid=(scale, place))
        out = quantizer.regularized(_normalized(y, bn, by_grid, scale.learned, zero_point))
    return note_producer(out, quantizer), follow.path


def _is_plain(bn: TrainingBatchNorm, y: Tensor) -> bool:
    """Whether a BatchNorm can be part of a function; one that refuses its input does so here, in its own words."""
    if y.numel() == y.shape[1] or not bn.plain(y):  # one value a channel: PyTorch refuses that
        return False
    bn.holder._check_input_dim(y)
    return True


def _normalized(y: Tensor, bn: TrainingBatchNorm, follow: Follow, *learned: Tensor | None) -> Tensor:
    return normalized(y, bn.holder.weight, bn.holder.bias, bn.error, bn.silenced, follow, *learned)


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

    path: ClassVar[str] = "fused"

    bn: TrainingBatchNorm
    chain: fused.Chain

    def __call__(
        self,
        y: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        error: Tensor | None,
        silenced: Tensor | None,
        grid: tuple[LearnedScale, Tensor] | None = None,
    ) -> fused.Followed:
        """See `FollowByPath`; not for grids that are learned."""
        bn = dataclasses.replace(self.bn, error=error, silenced=silenced)
        with bn.keeping_silenced():
            return fused.normalize_clip_quantize(y, gamma, bn.shift, bn.count(), self.chain)


class ByCode:
    """The same by generated code.

    Args:
        bn: The BatchNorm.
        quantizer: What follows it.
        rounding: Of `rounding_of`.
        otherwise: What to do where there is no code for a tensor; None where `code` is asked before.
        low_memory: Whether to write down the codes of the output, too.

    Attributes:
        path: Which code the last call took.
    """

    def __init__(
        self,
        bn: TrainingBatchNorm,
        quantizer: FakeQuantize,
        rounding: tuple[Any, ...],
        otherwise: InBlocks | None = None,
        low_memory: bool = False,
    ) -> None:
        self.path, self._low_memory = "generated", low_memory
        self._bn, self._quantizer, self._rounding, self._otherwise = bn, quantizer, rounding, otherwise
        self._codes: dict[bool | None, Code | None] = {None: None}

    def code(self, y: Tensor) -> Code | None:
        """For the order in which `y` lies in memory; None where there is none."""
        last = channels_are_last(y)
        if last is not None and last not in self._codes:
            holder = self._bn.holder
            self._codes[last] = generated_code(last, holder.momentum, holder.eps, *self._rounding)
        code = self._codes[last]
        return code if code is not None and code.ready() else None

    def __call__(
        self,
        y: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        error: Tensor | None,
        silenced: Tensor | None,
        grid: tuple[LearnedScale, Tensor] | None = None,
    ) -> fused.Followed:
        """See `Follow`; with the grid where that is learned."""
        code, quantizer = self.code(y), self._quantizer
        if code is None:
            assert self._otherwise is not None
            self.path = self._otherwise.path
            return self._otherwise(y, gamma, beta, error, silenced)
        slope = None
        if grid is None:
            moved = Moved(
                self._bn.count(), silenced, quantizer.scale, quantizer.zero_point, observed_state(quantizer)
            )
            _note_data(quantizer)
        else:
            scale, slope = grid[0].resolved()
            moved = Moved(self._bn.count(), silenced, scale, grid[1], ())
        self.path = "generated"
        followed = normalize_clip_quantize(y, gamma, beta, error, moved, code, self._low_memory)
        return followed if slope is None else followed._replace(backward=_through(followed.backward, slope))


class ByNative:
    """The same by C++.

    Args:
        bn: The BatchNorm.
        quantizer: What follows it.
        steps: What the functions do.
        otherwise: What to do where there are none for a tensor.
        low_memory: Whether to write down the codes of the output, too.

    Attributes:
        path: Which code the last call took.
    """

    def __init__(
        self,
        bn: TrainingBatchNorm,
        quantizer: FakeQuantize,
        steps: Following,
        otherwise: ByCode,
        low_memory: bool = False,
    ) -> None:
        self.path, self._low_memory = "native", low_memory
        self._holder, self._quantizer, self._steps, self._otherwise = bn.holder, quantizer, steps, otherwise
        self._backward = functools.partial(_native_backward, steps=steps)

    def __call__(
        self,
        y: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        error: Tensor | None,
        silenced: Tensor | None,
        grid: tuple[LearnedScale, Tensor] | None = None,
    ) -> fused.Followed:
        """See `Follow`; with the grid where that is learned."""
        bn, quantizer = self._holder, self._quantizer
        if grid is None:
            own, observed = quantizer._buffers, quantizer.observer._buffers
            scale, zero_point = own["scale"], own["zero_point"]
            low, high = observed.get("min_val", scale), observed.get("max_val", scale)
            assert scale is not None and zero_point is not None and low is not None and high is not None
            state: Any = low, high, scale, zero_point
        else:
            state = grid[0].learned, grid[0].learned, *grid
        to = Remembered(bn.running_mean, bn.running_var, bn.num_batches_tracked, *state)
        found = self._steps.forward(y, gamma, beta, error, silenced, to, self._low_memory)
        if found is None:
            followed = self._otherwise(y, gamma, beta, error, silenced, grid)
            self.path = self._otherwise.path
            return followed
        self.path = "native"
        if grid is None:
            _note_data(quantizer)
        out, saved, coded = found
        return fused.Followed(out, (saved,), self._backward, coded)


def fastest(
    bn: TrainingBatchNorm,
    quantizer: FakeQuantize,
    rounding: tuple[Any, ...],
    otherwise: InBlocks | None,
    low_memory: bool = False,
) -> ByNative | ByCode:
    """The same by C++, or by generated code where that does not serve; arguments as of `ByCode`."""
    generated = ByCode(bn, quantizer, rounding, otherwise, low_memory)
    steps = following(bn.holder.momentum, bn.holder.eps, *rounding) if _on_cpu(rounding) else None
    return generated if steps is None else ByNative(bn, quantizer, steps, generated, low_memory)


def _on_cpu(rounding: tuple[Any, ...]) -> bool:
    return rounding[4] == "cpu"


def _native_backward(
    grad: Tensor, y: Tensor, saved: tuple[Tensor, ...], wanted: tuple[bool, ...], *, steps: Following
) -> tuple[Tensor | None, ...]:
    grad_y, grad_gamma, grad_beta, *to_grid = steps.backward(grad, y, saved[0], wanted[5])
    # The gradient to e, which is added to β, is that to β.
    others = grad_gamma, grad_beta, grad_beta, *(to_grid or (None, None))
    return grad_y, *(value if asked else None for value, asked in zip(others, wanted[1:], strict=True))


def _through(backward: fused.Backward, slope: Tensor) -> fused.Backward:
    """A backward whose gradient to `s` goes on to what is learned of it."""

    def found(*given: Any) -> tuple[Tensor | None, ...]:
        *others, to_scale, to_zero = backward(*given)
        return *others, None if to_scale is None else to_learned(to_scale, slope), to_zero

    return found


def _note_data(quantizer: FakeQuantize) -> None:
    if not quantizer.seen_data:  # set always, it would be another attribute in each step to what is prepared
        quantizer.seen_data = True


@dataclasses.dataclass(frozen=True)
class ClipByCode:
    """An activation that clamps and a quantizer that observes or stays, by generated code.

    Attributes:
        quantizer: The quantizer.
        code: Of `clip_code`.
    """

    path: ClassVar[str] = "generated"

    quantizer: FakeQuantize
    code: Generated

    def __call__(self, y: Tensor) -> Tensor | None:
        """`y`, float32 and nobody else's, on the grid, where it lies; None where it is a view or has gaps in memory."""
        quantizer = self.quantizer
        if y._is_view() or not dense(y).is_contiguous() or not self.code.ready():
            return None
        out = clip_quantize(y, quantizer.scale, quantizer.zero_point, observed_state(quantizer), self.code)
        _note_data(quantizer)
        return note_producer(out, quantizer)


class ClipByNative:
    """The same by C++.

    Args:
        quantizer: The quantizer.
        steps: What the functions do.
        low_memory: Whether to write down the codes of the output, too.
        otherwise: What to do where there is nothing for a tensor.

    Attributes:
        path: Which code the last call took.
    """

    def __init__(self, quantizer: FakeQuantize, steps: Clipping, otherwise: ClipByCode, low_memory: bool) -> None:
        self.path = "native"
        self._quantizer, self._steps, self._otherwise, self._low_memory = quantizer, steps, otherwise, low_memory

    def __call__(self, y: Tensor) -> Tensor | None:
        """See `ClipByCode`."""
        if y._is_view() or not dense(y).is_contiguous():
            return None
        quantizer = self._quantizer
        scale, low, high = quantizer.scale, *(observed_state(quantizer) or (quantizer.scale, quantizer.scale))
        found = self._steps(y, (low, high), scale, quantizer.zero_point, self._low_memory)
        if found is None:
            self.path = self._otherwise.path
            return self._otherwise(y)
        self.path = "native"
        _note_data(quantizer)
        return note_producer(found[0], quantizer, found[1])


@dataclasses.dataclass(frozen=True)
class ClipLearned:
    """An activation that clamps and a quantizer that learns its grid.

    Attributes:
        quantizer: The quantizer.
        code: Of `learned_rounding` or `learned_code`.
        path: Which of the two it is.
    """

    quantizer: LearnedFakeQuantize
    code: RoundingCode
    path: str

    def __call__(self, y: Tensor) -> Tensor | None:
        """`y`, float32, on the grid; None where it has gaps in memory."""
        if not dense(y).is_contiguous():
            return None
        quantizer = self.quantizer
        out = quantizer.regularized(round_learned(y, *quantizer.learned_grid(y.shape), self.code))
        return note_producer(out, quantizer)


#: What puts an activation that clamps, and the quantizer behind it, to a tensor.
Clip = ClipByNative | ClipByCode | ClipLearned


def clip_of(
    bounds: tuple[float, float] | None, quantizer: FakeQuantize | None, device: str, low_memory: bool = False
) -> Clip | None:
    """An activation that clamps and a quantizer by the fastest code that there is; None where there is none.

    Args:
        bounds: Of the activation; None where it is of another form.
        quantizer: The quantizer.
        device: Type of the device.
        low_memory: Whether to write down the codes of the output, where that can be done.
    """
    rounding = None if quantizer is None else rounding_of(bounds, quantizer, device)
    if quantizer is None or rounding is None:
        return None
    if isinstance(quantizer, LearnedFakeQuantize):
        code = learned_rounding(*rounding) if _on_cpu(rounding) else None
        if code is not None:
            return ClipLearned(quantizer, code, "native")
        other = learned_code(*rounding)
        return ClipLearned(quantizer, other, "generated") if other.ready() else None
    generated = ClipByCode(quantizer, clip_code(*rounding))
    steps = clipping(*rounding) if _on_cpu(rounding) else None
    if steps is not None:
        return ClipByNative(quantizer, steps, generated, low_memory)
    return generated if generated.code.ready() else None


def rule_of(observer: Observer) -> Observer:
    """The observer that stands for all which follow ranges as this one does: asked how they move, not what it saw."""
    return standing_for(observer, type(observer), observer.settings())


def leaves_output(activation: nn.Module | None) -> bool:
    """Whether neither an activation's backward needs what it puts out, nor anybody watches it: it may be written to."""
    return activation is not None and type(activation) in _NEED_INPUT_ALONE and not is_hooked(activation)


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

"""The training step of a layer, prepared: what to do is found out once, and holds as long as nothing is switched.

Which function serves a layer depends on some thirty things: switches, hooks, kinds of quantizers, settings of their
observers. Asking for all of them takes longer than a small layer computes. So they are asked for once, and in each step
only whether they are the same objects as then.
"""

from __future__ import annotations

import itertools
import operator
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qbench.fake_quantize import FakeQuantize
from qbench.fake_quantize.producers import note_producer
from qbench.nn.qat.batch_norm import TrainingBatchNorm
from qbench.nn.qat.epilogue import ByCode, InBlocks, bounds_of, chain_of, rounding_of
from qbench.nn.qat.parameters import StraightParameters
from qbench.numerics.blocks import at_hand
from qbench.numerics.layer_step import LayerStep, layer_step
from qbench.numerics.saved_codes import Coded, encode

if TYPE_CHECKING:
    from qbench.nn.qat.layer import QatLayer

# By layer, and not on it: a layer that is copied or stored takes no code along.
_STEPS: weakref.WeakKeyDictionary[QatLayer, TrainingStep] = weakref.WeakKeyDictionary()


class Unchanged:
    """Whether a module and others are as they were: of the same classes, with the same attributes and submodules.

    Tensors in parameters and buffers may be others.

    Args:
        module: One that is called; not kept.
        others: Modules that must not be watched either, as they are not called; None is left out.
    """

    def __init__(self, module: nn.Module, *others: nn.Module | None) -> None:
        self._others = [other for other in others if other is not None]
        self._hooks = [hooks for other in self._others for hooks in _hooks(other)]
        # Views: they show what there is when they are read.
        self._views = [view for one in (module, *self._others) for view in (vars(one).values(), one._modules.values())]
        self._before = self._now(module)

    def __call__(self, module: nn.Module) -> bool:
        """Ask."""
        now = self._now(module)
        return len(now) == len(self._before) and all(map(operator.is_, now, self._before)) and not any(self._hooks)

    def _now(self, module: nn.Module) -> list[Any]:
        return [type(module), *map(type, self._others), *itertools.chain.from_iterable(self._views)]


def _hooks(module: nn.Module) -> tuple[Any, ...]:
    return module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks


class TrainingStep:
    """What one layer does in training, as it is configured now.

    Args:
        layer: In training.
    """

    def __init__(self, layer: QatLayer) -> None:
        sources = layer.sources or (None,)
        self._quantizer, self._source = layer.output_quantizer, sources[0]
        quantizers = [one for one in (self._quantizer, layer.weight_quantizer) if one is not None]
        observers = [one.observer for one in quantizers]
        others = layer.bn, layer.activation_module, self._source, *quantizers, *observers
        self.unchanged = Unchanged(layer, *others)
        self._step = _step_of(layer, self._source)

    def __call__(self, layer: QatLayer, x: Tensor) -> Tensor | None:
        """The layer's output for its input; None where there is no such function for it."""
        step, weight = self._step, layer.linear_weight
        if step is None or x.ndim != weight.ndim or not at_hand(x) or torch.is_autocast_enabled(x.device.type):
            return None
        layer.check_producer(x, 0)
        bn: Any = layer.bn
        out = note_producer(layer_step(x, weight, layer.linear_bias, bn.weight, bn.bias, step), self._quantizer)
        path = "generated" if isinstance(step.follow, ByCode) else "fused"
        if layer.path != path:
            layer.path = path
        return out


def training_step(layer: QatLayer, x: Tensor) -> Tensor | None:
    """The output of a layer in training from one function, given its input; None where there is none for it."""
    if torch.compiler.is_compiling():
        return None
    step = _STEPS.get(layer)
    if step is None or not step.unchanged(layer):
        step = _STEPS[layer] = TrainingStep(layer)
    return step(layer, x)


def _step_of(layer: QatLayer, source: FakeQuantize | None) -> LayerStep | None:
    quantizer, linear = layer.output_quantizer, layer.convolution()
    if not layer.uses_batch_statistics() or layer.sources is None or len(layer.input_quantizers):
        return None
    if quantizer is None or linear is None or layer.pre_activation_quantizer is not None or quantizer.learned:
        return None
    bn = TrainingBatchNorm(layer.bn, layer.batch_norm_type, None, None, layer.channel_axis)
    parameters = StraightParameters.of(layer.folding(), layer.bn, source, layer.linear_weight)
    bounds = bounds_of(layer.activation_module)
    chain = chain_of(bounds, quantizer)
    if parameters is None or chain is None or not bn.plain(layer.linear_weight):
        return None
    in_blocks = InBlocks(bn, chain)
    rounding = rounding_of(bounds, quantizer, "cpu") if layer.fast_path else None
    follow = in_blocks if rounding is None else ByCode(bn, quantizer, rounding, in_blocks)
    return LayerStep(linear, parameters, follow, _coder(layer, source))


def _coder(layer: QatLayer, source: FakeQuantize | None) -> Callable[[Tensor], Coded | None] | None:
    if not layer.low_memory or source is None or not source.active:
        return None
    fast = layer.fast_path
    return lambda x: encode(x, source.snapshot(), fast_path=fast)

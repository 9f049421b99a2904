"""Training steps in a model that is compiled whole: operators in C++ in place of what would be traced.

Whether they serve a layer is asked of the layer itself, once, while the model is traced (`QatLayer.serving_rule`); what
may change later is read in the traced code, so that the compiled code is guarded by it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from qbench.fake_quantize import FakeQuantize
from qbench.nn.qat.epilogue import ByNative, ClipByNative, bounds_of, clip_of
from qbench.nn.qat.fast_parameters import StraightParameters
from qbench.nn.qat.step import Plan, plan_of
from qbench.numerics.native import lowering, operators

if TYPE_CHECKING:
    from qbench.nn.qat.body import QatOp
    from qbench.nn.qat.layer import QatLayer


class Grid(NamedTuple):
    """What stays of a quantizer that is served.

    Attributes:
        bits: Of its codes.
        signed: Whether they are.
        symmetric: Whether its grid is.
        averages: Whether its observer averages ranges; else it keeps the hull of all.
    """

    bits: int
    signed: bool
    symmetric: bool
    averages: bool


class Rule(NamedTuple):
    """What stays of a layer that is served.

    Attributes:
        before: Whether the quantizer that is part of it is the one before the activation.
        low: Lower bound of the activation that is part of it.
        high: Upper bound.
        grid: Of the quantizer.
        linear: Stride, padding, dilation and groups of the convolution.
        weight_grid: Lowest and highest code of the weight.
        bias: Width and largest code of the bias; 0 and 0 where it stays float.
    """

    before: bool
    low: float
    high: float
    grid: Grid
    linear: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]
    weight_grid: tuple[int, int]
    bias: tuple[int, int]


def rule_of(layer: QatLayer) -> Rule | None:
    """What stays of a layer; None where C++ does not serve it."""
    with _not_compiling():
        plan: Plan = plan_of(layer)
    step, quantizer = plan.step, plan.quantizer
    if step is None or quantizer is None or not isinstance(step.follow, ByNative):
        return None
    if not isinstance(step.parameters, StraightParameters) or step.parameters.functions is None:
        return None
    lowering.register()
    before = quantizer is not layer.output_quantizer
    bounds = bounds_of(None if before else layer.activation_module)
    assert bounds is not None
    functions = step.parameters.functions
    weight_grid, bias = (functions.qmin, functions.qmax), (functions.bias_bits, functions.code_limit)
    linear = step.linear
    of_linear = linear.stride, linear.padding, linear.dilation, linear.groups
    return Rule(before, *bounds, _grid_of(quantizer), of_linear, weight_grid, bias)


def clip_rule_of(op: QatOp, bounds: tuple[float, float]) -> Grid | None:
    """What stays of the quantizer of an operation behind a clamp; None where C++ does not serve it."""
    quantizer = op.output_quantizer
    with _not_compiling():
        clip = clip_of(bounds, quantizer, "cpu")
    return _grid_of(quantizer) if quantizer is not None and isinstance(clip, ClipByNative) else None


def _grid_of(quantizer: FakeQuantize) -> Grid:
    spec = quantizer.spec
    return Grid(spec.bits, spec.signed, spec.symmetric, quantizer.observer.weight_of_newest != -1.0)


@contextlib.contextmanager
def _not_compiling() -> Iterator[None]:
    """While it is entered, nothing takes itself to be traced: while a model is, all of a process does."""
    before, torch.compiler._is_compiling_flag = torch.compiler._is_compiling_flag, False
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag = before


def compiled_step(layer: QatLayer, x: Tensor) -> Tensor | None:
    """The output of a layer in training, given `x̂`; None where it is to be traced instead."""
    weight, bn, sources = layer.linear_weight, layer.bn, layer.sources
    if not layer.fast_path or not layer.uses_batch_statistics() or not sources or x.ndim != weight.ndim:
        return None
    if not _is_served(x):
        return None
    quantizers: list[Any] = [layer.output_quantizer, layer.pre_activation_quantizer, layer.weight_quantizer]
    there = [one for one in quantizers if one is not None]
    # The answer is that of this moment: these are read here so that another moment is asked again.
    switches = [switch for one in there for switch in _switches(one)]
    bounds = bounds_of(layer.activation_module) or ()
    rule: Rule | None = layer.serving_rule(bn.training, sources[0].fake_quant_enabled, *switches, *bounds)  # type: ignore[union-attr]
    if rule is None:
        return None
    return _served(layer, x, rule)


def compiled_clip(op: QatOp, y: Tensor, bounds: tuple[float, float]) -> Tensor | None:
    """An operation's output, clamped and on its grid; None where that is to be traced instead."""
    quantizer: Any = op.output_quantizer
    if not op.fast_path or not op.training or quantizer is None or not _is_served(y):
        return None
    grid: Grid | None = op.clip_rule(*bounds, *_switches(quantizer))
    if grid is None:
        return None
    state, of_newest = _remembered(quantizer, grid)
    out = operators.clip(y, *state, *bounds, grid.bits, grid.signed, grid.symmetric, of_newest)
    quantizer.seen_data = True
    return out


def _is_served(x: Tensor) -> bool:
    # What is exported runs elsewhere, too.
    plain = x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    return plain and not torch.compiler.is_exporting()


def _switches(quantizer: Any) -> tuple[bool, bool]:
    return quantizer.training and quantizer.observer_enabled, quantizer.fake_quant_enabled


def _remembered(quantizer: Any, grid: Grid) -> tuple[tuple[Tensor | None, ...], float | None]:
    """What is known of a range and its grid, and the weight of the newest range; None where nothing observes."""
    observer, found = quantizer.observer, (quantizer.scale, quantizer.zero_point)
    if not (quantizer.training and quantizer.observer_enabled):
        return (None, None, *found), None
    return (observer.min_val, observer.max_val, *found), observer.averaging_constant if grid.averages else -1.0


def _served(layer: QatLayer, x: Tensor, rule: Rule) -> Tensor:
    bn: Any = layer.bn
    quantizer: Any = layer.pre_activation_quantizer if rule.before else layer.output_quantizer
    weight, bias, input_scale = layer.linear_weight, layer.linear_bias, layer.input_scale()
    grid = rule.grid
    state, of_newest = _remembered(quantizer, grid)
    out = operators.layer(
        *(x, weight, bias, bn.weight, bn.bias, input_scale),
        *(bn.running_mean, bn.running_var, bn.num_batches_tracked, *state),
        *rule.linear,
        rule.weight_grid,
        *rule.bias,
        *(bn.momentum, bn.eps, rule.low, rule.high, grid.bits, grid.signed, grid.symmetric, of_newest),
        None,  # the order of memory: a compiler's to say
    )
    quantizer.seen_data = True
    return layer.activated(out) if rule.before else out

"""The parameters of a layer by C++ or by generated code; where something about them learns, by C++ alone.

The definition is `qbench.nn.qat.parameters`; what is here has its bits, which is tried on a sample first.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qbench.fake_quantize import BiasQuantizer, FakeQuantize
from qbench.fake_quantize.base import is_hooked
from qbench.fake_quantize.bias import CLEAR_BIAS_SCALE, BiasSpec
from qbench.fake_quantize.learned import LearnedFakeQuantize, positive
from qbench.nn.qat.parameters import Folding, bias_error, rounding_code, training_parameters
from qbench.numerics.bias import WIDEST_STORED_BITS
from qbench.numerics.blocks import at_hand, channels_are_last, from_memory_order, in_memory_order, in_rows
from qbench.numerics.channels import ChannelParameters
from qbench.numerics.fold import BatchNormTensors, WeightLayout
from qbench.numerics.generated import DEVICES, Generated, Tensors, generated, same_bits, standing_for
from qbench.numerics.layer_step import NOTHING_LEARNED, Learned, TrainingParameters
from qbench.numerics.native import steps as native
from qbench.numerics.native.library import library, trusted
from qbench.numerics.qparams import SMALLEST_SCALE, LearnedScale, QParams, QSpec
from qbench.numerics.straight_through import round_to_grid, straight_through
from qbench.numerics.weights import LARGEST_STEP
from qbench.observers import LatestMinMaxObserver


def parameter_code(folding: Folding, weight: Tensor, eps: float | None) -> Generated | None:
    """Generated code for the parameters; None where there is none for it: quantizers that clip, scales that learn.

    Args:
        folding: How.
        weight: `W`.
        eps: The BatchNorm's, for `generated_parameters`; None without a BatchNorm, for `fast_weight_and_bias`.
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


def native_parameters(folding: Folding, weight: Tensor, eps: float | None) -> native.Parameters | None:
    """The parameters by C++; None where there is nothing for them. Arguments as of `parameter_code`."""
    quantizer, bias = folding.weight_quantizer, folding.bias_quantizer
    learned = isinstance(quantizer, LearnedFakeQuantize)
    if not (folding.learned if learned else folding.straight) or not _is_common(folding, weight):
        return None
    if learned:
        return _learned_parameters(quantizer.spec, None if bias is None else bias.spec, eps)
    return _native_parameters(_rule_of(folding), eps) if type(quantizer.observer) is LatestMinMaxObserver else None


def channel_parameters(folding: Folding, weight: Tensor, eps: float) -> ChannelParameters | None:
    """The parameters by NumPy, for the plain path; None where there is nothing for them. See `parameter_code`."""
    if not _is_common(folding, weight) or type(folding.weight_quantizer.observer) is not LatestMinMaxObserver:
        return None
    return _channel_parameters(_rule_of(folding), eps) if folding.straight else None


def _is_common(folding: Folding, weight: Tensor) -> bool:
    """Whether a layer is of the kind that there is C++ for, but for its weight's quantizer."""
    quantizer, bias = folding.weight_quantizer, folding.bias_quantizer
    if folding.layout.transposed or not at_hand(weight) or is_hooked(quantizer, quantizer.observer):
        return False
    return bias is None or (bias.spec.scale == "input_weight" and bias.spec.bits <= WIDEST_STORED_BITS)


@functools.lru_cache(maxsize=256)
def _channel_parameters(folding: Folding, eps: float) -> ChannelParameters | None:
    """With the bits of PyTorch's operators, on a sample without the channels that are left to these."""
    bias, spec = folding.bias_quantizer, folding.weight_quantizer.spec
    found = ChannelParameters(spec.qmax, 0.0 if bias is None else bias.spec.clear_limit, CLEAR_BIAS_SCALE, eps)
    rare = _WITHOUT_WEIGHTS, _WITHOUT_FACTOR, _WITH_HUGE_BIAS
    common = [channel for channel in range(_CHANNELS) if channel not in rare]
    given: Any = [one[common] if one is not None and one.ndim else one for one in _sample(folding, eps, "cpu")]
    constants: Any = folding, eps, "cpu"
    with torch.no_grad():
        ours, wanted = found(*given), _training_parameters(*given, *constants)
    return found if ours is not None and all(map(same_bits, ours, wanted)) else None


def _in_cpp(spec: QSpec, bias: BiasSpec | None, eps: float | None) -> native.Parameters | None:
    functions = library()
    if functions is None:
        return None
    rule = (0, 0) if bias is None else (bias.bits, bias.code_limit)
    return native.Parameters(spec.qmin, spec.qmax, *rule, eps, functions)


@functools.lru_cache(maxsize=256)
def _learned_parameters(spec: QSpec, bias: BiasSpec | None, eps: float | None) -> native.Parameters | None:
    """For a weight whose steps are learned, with the bits of PyTorch's operators, gradients too."""
    found = _in_cpp(spec, bias, eps)
    if found is None:
        return None
    with torch.enable_grad():
        pairs = (pair for apart in (False, True) for pair in _learned_by_both(found, spec, bias, eps, apart))
        return trusted(found, all(same_bits(*pair) for pair in pairs))


def _learned_by_both(
    functions: native.Parameters, spec: QSpec, bias: BiasSpec | None, eps: float | None, apart: bool
) -> Iterator[tuple[Tensor | None, Tensor | None]]:
    """What C++ and PyTorch's operators make of a sample, forward and backward, of scales as they are or kept apart."""
    weight, channels, input_scale = _sample_of(eps)
    step = (0.7 * weight.abs().amax(1) / spec.qmax).clamp(min=SMALLEST_SCALE)
    # Of those that are kept apart, some lie beyond 0.
    turned = torch.where(torch.arange(len(step)) % 3 == 0, -step, step)
    learned_step, given_step = _learned_scale(turned if apart else step, apart)
    learned_input, given_input = (None, None) if bias is None else _learned_scale(input_scale, apart)
    quantizer = _Given(spec, LatestMinMaxObserver(spec))
    quantizer.fit_to(weight)
    quantizer.given = given_step
    folding = Folding(WeightLayout(), quantizer, None if bias is None else BiasQuantizer(bias))
    weight.requires_grad_()
    sources = [weight, *(one.learned for one in (learned_step, learned_input) if one is not None)]
    wanted = _by_operators(weight, channels, given_input, folding, eps)
    with torch.no_grad():
        found = functions(weight, *channels, learned_input, None, learned_step, keeps=True)
    assert found is not None and found.kept is not None
    yield from zip(found, wanted, strict=False)
    # One value of a channel, one channel of the bias at a time: sums of one term are the same in any order.
    count, columns = weight.shape
    value, _, rounded, *_ = wanted
    for place in range(count):
        grad, grad_bias = torch.zeros_like(weight), torch.zeros(count)
        grad[range(count), [(place + row) % columns for row in range(count)]] = torch.linspace(-1, 1, count)
        grad_bias[place] = 0.3
        ends = [one for one in (value, rounded) if one is not None]
        by_operators = torch.autograd.grad(ends, sources, [grad, grad_bias][: len(ends)], retain_graph=True)
        with torch.no_grad():
            to_bias = None if rounded is None else grad_bias
            ours = functions.backward(grad.clone(), weight, found.step, to_bias, found.kept, True)
        # A gradient that is cut off may keep its sign in a zero, or not.
        pairs = zip(ours, by_operators, strict=False)
        yield from ((one + 0.0, other + 0.0) for one, other in pairs if one is not None)


def _learned_scale(value: Tensor, apart: bool) -> tuple[LearnedScale, Tensor]:
    """A scale for C++, and the same for PyTorch's operators, with its gradient."""
    if not apart:
        scale = value.requires_grad_()
        return LearnedScale(scale), scale
    start, factor = 0.5 * value.abs(), 0.375
    change = (value - start).requires_grad_()
    return LearnedScale(change, start, factor), positive(start + change, torch.full_like(value, factor))


class _Given(LearnedFakeQuantize):
    """Steps that are given with their gradient."""

    given: Tensor

    def snapshot(self) -> QParams:
        return self._grid(self.given, self.zero_point)

    def qparams_of(self, x: Tensor) -> QParams:
        return self.snapshot()


@functools.lru_cache(maxsize=256)
def _native_parameters(folding: Folding, eps: float | None) -> native.Parameters | None:
    bias = folding.bias_quantizer
    found = _in_cpp(folding.weight_quantizer.spec, None if bias is None else bias.spec, eps)
    if found is None:
        return None
    with torch.no_grad():
        ours, wanted = _by_both(found, folding, eps)
    return trusted(found, ours is not None and all(map(same_bits, ours, wanted)))


def _by_both(functions: native.Parameters, folding: Folding, eps: float | None) -> tuple[native.Found | None, Tensors]:
    """What C++ and PyTorch's operators make of a sample."""
    weight, channels, input_scale = _sample_of(eps)
    return functions(weight, *channels, input_scale), _by_operators(weight, channels, input_scale, folding, eps)


#: b, γ, β, μ_r and σ²_r.
_Channels = tuple[Any, Any, Any, Any, Any]


def _sample_of(eps: float | None) -> tuple[Tensor, _Channels, Tensor]:
    """`W`; b, γ, β, μ_r and σ²_r; `s_in`. Without a BatchNorm, b alone."""
    if eps is None:
        weight, bias, input_scale = _sample_without_bn(None, "cpu")
        channels: _Channels = bias, None, None, None, None
    else:
        weight, bias, gamma, beta, mean, var, input_scale = _sample(None, eps, "cpu")
        channels = bias, gamma, beta, mean, var
    assert weight is not None and input_scale is not None
    return weight, channels, input_scale


def _by_operators(
    weight: Tensor, channels: _Channels, input_scale: Tensor | None, folding: Folding, eps: float | None
) -> Tensors:
    """What PyTorch's operators make of it."""
    if eps is None:
        return _weight_and_bias(weight, channels[0], input_scale, folding, "cpu")
    return _training_parameters(weight, *channels, input_scale, folding, eps, "cpu")


def generated_parameters(
    folding: Folding,
    weight: Tensor,
    bias: Tensor | None,
    bn: BatchNormTensors,
    input_scale: Tensor | None,
    code: Generated,
) -> TrainingParameters:
    """`training_parameters` by generated code, of `parameter_code`; other arguments as of `fast_parameters`."""
    last = bool(channels_are_last(weight))
    given = in_memory_order(weight, last).flatten(1), bias, bn.gamma, bn.beta, bn.mean, bn.var, input_scale
    value, step, error, silenced = code(*given)
    assert value is not None and step is not None
    value = from_memory_order(value, weight, last)
    return TrainingParameters(straight_through(weight, value), _grid_of(step, folding), error, silenced)


def fast_parameters(
    folding: Folding, weight: Tensor, bias: Tensor | None, bn: BatchNormTensors, input_scale: Tensor | None
) -> TrainingParameters | None:
    """`training_parameters` by C++ or generated code, with the gradient to `W`; None where there is none for it.

    Args:
        folding: How.
        weight: `W`, float32.
        bias: `b`, (out,), or None.
        bn: The BatchNorm's tensors.
        input_scale: `s_in`, (), without a gradient, or None.
    """
    functions = native_parameters(folding, weight, bn.eps)
    found = functions and functions(weight, bias, bn.gamma, bn.beta, bn.mean, bn.var, input_scale)
    if found:
        value, step, error, silenced, _ = found
        return TrainingParameters(straight_through(weight, value), _grid_of(step, folding), error, silenced)
    code = parameter_code(folding, weight, bn.eps)
    return None if code is None else generated_parameters(folding, weight, bias, bn, input_scale, code)


def fast_weight_and_bias(
    folding: Folding, weight: Tensor, bias: Tensor | None, source: FakeQuantize
) -> tuple[Tensor, Tensor | None, QParams] | None:
    """`Ŵ`, `b̂` (None where it is float) and the grid of `Ŵ` of a layer without BatchNorm, by C++ or generated code.

    None where there is none for it; where the weight's steps are learned, or the input's scale, there is C++ alone.

    Args:
        folding: How.
        weight: `W`, float32.
        bias: `b`, (out,), or None.
        source: The quantizer of the input, which is on a grid.
    """
    if isinstance(source, LearnedFakeQuantize) or isinstance(folding.weight_quantizer, LearnedFakeQuantize):
        return _learned_weight_and_bias(folding, weight, bias, source)
    input_scale = source.scale_in_use()
    if input_scale.requires_grad:
        return None
    functions = native_parameters(folding, weight, None)
    found = functions and functions(weight, bias, None, None, None, None, input_scale)
    if found:
        value, step, rounded, *_ = found
    else:
        code = parameter_code(folding, weight, None)
        if code is None:
            return None
        last = bool(channels_are_last(weight))
        unfolded, found_step, rounded = code(in_memory_order(weight, last).flatten(1), bias, input_scale)
        assert unfolded is not None and found_step is not None
        value, step = from_memory_order(unfolded, weight, last), found_step
    rounded = rounded if rounded is None or bias is None else straight_through(bias, rounded)
    return straight_through(weight, value), rounded, _grid_of(step, folding)


def _learned_weight_and_bias(
    folding: Folding, weight: Tensor, bias: Tensor | None, source: FakeQuantize
) -> tuple[Tensor, Tensor | None, QParams] | None:
    functions, quantizer = native_parameters(folding, weight, None), folding.weight_quantizer
    if functions is None or not functions.serves(weight, bias):
        return None
    scale = source.learned_scale() if isinstance(source, LearnedFakeQuantize) else source.scale.float()
    steps = quantizer.learned_scale_of(weight) if isinstance(quantizer, LearnedFakeQuantize) else None
    of_input = scale.learned if isinstance(scale, LearnedScale) else None
    of_steps = None if steps is None else steps.learned
    value, rounded, step = _LearnedWeightAndBias.apply(weight, bias, of_steps, of_input, steps, scale, functions)
    return value, rounded, _grid_of(step, folding)


class _LearnedWeightAndBias(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        bias: Tensor | None,
        learned_of_steps: Tensor | None,
        learned_of_input: Tensor | None,
        steps: LearnedScale | None,
        input_scale: Tensor | LearnedScale,
        functions: native.Parameters,
    ) -> tuple[Tensor | None, ...]:
        found = functions(weight, bias, None, None, None, None, input_scale, None, steps, keeps=True)
        assert found is not None  # `serves` says so before
        ctx.functions = functions
        ctx.save_for_backward(weight, found.step, found.kept)
        ctx.mark_non_differentiable(found.step)
        return found.value, found.error, found.step

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, step, kept = ctx.saved_tensors
        grad, grad_bias, _ = grads
        _, of_bias, of_steps, of_input = ctx.needs_input_grad[:4]
        to_scales = grad_bias if of_steps or of_input else None
        into = torch.empty_like(weight) if of_steps else None
        grad_weight, grad_step, grad_input = ctx.functions.backward(grad, weight, step, to_scales, kept, of_steps, into)
        of_scales = grad_step, grad_input if of_input else None
        return grad_weight, grad_bias if of_bias else None, *of_scales, None, None, None


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
        functions: Of `native_parameters`, or None.
        code: Of `parameter_code`, or None.
        by_channels: Of `channel_parameters`, or None.
    """

    folding: Folding
    bn: Any
    source: FakeQuantize | None
    functions: native.Parameters | None
    code: Generated | None
    by_channels: ChannelParameters | None

    @classmethod
    def of(cls, folding: Folding, bn: Any, source: FakeQuantize | None, weight: Tensor) -> StraightParameters | None:
        """Those of a layer; None where its parameters are not of this kind."""
        if not folding.straight or (source is not None and source.learned):
            return None
        functions = native_parameters(folding, weight, bn.eps) if folding.fast_path else None
        code = parameter_code(folding, weight, bn.eps) if folding.fast_path and functions is None else None
        by_channels = None if functions or code else channel_parameters(folding, weight, bn.eps)
        return cls(folding, bn, source, functions, code, by_channels)

    def __call__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        gamma: Tensor | None,
        beta: Tensor | None,
        room: Tensor | None = None,
        learned: Learned = NOTHING_LEARNED,
    ) -> TrainingParameters:
        """See `qbench.numerics.layer_step.Parameters`."""
        bn = BatchNormTensors(gamma, beta, self.bn.running_mean, self.bn.running_var, self.bn.eps)
        input_scale = None if self.source is None else self.source.scale.float()
        if self.functions is not None:
            found = self.functions(weight, bias, gamma, beta, bn.mean, bn.var, input_scale, room)
            if found is not None:
                grid = None if room is None else _grid_of(found.step, self.folding)
                return TrainingParameters(found.value, grid, found.error, found.silenced)
        if self.code is not None:
            return generated_parameters(self.folding, weight, bias, bn, input_scale, self.code)
        if self.by_channels is not None:
            common = self.by_channels(weight, bias, gamma, beta, bn.mean, bn.var, input_scale, room)
            if common is not None:
                return TrainingParameters(common.value, _grid_of(common.step, self.folding), common.error, None)
        return training_parameters(self.folding, weight, bias, bn, input_scale, room)

    def again(self, weight: Tensor, qparams: QParams, room: Tensor | None = None) -> Tensor:
        """See `qbench.numerics.layer_step.Parameters`."""
        value = torch.empty_like(weight) if room is None else room
        if self.functions is not None and self.functions.again(weight, qparams.scale, value):
            return value
        code = None if self.code is None else rounding_code(weight, qparams, self.folding.weight_quantizer)
        if code is None:
            clips = bool(qparams.scale.max() >= LARGEST_STEP)
            least, most = (qparams.qmin, qparams.qmax) if clips else (None, None)
            return round_to_grid(weight, qparams.spread(qparams.scale, weight), least, most, value)
        code.forward(in_rows(value), in_rows(weight), qparams.scale[:, None], qparams.zero_point[:, None])
        return value

    @property
    def turns(self) -> bool:
        """See `qbench.numerics.layer_step.Parameters`."""
        return self.functions is not None

    def in_order_of(self, weight: Tensor, grad: Tensor) -> Tensor:
        """See `qbench.numerics.layer_step.Parameters`."""
        return grad if self.functions is None else self.functions.in_order_of(weight, grad)

    def backward(self, grad: Tensor, *_: Any) -> tuple[Tensor, None, None]:
        """See `qbench.numerics.layer_step.Parameters`: what reaches `Ŵ/k` is for W alone."""
        return grad, None, None


@dataclasses.dataclass(frozen=True)
class LearnedParameters:
    """The parameters of a layer whose weight's steps are learned, or the scale of its input, by C++.

    Attributes:
        folding: How.
        bn: The BatchNorm.
        source: The quantizer of the input where it is on a grid; else None.
        functions: In C++.
    """

    folding: Folding
    bn: Any
    source: FakeQuantize | None
    functions: native.Parameters

    @classmethod
    def of(cls, folding: Folding, bn: Any, source: FakeQuantize | None, weight: Tensor) -> LearnedParameters | None:
        """Those of a layer; None where C++ does not serve it."""
        functions = native_parameters(folding, weight, bn.eps) if folding.fast_path else None
        return None if functions is None else cls(folding, bn, source, functions)

    def serves(self, weight: Tensor, bias: Tensor | None) -> bool:
        """Whether tensors are as C++ expects them: nothing else serves here."""
        bn = self.bn
        return self.functions.serves(weight, bias, bn.weight, bn.bias, bn.running_mean, bn.running_var)

    def __call__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        gamma: Tensor | None,
        beta: Tensor | None,
        room: Tensor | None = None,
        learned: Learned = NOTHING_LEARNED,
    ) -> TrainingParameters:
        """See `qbench.numerics.layer_step.Parameters`."""
        input_scale: Tensor | LearnedScale | None = learned.input_scale
        if input_scale is None and self.source is not None:
            input_scale = self.source.scale.float()
        tensors = bias, gamma, beta, self.bn.running_mean, self.bn.running_var, input_scale
        found = self.functions(weight, *tensors, room, learned.step, keeps=True)
        assert found is not None  # `serves` says so before
        grid = None if room is None else _grid_of(found.step, self.folding)
        saved = found.step, found.kept, found.error
        return TrainingParameters(found.value, grid, found.error, found.silenced, saved)

    def again(self, weight: Tensor, qparams: QParams, room: Tensor | None = None) -> Tensor:
        """See `qbench.numerics.layer_step.Parameters`."""
        value = torch.empty_like(weight) if room is None else room
        self.functions.again(weight, qparams.scale, value)
        return value

    @property
    def turns(self) -> bool:
        """See `qbench.numerics.layer_step.Parameters`."""
        return True

    def in_order_of(self, weight: Tensor, grad: Tensor) -> Tensor:
        """See `qbench.numerics.layer_step.Parameters`."""
        return self.functions.in_order_of(weight, grad)

    def backward(
        self, grad: Tensor, grad_error: Tensor | None, weight: Tensor, saved: tuple[Tensor | None, ...], learns: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """See `qbench.numerics.layer_step.Parameters`."""
        step, kept, error = saved
        assert step is not None and kept is not None
        to_error = None if error is None else grad_error
        grad_weight, grad_step, grad_input = self.functions.backward(grad, weight, step, to_error, kept, learns)
        return grad_weight, grad_input, grad_step


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


def _sample_without_bn(folding: Folding | None, device: str) -> list[Tensor | None]:
    """Arguments of `_weight_and_bias` with channels of every kind."""
    weight, _, _, bias, *_, input_scale = _sample(folding, 0.0, device)
    return [weight, bias, input_scale]


_CHANNELS, _WITHOUT_WEIGHTS, _WITHOUT_FACTOR, _WITH_HUGE_BIAS = 24, 3, 5, 7


def _sample(folding: Folding | None, eps: float, device: str) -> list[Tensor | None]:
    """Arguments of `_training_parameters` with channels of every kind: usual ones, γ = 0, no weights, a huge bias."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(_CHANNELS, 45, generator=generator)
    weight[_WITHOUT_WEIGHTS] = 0.0
    gamma, beta, mean = torch.randn(3, _CHANNELS, generator=generator)
    gamma[_WITHOUT_FACTOR], beta[_WITH_HUGE_BIAS] = 0.0, 1e6
    var = torch.rand(_CHANNELS, generator=generator) + 0.1
    found = [weight, gamma, beta, mean, var, torch.tensor(0.02)]
    weight, *others = (value.to(device) for value in found)
    return [weight, None, *others]


def _rule_of(folding: Folding) -> Folding:
    observer, quantizer = folding.weight_quantizer.observer, folding.bias_quantizer
    key = folding.weight_quantizer.spec, type(observer), observer.settings(), quantizer and quantizer.spec
    return standing_for(folding, Folding, *key)

"""The one body of every QAT layer with a weight: what differs between them is class data.

    eval, frozen BN   y = F.conv*(x̂, Ŵ, b̂)
    train             y = BN_batch(F.conv*(x̂, Ŵ/k) + b) + e,     e = b̂ − b_f, which BN adds as part of its shift
    weight-only       y = F.conv*(x, Ŵ, b_f)                      in training BN_batch(F.conv*(x, Ŵ/k) + b)

in one call where BN is folded: a separate add gives other bits. See docs/equations.md.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qbench.errors import FusionError, NumericsError
from qbench.fake_quantize import BiasQuantizer, FakeQuantize
from qbench.nn.frozen import is_batch_norm
from qbench.nn.intrinsic.fused import Fused, as_types
from qbench.nn.qat.batch_norm import TrainingBatchNorm
from qbench.nn.qat.body import QatModule, adopt_state
from qbench.nn.qat.codes import ParameterCodes, check_finite
from qbench.nn.qat.compiled_step import Rule, compiled_step, rule_of
from qbench.nn.qat.epilogue import bounds_of, epilogue
from qbench.nn.qat.fast_parameters import fast_parameters, fast_weight_and_bias
from qbench.nn.qat.parameters import Folding, training_parameters
from qbench.nn.qat.step import image_step, training_step
from qbench.numerics.blocks import at_hand
from qbench.numerics.fold import BatchNormTensors, WeightLayout
from qbench.numerics.layer_step import Convolution, TrainingParameters
from qbench.numerics.qparams import QParams, in_groups
from qbench.numerics.saved_codes import SavingCodes, say_once
from qbench.numerics.weights import WeightGrid
from qbench.qconfig import QConfig

Self = TypeVar("Self", bound="QatLayer")


class QatLayer(QatModule):
    """QAT form of a layer with a weight, and of the wrappers around it.

    Attributes:
        bn_type: BatchNorm of the chain, or None.
        activation: Activation of the chain, or None.
        bn: The BatchNorm, or None.
        bn_frozen: Whether training normalises with the running statistics.
        channel_axis: Axis of the output that holds its channels, from the end.
    """

    linear_type: ClassVar[type[nn.Module]]
    activation: ClassVar[type[nn.Module] | None] = None
    channel_axis: ClassVar[int]

    weight: Tensor
    bias: Tensor | None
    bn: nn.Module | None
    activation_module: nn.Module | None
    weight_quantizer: FakeQuantize
    bias_quantizer: BiasQuantizer | None
    pre_activation_quantizer: FakeQuantize | None

    def __init__(self, *args: Any, qconfig: QConfig, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        bn_type = self.bn_type()
        out_channels = self.layout().out_channels(self.linear_weight)
        self._complete(
            bn_type(out_channels) if bn_type else None, self.activation() if self.activation else None, qconfig
        )

    @classmethod
    def accepts(cls, module: nn.Module, qconfig: QConfig) -> str:
        """See `QatModule.accepts`: a layer has a weight, whatever the qconfig, but not every target computes it."""
        if qconfig.deployment.computes(cls.linear_type):
            return ""
        return f"target {qconfig.target} computes no {cls.linear_type.__name__} on codes"

    @classmethod
    def bn_type(cls) -> type[nn.Module] | None:
        """The BatchNorm of the chain."""
        parts = getattr(cls.float_type, "part_types", (cls.float_type,))
        types = (kind for part in parts for kind in as_types(part))
        return next((kind for kind in types if is_batch_norm(kind)), None)

    def _adopt(self, module: nn.Module, qconfig: QConfig) -> None:
        parts = tuple(module) if isinstance(module, Fused) else (module,)
        if isinstance(module, Fused):
            module.check_parts(parts)
        if not isinstance(parts[0], self.linear_type):
            raise FusionError(
                f"{type(self).__name__}: its float type {self.float_type.__name__} starts with "
                f"{type(parts[0]).__name__}, but it computes a {self.linear_type.__name__}"
            )
        adopt_state(self, parts[0])
        rest = list(parts[1:])
        bn = rest.pop(0) if rest and is_batch_norm(type(rest[0])) else None
        if len(rest) > 1:
            raise FusionError(
                f"{type(self).__name__}: {self.float_type.__name__} ends in "
                f"{', '.join(type(part).__name__ for part in rest)}; a chain is a layer, then at most a BatchNorm, "
                "then at most an activation"
            )
        self._complete(bn, rest[0] if rest else None, qconfig)

    def _complete(self, bn: nn.Module | None, activation: nn.Module | None, qconfig: QConfig) -> None:
        self.bn = bn
        self.activation_module = activation
        self._add_quantizers(qconfig)
        self.bn_frozen = False
        self.weight_quantizer = qconfig.make_weight(axis=self.layout().axis, weight=self.linear_weight)
        if self.weight_quantizer.spec.group_size is not None:
            in_groups(self.linear_weight, self.weight_quantizer.spec.group_size)  # raises where they do not fit
        self.bias_quantizer = None if qconfig.weight_only else qconfig.make_bias()
        whole = qconfig.weight_only or qconfig.deployment.fuses(activation)
        self.pre_activation_quantizer = None if whole else qconfig.make_activation()
        self.to(self.linear_weight.device)

    def to_float(self) -> nn.Module:
        """The float module (a wrapper where this is a wrapper's QAT form) with the trained parameters."""
        linear = self.linear_type.__new__(self.linear_type)
        nn.Module.__init__(linear)
        adopt_state(linear, self)
        linear.train(self.training)
        parts = [part for part in (self.bn, self.activation_module) if part is not None]
        return self.float_type(linear, *parts) if issubclass(self.float_type, Fused) else linear

    @property
    def output_op(self) -> str:
        """See `QatModule.output_op`: the activation, or the linear part."""
        return (self.linear_type if self.activation_module is None else type(self.activation_module)).__name__

    # What a kind of layer says of itself.

    @property
    def linear_weight(self) -> Tensor:
        """`W`: the weight of the linear part."""
        return self.weight

    @property
    def linear_bias(self) -> Tensor | None:
        """`b`: the bias of the linear part."""
        return self.bias

    @property
    def batch_norm(self) -> Any:
        """What holds γ, β, the running statistics and ε; None without a BatchNorm."""
        return self.bn

    @property
    def learns_statistics(self) -> bool:
        """Whether training moves running statistics: a frozen BatchNorm has fixed ones."""
        return isinstance(self.bn, _BatchNorm)

    @property
    def batch_norm_type(self) -> type[Any]:
        """The type whose forward normalises with the batch's statistics."""
        return type(self.bn)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The linear part, one call."""
        raise NotImplementedError

    def layout(self) -> WeightLayout:
        """Where the weight keeps its output channels."""
        return WeightLayout()

    # Forward.

    def forward(self, input: Tensor, *args: Any) -> Tensor:
        """Input on its grid -> output on its grid."""
        compiling = torch.compiler.is_compiling()
        if self.training and not args and not compiling and self.input_quantizers._modules:
            found = image_step(self, input)
            if found is not None:
                return found
        (x,) = self.quantized_inputs((input,))
        if self.training and not args:
            found = compiled_step(self, x) if compiling else training_step(self, x)
            if found is not None:
                return found
        if self.uses_batch_statistics():
            return self._train_forward(x, *args)
        return self._epilogue(self.folded_output(x, *args))

    def serving_rule(self, *switches: Any) -> Rule | None:
        """What C++ needs to know of this layer to serve it in a model that is compiled; None where it does not.

        A question that is answered while a model is traced, by the layer itself, not by its trace.

        Args:
            switches: What else the answer hangs on: compiled code is guarded by them.
        """
        return rule_of(self)

    # What `torch.compiler.assume_constant_result` does; that would import the compiler here.
    serving_rule._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def folded_output(self, x: Tensor, *args: Any) -> Tensor:
        """`F.conv*(x̂, Ŵ, b̂)`: the linear part with the BatchNorm folded, before the activation; one call."""
        weight, bias, qparams = self._folded_parameters()
        dtype = self.linear_weight.dtype
        with self._saving(x, weight, qparams):
            return self.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype), *args)

    def _folded_parameters(self) -> tuple[Tensor, Tensor | None, QParams]:
        """`Ŵ`, `b̂` and the grid of `Ŵ`."""
        source = self.active_source()
        plain = self.batch_norm is None and self.bias_quantizer is not None
        if plain and source is not None and self.fast_path and self.training:
            found = fast_weight_and_bias(self.folding(), self.linear_weight, self.linear_bias, source)
            if found is not None:
                return found
        grid, folded, scale = self.quantized_parameters()
        weight = grid.folded() if self.weight_quantizer.fake_quant_enabled else grid.folded_float()
        return weight, self._deployed_bias(folded, scale), grid.qparams

    def _saving(self, x: Tensor, weight: Tensor, qparams: QParams | None) -> contextlib.AbstractContextManager[Any]:
        """What the linear part saves for backward: its input and weight as codes where `low_memory` asks for it."""
        if not (self.low_memory and torch.is_grad_enabled()) or torch.compiler.is_compiling():
            return contextlib.nullcontext()
        if not at_hand(x):
            say_once(f"low memory: {x.dtype} on {x.device.type} is saved as it is; it works for float32 on a CPU")
            return contextlib.nullcontext()
        source = self.active_source()
        grid = None if source is None else source.snapshot()
        weights = weight, qparams if self.weight_quantizer.fake_quant_enabled else None
        return SavingCodes((x, grid), weights, fast_path=self.fast_path and self.training)

    def _deployed_bias(self, folded: Tensor, scale: Tensor | None) -> Tensor | None:
        """`b̂`, or `b_f` without a scale for it; None where activations stay float and the layer has no bias."""
        if self.bias_quantizer is not None:
            return folded if scale is None else self.bias_quantizer(folded, scale)
        return None if self.linear_bias is None and self.batch_norm is None else folded

    def _train_forward(self, x: Tensor, *args: Any) -> Tensor:
        # The running statistics as they stand before this batch's update: `bn` moves them below.
        found = self._training_parameters()
        with self._saving(x, found.weight, found.qparams):
            y = self.linear(x, found.weight, self.linear_bias, *args)
        bn = TrainingBatchNorm(self.batch_norm, self.batch_norm_type, found.error, found.silenced, self.channel_axis)
        return self._epilogue(y, bn)

    def _training_parameters(self) -> TrainingParameters:
        folding, bn, input_scale = self.folding(), self._bn_tensors(), self.input_scale()
        if self.fast_path and bn is not None and not (input_scale is not None and input_scale.requires_grad):
            found = fast_parameters(folding, self.linear_weight, self.linear_bias, bn, input_scale)
            if found is not None:
                return found
        # The bias error hands no gradient to BatchNorm and bias.
        bias = None if self.linear_bias is None else self.linear_bias.detach()
        return training_parameters(folding, self.linear_weight, bias, bn and _detached(bn), input_scale)

    def _epilogue(self, y: Tensor, bn: TrainingBatchNorm | None = None) -> Tensor:
        fused = self._fused_epilogue(y, bn)
        if fused is not None:
            return fused
        steps = self.pre_activation_quantizer, self.activation_module, self.output_quantizer
        return epilogue(y, bn, *steps)

    def _fused_epilogue(self, y: Tensor, bn: TrainingBatchNorm | None) -> Tensor | None:
        """The same values from one function, where there is one for these steps; else None."""
        if self.pre_activation_quantizer is None:
            return self.one_function(y, bn, bounds_of(self.activation_module), self.output_quantizer)
        before = self.one_function(y, bn, bounds_of(None), self.pre_activation_quantizer)
        return None if before is None else self.activated(before)

    def activated(self, before: Tensor, clip: Callable[[Tensor], Tensor | None] | None = None) -> Tensor:
        """The activation and the output's quantizer, behind a quantizer of their own.

        Args:
            before: On the grid of the pre-activation quantizer.
            clip: Quantizes what nothing else needs, where it lies; None where there is nothing that does.
        """
        y = epilogue(before, self.activation_module)
        found = None if clip is None else clip(y)
        return epilogue(y, self.output_quantizer) if found is None else found

    def uses_batch_statistics(self) -> bool:
        """Whether BatchNorm normalises with the batch's statistics."""
        return self.training and self.learns_statistics and not self.bn_frozen

    # Parameters.

    def quantized_parameters(self) -> tuple[WeightGrid, Tensor, Tensor | None]:
        """Grid of the folded weight, folded bias `b_f` (out,), and the bias scale.

        The scale is None where there is none: the input or the weight is in float.
        """
        given = self.linear_weight, self.linear_bias, self._bn_tensors(), self.input_scale()
        return self.folding().parameters(*given)

    def folding(self) -> Folding:
        """How it folds and quantizes its parameters."""
        return Folding(self.layout(), self.weight_quantizer, self.bias_quantizer, self.fast_path and self.training)

    def convolution(self) -> Convolution | None:
        """The linear part as a convolution with its gradients; None where it is none."""
        return None

    def active_source(self) -> FakeQuantize | None:
        """The quantizer of the input where that lies on a grid; else None."""
        source = self._sources[0] if self._sources else None
        return source if source is not None and source.active else None

    def input_scale(self) -> Tensor | None:
        """`s_in`, (), where the layer computes on codes; else None."""
        source = self.active_source()
        return None if source is None or not self.weight_quantizer.fake_quant_enabled else source.scale_in_use()

    def _bn_tensors(self) -> BatchNormTensors | None:
        bn = self.batch_norm
        if bn is None:
            return None
        return BatchNormTensors(bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.eps)

    @torch.no_grad()
    def parameter_codes(self) -> ParameterCodes:
        """The integers that this layer deploys.

        Raises:
            LinkError: the quantizer of the input is not known.
            NumericsError: a parameter or a scale is NaN or infinite, no data was seen, or the bias does not fit.
        """
        label = (self.label or self.weight_quantizer.label).rpartition(".")[0] or type(self).__name__
        check_finite(self, label)
        input_scale = None if self.bias_quantizer is None else self.input_qparams().scale
        grid, bias, scale = self.quantized_parameters()
        if not self.weight_quantizer.fake_quant_enabled or (input_scale is not None and scale is None):
            raise NumericsError(
                f"{label}: fake-quant is disabled, so there are no codes; model.apply(qbench.enable_fake_quant) first"
            )
        if self.bias_quantizer is None or scale is None or input_scale is None:
            grid.qparams.check(f"{label}.weight")
            value = self._deployed_bias(bias, None)
            value = None if value is None else value.float()
            return ParameterCodes(grid.codes(), grid.qparams, None, None, value, None, grid.coarsened, grid.silenced)
        codes, saturated = self.bias_quantizer.codes(bias, scale)
        # Where float32 has no weight scale that is large enough for the bias, the floor is infinite.
        misfit = saturated | ~torch.isfinite(scale)
        if bool(misfit.any()):
            worst = int(misfit.nonzero()[0]) if misfit.ndim else 0
            raise NumericsError(
                f"{label}: the bias {bias[worst].item():.6g} of output channel {worst} does not fit "
                f"{self.qconfig.bias} (scale {scale.flatten()[worst if scale.ndim else 0].item():.3g}, input scale "
                f"{input_scale.item():.3g}); a wider bias fits, or one with a scale of its own: "
                "get_qconfig(bias_scale='own')"
            )
        grid.qparams.check(f"{label}.weight")
        value = self.bias_quantizer(bias, scale)
        return ParameterCodes(grid.codes(), grid.qparams, codes, scale, value, saturated, grid.coarsened, grid.silenced)

    # State.

    def train(self: Self, mode: bool = True) -> Self:
        """Set training mode; frozen BatchNorm statistics stay frozen."""
        super().train(mode)
        bn = getattr(self, "bn", None)  # absent while the torch layer's constructor runs
        if bn is not None and self.bn_frozen:
            bn.eval()
        return self

    def get_extra_state(self) -> Tensor:
        """The switch, as a uint8 tensor (1,): whether BatchNorm statistics are frozen."""
        return torch.tensor([self.bn_frozen], dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        """Restore the switch from a state dict."""
        self.bn_frozen = bool(state[0])
        self.train(self.training)

    def extra_repr(self) -> str:
        """The layer's own arguments, then what it is quantized to where that is not said by a quantizer."""
        parts = [super().extra_repr()]
        if self.bn_frozen:
            parts.append("bn_frozen=True")
        return ", ".join(part for part in parts if part)


def _detached(bn: BatchNormTensors) -> BatchNormTensors:
    return BatchNormTensors(
        None if bn.gamma is None else bn.gamma.detach(),
        None if bn.beta is None else bn.beta.detach(),
        bn.mean,
        bn.var,
        bn.eps,
    )

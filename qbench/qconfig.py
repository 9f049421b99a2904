"""What a model is quantized to: a frozen `QConfig`, held by `model.qconfig`.

With `activation=None` only weights are quantized: activations stay float, so there is no `s_in`, and the bias stays
float with them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from qbench import targets
from qbench.errors import ConfigError
from qbench.fake_quantize import BiasQuantizer, FakeQuantize, check_role, find_method, find_method_of
from qbench.fake_quantize.bias import BiasSpec
from qbench.numerics.qparams import QSpec
from qbench.observers import (
    FixedGridObserver,
    LatestMinMaxObserver,
    MovingAverageMinMaxObserver,
    Observer,
    find_observer,
)


@dataclasses.dataclass(frozen=True)
class QuantizerConfig:
    """How to make the quantizer of an activation or a weight.

    Attributes:
        spec: The grid that is wanted.
        observer: Class that finds the range.
        fake_quantize: Class of the quantizer.
        observer_options: Further keyword arguments of the observer.
        fake_quantize_options: Further keyword arguments of the quantizer.
    """

    spec: QSpec
    observer: type[Observer] = MovingAverageMinMaxObserver
    fake_quantize: type[FakeQuantize] = FakeQuantize
    observer_options: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    fake_quantize_options: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)

    def make(self, *, axis: int | None = None, weight: Tensor | None = None) -> FakeQuantize:
        """A new quantizer.

        Args:
            axis: Moves the channel axis of a per-channel spec.
            weight: What it will quantize: quantizers that learn a scale per channel take its shape.
        """
        spec = self.spec
        if axis is not None and spec.axis is not None and spec.axis != axis:
            spec = dataclasses.replace(spec, axis=axis)
        observer = self.observer(spec, **self.observer_options)
        quantizer = self.fake_quantize(spec, observer, **self.fake_quantize_options)
        if weight is not None:
            quantizer.fit_to(weight)
        return quantizer

    def __str__(self) -> str:
        return f"{self.spec} ({self.observer.__name__}, {self.fake_quantize.__name__})"


@dataclasses.dataclass(frozen=True)
class QConfig:
    """Target and specs of a model or of a part of it.

    Attributes:
        target: Name of a target, `qbench.targets.names()` lists them, or a `Target`.
        activation: Quantizer of activations; a `QSpec` stands for moving-average min–max on that grid, `"target"` for
            the target's own grid, None for weight-only quantization.
        weight: The same for weights, never None; a `QSpec` stands for min–max of the weight at hand.
        bias: Width and scale rule of the bias; `"target"` for the target's own; says nothing where activations stay
            float.
        input: Quantizer of inputs that arrive in float; None for that of activations.

    Raises:
        ConfigError: an unknown target, or a width, a bias rule or a weight-only form that the target does not have.
    """

    target: str | targets.Target = "onnxruntime"
    activation: QuantizerConfig | QSpec | str | None = "target"
    weight: QuantizerConfig | QSpec | str = "target"
    bias: BiasSpec = "target"  # type: ignore[assignment]  # filled below
    input: QuantizerConfig | QSpec | None = None

    def __post_init__(self) -> None:
        target = targets.get(self.target)
        fill = object.__setattr__  # the one place where a frozen config is written: while it is made
        if self.activation == "target" and target.activation is None:
            fill(self, "activation", None)
        if self.bias == "target":  # type: ignore[comparison-overlap]
            fill(self, "bias", target.bias if self.activation is not None else BiasSpec())
        if self.activation is not None:
            default = target.activation or QSpec()
            fill(self, "activation", _as_config(self.activation, default, MovingAverageMinMaxObserver))
        if self.input is not None:
            fill(self, "input", _as_config(self.input, QSpec(), MovingAverageMinMaxObserver))
        fill(self, "weight", _as_config(self.weight, target.weight, LatestMinMaxObserver))
        _check_roles(self)
        _check_target(self, target)

    @property
    def deployment(self) -> targets.Target:
        """The target itself."""
        return targets.get(self.target)

    @property
    def weight_only(self) -> bool:
        """Whether activations and biases stay float."""
        return self.activation is None

    @property
    def weight_spec(self) -> QSpec:
        """The grid that is wanted of weights."""
        return _made(self.weight).spec

    def make_activation(self) -> FakeQuantize:
        """A new activation quantizer.

        Raises:
            ConfigError: activations stay float.
        """
        return _made(self.activation).make()

    def fixed_output(self, op: str) -> tuple[float, int] | None:
        """Scale and zero point that the target demands of what an operation puts out, or None.

        Args:
            op: Name of its float class.
        """
        if self.weight_only:
            return None
        spec, own = _made(self.activation).spec, self.deployment.activation
        fixed = self.deployment.fixed_output(op, spec.bits)
        if fixed is None or own is None:
            return None
        return fixed.scale, fixed.zero_point - dataclasses.replace(own, bits=spec.bits).qmin + spec.qmin

    def make_output(self, op: str) -> FakeQuantize:
        """A new quantizer of what an operation puts out: on the grid that the target demands, where it demands one."""
        fixed = self.fixed_output(op)
        if fixed is None:
            return self.make_activation()
        spec = _made(self.activation).spec
        middle = 0 if spec.signed else (spec.qmax + 1) // 2
        # Whoever asks for symmetric grids where the target has others, too, still gets the one that it demands.
        spec = dataclasses.replace(spec, symmetric=spec.symmetric and fixed[1] == middle)
        return FakeQuantize(spec, FixedGridObserver(spec, *fixed))

    def make_input(self) -> FakeQuantize:
        """A new quantizer of an input that arrives in float.

        Raises:
            ConfigError: activations stay float.
        """
        return self.make_activation() if self.input is None else _made(self.input).make()

    def make_weight(self, *, axis: int, weight: Tensor | None = None) -> FakeQuantize:
        """A new quantizer for `weight`, whose channels lie along `axis`."""
        return _made(self.weight).make(axis=axis, weight=weight)

    def make_bias(self) -> BiasQuantizer:
        """A new bias quantizer."""
        return BiasQuantizer(self.bias)

    def __str__(self) -> str:
        if self.weight_only:
            return f"{self.target}: weight {self.weight}; activation and bias in float"
        return f"{self.target}: activation {self.activation}; weight {self.weight}; bias {self.bias}"


def get_qconfig(
    target: str | targets.Target = "onnxruntime",
    *,
    weight_bits: int | str = "target",
    activation_bits: int | str | None = "target",
    bias_bits: int | str = "target",
    bias_scale: str = "target",
    observer: str | type[Observer] | None = None,
    group_size: int | None = None,
    method: str | type[FakeQuantize] = "fixed",
    activation_method: str | type[FakeQuantize] | None = None,
    weight_method: str | type[FakeQuantize] | None = None,
    weight_observer: str | type[Observer] | None = None,
) -> QConfig:
    """The target's QConfig with other widths, other ranges, or quantizers that learn.

    Args:
        target: Name of a target; `"target"` below stands for its own choice.
        weight_bits: Width of weight codes.
        activation_bits: Width of activation codes; None leaves activations and biases in float.
        bias_bits: Width of bias codes.
        bias_scale: `"input_weight"`, `"own"` or `"own_pow2"`.
        observer: Finds the range of activations, or where a learned one starts: a name of
            `qbench.observers.OBSERVERS` or a class; None leaves it to the method.
        group_size: Neighbours along a weight's input features that share a scale; only with activation_bits=None.
        method: How to quantize, a name of `qbench.fake_quantize.METHODS` (docs/quantizers.md) or a class.
        activation_method: The same for activations alone.
        weight_method: The same for weights alone.
        weight_observer: As `observer`, for weights.

    Raises:
        ConfigError: the target does not have what is asked for; the message names what it has.
    """
    found = targets.get(target)
    activation = None
    if activation_bits is not None and not (activation_bits == "target" and found.activation is None):
        spec = _with_bits(found.activation or QSpec(), activation_bits)
        activation = _quantizer("activation", spec, method, activation_method, observer)
    elif activation_method is not None or observer is not None:
        raise ConfigError(
            f"activation_method={activation_method!r}, observer={observer!r}: activations stay in float; give "
            "activation_bits, activation_bits=8 for example"
        )
    spec = dataclasses.replace(_with_bits(found.weight, weight_bits), group_size=group_size)
    weight = _quantizer("weight", spec, method, weight_method, weight_observer)
    own = found.bias if activation is not None else BiasSpec()
    bias = BiasSpec(
        own.bits if bias_bits == "target" else bias_bits,  # type: ignore[arg-type]  # BiasSpec refuses other words
        own.scale if bias_scale == "target" else bias_scale,
    )
    return QConfig(target, activation, weight, bias)


def _quantizer(
    role: str,
    spec: QSpec,
    method: str | type[FakeQuantize],
    own: str | type[FakeQuantize] | None,
    observer: str | type[Observer] | None,
) -> QuantizerConfig:
    """The quantizer of a role: `own` method of it where given, which must then be one for it."""
    found = find_method(method) if own is None else find_method_of(own, role)
    default = found.activation_observer if role == "activation" else found.weight_observer
    kind = found.activation if role == "activation" else found.weight
    return QuantizerConfig(spec, default if observer is None else find_observer(observer, role), kind)


def _with_bits(spec: QSpec, bits: int | str) -> QSpec:
    return spec if bits == "target" else dataclasses.replace(spec, bits=bits)  # type: ignore[arg-type]


def _as_config(
    given: QuantizerConfig | QSpec | str | None, default: QSpec, observer: type[Observer]
) -> QuantizerConfig:
    if isinstance(given, QuantizerConfig):
        return given
    if given == "target":
        return QuantizerConfig(default, observer)
    if isinstance(given, QSpec):
        return QuantizerConfig(given, observer)
    if given is None:
        raise ConfigError(
            "QConfig(weight=None): there would be nothing to quantize; leave it out for the target's own grid, or set "
            "qconfig = None on modules that stay in float"
        )
    raise ConfigError(
        f"QConfig: {given!r} is not a quantizer config; pass a QuantizerConfig or a QSpec, such as QSpec(bits=8)"
    )


def _made(config: QuantizerConfig | QSpec | str | None) -> QuantizerConfig:
    """What `__post_init__` made of the argument."""
    if config is None:
        raise ConfigError("QConfig(activation=None) makes no activation quantizer: activations stay float")
    if not isinstance(config, QuantizerConfig):
        raise ConfigError(f"QConfig: {config!r} was set after the config was made; make a new one instead")
    return config


def _check_roles(config: QConfig) -> None:
    weight = _made(config.weight)
    check_role(weight.fake_quantize, "weight")
    weight.fake_quantize.check_spec(weight.spec)
    if config.activation is not None:
        for config_of_activation in (config.activation, config.input):
            if config_of_activation is not None:
                _check_activation(_made(config_of_activation))
        size = weight.spec.group_size
        if size is not None:
            raise ConfigError(
                f"weight {weight.spec}: integer arithmetic has one scale per output channel, so groups need float "
                f"activations; get_qconfig(activation_bits=None, group_size={size}) or group_size=None"
            )
    elif config.input is not None:
        raise ConfigError("QConfig(activation=None, input=...): activations stay float, so inputs do; leave input out")
    elif config.bias != BiasSpec():
        raise ConfigError(
            f"bias {config.bias}: with activation=None there is no input scale for it, so it stays float; leave bias "
            "out, or quantize activations too"
        )
    if not weight.observer.stateless and not weight.fake_quantize.learned:
        raise ConfigError(
            f"weight: {weight.observer.__name__} keeps a range of what it saw, but the codes of a weight follow from "
            "the weight at hand; QuantizerConfig(spec, LatestMinMaxObserver), or the QSpec alone"
        )
    if not isinstance(config.bias, BiasSpec):
        raise ConfigError(f"QConfig: bias {config.bias!r} is not a BiasSpec; BiasSpec(bits=32) works")


def _check_activation(activation: QuantizerConfig) -> None:
    check_role(activation.fake_quantize, "activation")
    activation.fake_quantize.check_spec(activation.spec)
    if activation.spec.axis is not None:
        raise ConfigError(
            f"activation {activation.spec}: an activation has one scale, as hardware accumulates over its channels; "
            "QSpec(axis=None)"
        )
    if activation.observer.stateless:
        raise ConfigError(
            f"activation: {activation.observer.__name__} keeps no range, so there would be nothing to deploy; "
            "MovingAverageMinMaxObserver does"
        )


def _check_target(config: QConfig, target: targets.Target) -> None:
    if config.weight_only and not target.weight_only:
        having = ", ".join(known.name for known in targets.TARGETS if known.weight_only)
        raise ConfigError(
            f"activation=None: target {target.name} computes on integers alone, so activations must be quantized; "
            f"activation_bits={target.bits[-1]} does that. Targets with float activations: {having}"
        )
    roles = (("activation", config.activation), ("activation", config.input), ("weight", config.weight))
    for role, quantizer in roles:
        if quantizer is not None:
            target.check(role, _made(quantizer).spec)
    target.check_bias(config.bias)

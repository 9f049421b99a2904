"""What a target is: a deployment, as data.

    code limits      QSpec of activations and weights, BiasSpec, the widths that each may take
    shift limits     requantize = log2(s_out / (s_in · s_w))        bias = log2(s_b / (s_in · s_w))

A target has no methods that compute a model: what its hardware does differently is said in fields, and `Target.check`
and `Target.check_bias` compare what is wanted with them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from qbench.errors import ConfigError
from qbench.fake_quantize.bias import BIAS_SCALES, BiasSpec
from qbench.numerics.arithmetic import Arithmetic
from qbench.numerics.qparams import QSpec
from qbench.numerics.shifts import ShiftLimits

#: Names of the ops whose output is a probability.
PROBABILITIES = ("Softmax", "Softmax2d", "Softmin", "MaskedSoftmax")


@dataclasses.dataclass(frozen=True)
class FixedOutput:
    """The one grid on which a target puts out some operations.

    Attributes:
        ops: Names of their float classes.
        scale: Of the grid.
        zero_point: In the numbering of the target's own activation codes.
        bits: Width of the codes that it is for; other widths are observed.
    """

    ops: tuple[str, ...]
    scale: float
    zero_point: int
    bits: int = 8


@dataclasses.dataclass(frozen=True)
class Target:
    """One deployment and the rules of its hardware or runtime.

    Attributes:
        name: What users write.
        description: One line: which software, on which hardware.
        activation: Grid of activations; None where it computes activations in float.
        weight: Grid of weights, per channel along axis 0 (layers with another layout move the axis) or per tensor.
        bits: Widths that activations and weights may take.
        weight_bits: Widths of weights where they are others.
        weight_zero_points: Whether weights may have zero points, although its own grid has none.
        bias: Width and scale rule of a bias where nothing else is asked for.
        bias_bits: Widths that a bias may take.
        bias_scales: Scale rules that a bias may take.
        fused_activations: Activations that are computed inside the integer op before them. Every other activation gets
            a quantizer of its own before it.
        shared_ops: Names of QAT ops whose inputs and output must lie on one grid.
        fixed_outputs: Grids that it demands of what some operations put out.
        layers: Float layers that it computes on weight codes, wrappers that start with one included; None: all.
        accumulator_bits: Width of the signed accumulator.
        symmetric_bias: Leave out the lowest bias code.
        shifts: Limits of the shifts of hardware that multiplies by powers of two only.
        first_last_bits: Width of the first and the last layer where `prepare_by_target` is asked for narrower codes.
        weight_only: Whether it also computes in float, so that weights can be codes while activations stay float.
        arithmetic: What its integer operations compute, bit by bit; None where that is not stated, so that a program
            for it has no integer form.
        annotation: What `convert` puts into `node.meta["custom"]` of every node that is no q or dq.
        requantization: How the runtime comes from an accumulator to a code, in words.
        verified: What was compared here with a real runtime or a reference model of it.
        unverified: What was not.
        sources: Rule → where it is from (document, or file of the runtime's source).

    Raises:
        ConfigError: the fields contradict each other.
    """

    name: str
    description: str
    activation: QSpec | None
    weight: QSpec
    bits: tuple[int, ...] = (8,)
    weight_bits: tuple[int, ...] | None = None
    weight_zero_points: bool = False
    bias: BiasSpec = BiasSpec()
    bias_bits: tuple[int, ...] = (32,)
    bias_scales: tuple[str, ...] = ("input_weight",)
    fused_activations: tuple[type[nn.Module], ...] = (nn.ReLU, nn.ReLU6, nn.Hardtanh)
    shared_ops: tuple[str, ...] = ("Cat",)
    fixed_outputs: tuple[FixedOutput, ...] = ()
    layers: tuple[type[nn.Module], ...] | None = None
    accumulator_bits: int = 32
    symmetric_bias: bool = False
    shifts: ShiftLimits | None = None
    first_last_bits: int | None = None
    weight_only: bool = False
    arithmetic: Arithmetic | None = None
    annotation: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    requantization: str = ""
    verified: str = "the Q/DQ program alone: trained codes are its codes, its values those of QAT eval"
    unverified: str = "the runtime and the hardware"
    sources: Mapping[str, str] = dataclasses.field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        fault = next(_faults(self), None)
        if fault is not None:
            raise ConfigError(f"target {self.name}: {fault}")

    def widths(self, role: str) -> tuple[int, ...]:
        """Widths that codes of a role, `"activation"` or `"weight"`, may take."""
        return self.weight_bits if role == "weight" and self.weight_bits is not None else self.bits

    def fuses(self, activation: nn.Module | None) -> bool:
        """Whether this activation (or none) is computed inside the op before it."""
        return activation is None or isinstance(activation, self.fused_activations)

    def fixed_output(self, op: str, bits: int) -> FixedOutput | None:
        """The grid that it demands of what an operation puts out at this width; None where it demands none."""
        return next((fixed for fixed in self.fixed_outputs if op in fixed.ops and bits == fixed.bits), None)

    def computes(self, layer: type[nn.Module]) -> bool:
        """Whether this float layer (the first part of a wrapper) is computed on weight codes."""
        return self.layers is None or issubclass(layer, self.layers)

    def check(self, role: str, wanted: QSpec) -> None:
        """Compare a grid that is wanted of activations or weights with the target's own.

        Raises:
            ConfigError: the target does not have it; the message names the nearest that it has.
        """
        own = self.activation if role == "activation" else self.weight
        if own is None:
            raise ConfigError(
                f"{role} of {wanted.bits} bits: target {self.name} computes activations in float; "
                f"get_qconfig({self.name!r}, activation_bits=None) quantizes the weights"
            )
        widths = self.widths(role)
        if wanted.bits not in widths:
            raise ConfigError(
                f"{role} of {wanted.bits} bits: target {self.name} has {_listed(widths)}; "
                f"{role}_bits={_nearest(wanted.bits, widths)} is the nearest"
            )
        broken = next(_broken_rules(own, wanted, zero_points=role == "weight" and self.weight_zero_points), None)
        if broken is not None:
            raise ConfigError(
                f"{role} {wanted}: target {self.name} {broken}; its own grid is "
                f"{dataclasses.replace(own, bits=wanted.bits)}"
            )

    def check_bias(self, wanted: BiasSpec) -> None:
        """Compare a width and scale rule that is wanted of biases with the target's.

        Raises:
            ConfigError: the target does not have it; the message names the nearest that it has.
        """
        if wanted.bits not in self.bias_bits:
            raise ConfigError(
                f"a bias of {wanted.bits} bits: target {self.name} has {_listed(self.bias_bits)}; "
                f"bias_bits={_nearest(wanted.bits, self.bias_bits)} is the nearest"
            )
        if wanted.scale not in self.bias_scales:
            raise ConfigError(f"bias scale {wanted.scale!r}: target {self.name} has {', '.join(self.bias_scales)}")

    def __str__(self) -> str:
        return self.name


def _broken_rules(own: QSpec, wanted: QSpec, *, zero_points: bool) -> Iterator[str]:
    """What hardware with the grid `own` cannot do of a grid of the same width."""
    if own.symmetric and not zero_points and not (wanted.symmetric and wanted.signed == own.signed):
        yield "has no zero points"
    if own.axis is None and wanted.axis is not None:
        yield "has one scale per tensor"
    if own.power_of_two and not wanted.power_of_two:
        yield "multiplies by powers of two only"


def _faults(target: Target) -> Iterator[str]:
    """What an entry says that cannot be."""
    unknown = set(target.bias_scales) - set(BIAS_SCALES)
    if unknown:
        yield f"unknown bias scales {sorted(unknown)}; known: {BIAS_SCALES}"
    for role, spec in (("activation", target.activation), ("weight", target.weight)):
        if spec is not None and spec.bits not in target.widths(role):
            yield f"its {role} has {spec.bits} bits, which are not among {target.widths(role)}"
    if target.bias.bits not in target.bias_bits or target.bias.scale not in target.bias_scales:
        yield f"its bias {target.bias} is not among the widths {target.bias_bits} and scales {target.bias_scales}"
    if target.activation is None and not target.weight_only:
        yield "activation=None needs weight_only=True: otherwise nothing is quantized"
    yield from _faults_of_outputs(target)
    grids = (target.activation, target.weight)
    if target.shifts is not None and not all(grid is not None and grid.power_of_two for grid in grids):
        yield "shift limits are for power-of-two scales: QSpec(power_of_two=True) for activation and weight"
    if target.first_last_bits is not None and target.first_last_bits not in target.widths("weight"):
        yield f"first_last_bits={target.first_last_bits} is not among {target.widths('weight')}"


def _faults_of_outputs(target: Target) -> Iterator[str]:
    """What its fixed grids say that cannot be."""
    seen: set[tuple[str, int]] = set()
    for fixed in target.fixed_outputs:
        if target.activation is None or fixed.bits not in target.widths("activation"):
            yield f"{fixed}: its activations have no codes of this width"
            return
        own = dataclasses.replace(target.activation, bits=fixed.bits)
        if not (0.0 < fixed.scale < math.inf and own.qmin <= fixed.zero_point <= own.qmax):
            yield f"{fixed}: expected a positive scale and a zero point among {own.qmin} … {own.qmax}"
        named = {(op, fixed.bits) for op in fixed.ops}
        if named & seen or not named:
            yield f"{fixed}: expected operations that no other entry names"
        seen |= named


def _nearest(wanted: int, widths: tuple[int, ...]) -> int:
    return min(widths, key=lambda width: abs(width - wanted))


def _listed(widths: tuple[int, ...]) -> str:
    return ", ".join(str(width) for width in widths)

"""What a target is: a deployment, as data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import nn

from qbench.errors import ConfigError
from qbench.fake_quantize.bias import BIAS_SCALES
from qbench.numerics.arithmetic import Arithmetic
from qbench.numerics.qparams import QSpec


@dataclasses.dataclass(frozen=True)
class Target:
    """One deployment and the rules of its hardware or runtime.

    Attributes:
        name: What users write.
        description: One line: which software, on which hardware.
        activation: Grid of activations.
        weight: Grid of weights, per channel along axis 0 (layers with another layout move the axis).
        bits: Widths that activations and weights may take.
        bias_bits: Widths that a bias may take.
        bias_scales: Scale rules that a bias may take.
        fused_activations: Activations that are computed inside the integer op before them. Every other activation gets
            a quantizer of its own before it.
        shared_ops: Names of QAT ops whose inputs and output must lie on one grid.
        accumulator_bits: Width of the signed accumulator.
        symmetric_bias: Leave out the lowest bias code.
        weight_only: Whether it also computes in float, so that weights can be codes while activations stay float.
        arithmetic: What its integer operations compute, bit by bit; None where that is not stated, so that a program
            for it has no integer form.
        annotation: What `convert` puts into `node.meta["custom"]` of every node that is no q or dq.
        sources: Rule → where it is from (document, or file of the runtime's source).
    """

    name: str
    description: str
    activation: QSpec
    weight: QSpec
    bits: tuple[int, ...] = (8,)
    bias_bits: tuple[int, ...] = (32,)
    bias_scales: tuple[str, ...] = ("input_weight",)
    fused_activations: tuple[type[nn.Module], ...] = (nn.ReLU, nn.ReLU6, nn.Hardtanh)
    shared_ops: tuple[str, ...] = ("Cat",)
    accumulator_bits: int = 32
    symmetric_bias: bool = False
    weight_only: bool = False
    arithmetic: Arithmetic | None = None
    annotation: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    sources: Mapping[str, str] = dataclasses.field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        unknown = set(self.bias_scales) - set(BIAS_SCALES)
        if unknown:
            raise ConfigError(f"target {self.name}: unknown bias scales {sorted(unknown)}; known: {BIAS_SCALES}")

    def fuses(self, activation: nn.Module | None) -> bool:
        """Whether this activation (or none) is computed inside the op before it."""
        return activation is None or isinstance(activation, self.fused_activations)

    def __str__(self) -> str:
        return self.name

"""How much of a prepared model is quantized, as data and as text."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable

from qbench.report.preparation import FloatInput, FloatOperation, LeftInFloat

#: Lines that a list of reasons takes at most.
_MOST = 12


@dataclasses.dataclass(frozen=True)
class Coverage:
    """What of a model became integers, what did not, and why.

    Attributes:
        model: Class of the model.
        batch_norms: BatchNorms in the model.
        folded: Of them, those that are computed inside the layer before them.
        affine: Of them, those that are quantized layers of their own.
        layers: Modules with a weight of two axes or more (convolutions, linears, embeddings).
        quantized_layers: Of them, those that are QAT modules.
        linked_layers: Of these, those whose input a quantizer before them put out, or that need no quantized input.
        parameters: Numbers that the model trains.
        quantized_parameters: Of them, those that belong to QAT modules.
        quantized: QAT class -> how many.
        left_in_float: Modules and forwards that stay float.
        float_inputs: Inputs that arrive in float and are quantized where they are read.
        float_operations: Operators that compute in float from quantized tensors.
        unreached: QAT modules that no recorded forward reached.
    """

    model: str
    batch_norms: int
    folded: int
    affine: int
    layers: int
    quantized_layers: int
    linked_layers: int
    parameters: int
    quantized_parameters: int
    quantized: dict[str, int]
    left_in_float: tuple[LeftInFloat, ...]
    float_inputs: tuple[FloatInput, ...]
    float_operations: tuple[FloatOperation, ...]
    unreached: tuple[str, ...]

    def __str__(self) -> str:
        lines = [
            self.model,
            f"  fused        {_of(self.folded, self.batch_norms)} BatchNorms are folded"
            + (f", {self.affine} are layers of their own" if self.affine else ""),
            f"  quantized    {_of(self.quantized_layers, self.layers)} layers with a weight, "
            f"{_of(self.quantized_parameters, self.parameters)} parameters",
            f"  linked       {_of(self.linked_layers, self.quantized_layers)} quantized layers get codes as input",
            f"  modules      {', '.join(f'{n} {kind}' for kind, n in sorted(self.quantized.items())) or 'none'}",
        ]
        lines += _listed("left in float", (f"{found.kind}: {found.reason}" for found in self.left_in_float))
        lines += _listed("quantized where it is read", (_kind(found) for found in self.float_inputs))
        lines += _listed("computed in float", (found.operator for found in self.float_operations))
        lines += _listed("not reached", self.unreached)
        return "\n".join(lines)


def _of(part: int, whole: int) -> str:
    return f"{part:,} of {whole:,} ({100 * part / whole:.4g} %)" if whole else "0 of 0"


def _kind(found: FloatInput) -> str:
    """The reason without the path of what is stored, so that equal ones are counted together."""
    return "a tensor that is stored in the model" if found.origin == "stored" else found.reason


def _listed(title: str, reasons: Iterable[str]) -> list[str]:
    counted = Counter(reasons).most_common()
    lines = [f"  {title}: {reason}" + (f" (×{count})" if count > 1 else "") for reason, count in counted[:_MOST]]
    return lines + ([f"  {title}: {len(counted) - _MOST} more reasons"] if len(counted) > _MOST else [])

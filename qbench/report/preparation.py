"""What `prepare_qat` did, as data."""

from __future__ import annotations

import dataclasses
from typing import Literal

#: Where a tensor on no grid comes from: the model's inputs (or made in float, by `torch.zeros` say), a parameter or
#: buffer, an operator that leaves the grid, a layer that quantizes its weight only.
FloatOrigin = Literal["input", "stored", "operator", "weight_only"]

_ORIGINS: dict[FloatOrigin, str] = {
    "input": "an input of the model, or made in float",
    "stored": "{} is stored in the model",
    "operator": "{} leaves the grid",
    "weight_only": "the {} before it quantizes its weight only",
}


@dataclasses.dataclass(frozen=True)
class QuantizedModule:
    """A module that became a QAT module: path, and the names of the float and the QAT class.

    `weight_only` says that its input, output and bias stay float: without an input scale a bias has no codes.
    `output_grid` is the scale and the zero point that the target demands of its output, or None.
    """

    path: str
    float_type: str
    qat_type: str
    weight_only: bool = False
    output_grid: tuple[float, int] | None = None


@dataclasses.dataclass(frozen=True)
class FloatInput:
    """An input that its consumer quantizes, because no quantizer produced it.

    Attributes:
        path: Of the consumer.
        index: Position of the input.
        origin: Where the tensor comes from.
        name: `"aten.mean"`, say, for an operator; the path of what is stored; the class of a layer; else empty.
    """

    path: str
    index: int
    origin: FloatOrigin
    name: str = ""

    @property
    def reason(self) -> str:
        """Where the tensor comes from, in words."""
        return _ORIGINS[self.origin].format(self.name)


@dataclasses.dataclass(frozen=True)
class RequantizedInput:
    """An input that its consumer puts on another grid, because one that it arrives on is known and cannot be shared.

    Attributes:
        path: Of the consumer.
        index: Position of the input.
        reads: Paths of the modules that it comes from.
    """

    path: str
    index: int
    reads: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class SharedQuantizer:
    """Quantizers that became one: the paths under which it is found, and why."""

    paths: tuple[str, ...]
    reason: str


@dataclasses.dataclass(frozen=True)
class LeftInFloat:
    """A module, or a part of a forward, that stays float: path, class, reason.

    Attributes:
        path: Of the module.
        kind: Its class, or `"forward"` for operations that a forward computes itself.
        reason: Why.
        on_purpose: Whether the user said so: its qconfig is None.
        parameters: How many numbers it trains.
    """

    path: str
    kind: str
    reason: str
    on_purpose: bool = False
    parameters: int = 0


@dataclasses.dataclass(frozen=True)
class FloatOperation:
    """An operator between QAT modules that no quantizer follows, as the recorded forward saw it.

    Attributes:
        operator: Its name, `"aten.add"`.
        reads: Paths of the QAT modules whose output its values come from; empty where they come from the model's
            inputs alone.
        way_out: What would quantize it, or empty.
    """

    operator: str
    reads: tuple[str, ...]
    way_out: str = ""


@dataclasses.dataclass(frozen=True)
class AppliedOverride:
    """An override of `prepare_by_target` and what it hit.

    Attributes:
        rule: The override, in words.
        modules: Paths of the modules that it holds for.
        parts: Paths of parts of fused layers that it names in vain, with the layer that they belong to.
    """

    rule: str
    modules: tuple[str, ...]
    parts: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        listed = ", ".join(path or "(root)" for path in self.modules)
        text = f"{self.rule}: {len(self.modules)} module(s): {listed}" if self.modules else f"{self.rule}: no module"
        within = ", ".join(f"{part} in {layer}" for part, layer in self.parts)
        return text + (f"; not for parts of fused layers: {within}" if within else "")


@dataclasses.dataclass(frozen=True)
class PreparationReport:
    """Everything that was quantized and everything that was not.

    Attributes:
        quantized: Modules that became QAT modules.
        float_inputs: Inputs that arrive in float and are quantized by their consumer.
        shared: Quantizers that were merged.
        requantized: Inputs that their consumer puts on another grid than that on which they arrive.
        left_in_float: Modules that stay float, and forwards whose operations do, with the reason.
        float_operations: Operators that compute in float from quantized tensors.
        unreached: Paths of QAT modules that no recorded forward reached.
        overrides: What `prepare_by_target` was asked for module by module, and what that hit.
        links_recorded: False while the first forward is still to be recorded.
    """

    quantized: tuple[QuantizedModule, ...] = ()
    float_inputs: tuple[FloatInput, ...] = ()
    shared: tuple[SharedQuantizer, ...] = ()
    left_in_float: tuple[LeftInFloat, ...] = ()
    unreached: tuple[str, ...] = ()
    links_recorded: bool = False
    float_operations: tuple[FloatOperation, ...] = ()
    overrides: tuple[AppliedOverride, ...] = ()
    requantized: tuple[RequantizedInput, ...] = ()

    def __str__(self) -> str:
        lines = [f"{len(self.quantized)} modules quantized"]
        weight_only = sum(found.weight_only for found in self.quantized)
        if weight_only:
            lines.append(f"{weight_only} of them in their weight only: input, output and bias stay float")
        if not self.links_recorded:
            lines.append("links: the first forward will be recorded")
        lines += [f"override {applied}" for applied in self.overrides]
        for found in self.quantized:
            if found.output_grid is not None:
                scale, zero_point = found.output_grid
                grid = f"scale {scale:.6g}, zero point {zero_point}"
                lines.append(f"output of {found.path or '(root)'}: {grid}, as the target demands")
        lines += [f"input {i.index} of {i.path}: quantized there, {i.reason}" for i in self.float_inputs]
        for again in self.requantized:
            lines.append(
                f"input {again.index} of {again.path}: on another grid there, as that of {', '.join(again.reads)} "
                "cannot be shared"
            )
        lines += [f"one quantizer: {', '.join(s.paths)} ({s.reason})" for s in self.shared]
        lines += [f"left in float: {f.path or '(root)'} [{f.kind}], {f.reason}" for f in self.left_in_float]
        for operation in self.float_operations:
            way_out = f"; {operation.way_out} quantizes it" if operation.way_out else ""
            of = ", ".join(operation.reads) or "the inputs"
            lines.append(f"computed in float: {operation.operator} of {of}{way_out}")
        lines += [f"not reached: {path}" for path in self.unreached]
        return "\n".join(lines)

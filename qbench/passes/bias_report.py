"""What the bias pass did, layer by layer: every convolution and linear layer is in exactly one of its lists."""

from __future__ import annotations

import dataclasses

from torch import Tensor

# Layers named in the text of a report, a list; the report itself holds all of them.
_SHOWN = 8


@dataclasses.dataclass(frozen=True)
class LayerNote:
    """A layer and what there is to say about it.

    Attributes:
        node: Name of the node, `"conv2d_3"`.
        path: Path of the module that it was traced in, `"layer1.0.conv1"`; empty where the graph does not keep it.
        reason: Why, in words; empty where the list says it all.
    """

    node: str
    path: str = ""
    reason: str = ""

    def __str__(self) -> str:
        name = f"{self.path} ({self.node})" if self.path else self.node
        return f"{name}: {self.reason}" if self.reason else name


@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedBias:
    """A bias that became codes.

    Attributes:
        node: Name of the layer's node.
        path: Path of its module.
        codes: int32, (out,).
        scale: float32, () or (out,): `s_in · s_w`.
        added: Whether the layer had no bias and was given zeros.
    """

    node: str
    path: str
    codes: Tensor
    scale: Tensor
    added: bool = False

    @property
    def largest(self) -> int:
        """Largest |code|."""
        return int(self.codes.long().abs().max()) if self.codes.numel() else 0


@dataclasses.dataclass(frozen=True)
class SaturatedBias:
    """Channels of a quantized bias whose value did not fit.

    Attributes:
        node: Name of the layer's node.
        path: Path of its module.
        channels: Their indices.
        values: The float biases that did not fit.
        held: The real values that the codes stand for instead.
        weight_scales: The smallest weight scales at which they would fit, for the same input scale.
    """

    node: str
    path: str
    channels: tuple[int, ...]
    values: tuple[float, ...]
    held: tuple[float, ...]
    weight_scales: tuple[float, ...]

    def __str__(self) -> str:
        shown = [
            f"channel {channel}: {value:.4g} became {held:.4g}, fits from weight scale {scale:.4g}"
            for channel, value, held, scale in zip(
                self.channels[:_SHOWN], self.values, self.held, self.weight_scales, strict=False
            )
        ]
        more = [f"{len(self.channels) - _SHOWN} more"] if len(self.channels) > _SHOWN else []
        return f"{LayerNote(self.node, self.path)}: " + "; ".join(shown + more)


@dataclasses.dataclass(frozen=True, eq=False)
class BiasReport:
    """What `quantize_bias` did.

    Attributes:
        quantized: Layers whose bias became codes in this run.
        refused: Quantized layers whose bias stayed float, with the reason.
        saturated: Those of `quantized` with channels that did not fit.
        already: Layers whose bias was integer before.
        without_bias: Quantized layers that have no bias.
        left_float: Layers that are not quantized, with the reason.
        bits: Width of a code.
    """

    quantized: tuple[QuantizedBias, ...] = ()
    refused: tuple[LayerNote, ...] = ()
    saturated: tuple[SaturatedBias, ...] = ()
    already: tuple[LayerNote, ...] = ()
    without_bias: tuple[LayerNote, ...] = ()
    left_float: tuple[LayerNote, ...] = ()
    bits: int = 32

    @property
    def modified(self) -> bool:
        """Whether the graph was changed."""
        return bool(self.quantized)

    @property
    def complete(self) -> bool:
        """Whether every layer that is quantized and has a bias has an integer one, with nothing saturated."""
        return not self.refused and not self.saturated

    def codes(self) -> dict[str, Tensor]:
        """int32 codes by name of the layer's node, of the biases quantized in this run."""
        return {layer.node: layer.codes for layer in self.quantized}

    def __str__(self) -> str:
        added = sum(layer.added for layer in self.quantized)
        largest = max((layer.largest for layer in self.quantized), default=0)
        first = f"int{self.bits} bias: {len(self.quantized)} quantized"
        first += f" (largest code {largest:,})" if self.quantized else ""
        first += f", {added} of them zeros that were added" if added else ""
        lines = [first]
        lines += _listed("saturated", self.saturated)
        lines += _listed("refused", self.refused)
        lines += _listed("left in float", self.left_float)
        lines += _listed("without a bias", self.without_bias)
        lines += [f"{len(self.already)} had an integer bias before"] if self.already else []
        return "\n".join(lines)


def _listed(title: str, notes: tuple[LayerNote, ...] | tuple[SaturatedBias, ...]) -> list[str]:
    if not notes:
        return []
    more = [f"  … and {len(notes) - _SHOWN} more"] if len(notes) > _SHOWN else []
    return [f"{len(notes)} {title}:", *(f"  {note}" for note in notes[:_SHOWN]), *more]

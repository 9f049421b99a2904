"""What a QAT model deploys, layer by layer, as data."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class DeployedLayer:
    """The integers of one layer, in figures.

    Attributes:
        path: Of the layer.
        weight_scales: Smallest and largest weight scale.
        largest_bias_code: Largest |q_b|; None where the bias stays float, as activations do (weight-only).
        accumulator: Largest |accumulator| that any input can produce; None where activations stay float.
        coarsened: Output channels (or scales) whose weight scale the bias floor raised, without silenced ones.
        largest_coarsening: The largest factor by which it did, 1.0 where nowhere; 2.0 costs such a channel one bit.
        silenced: Output channels whose weight codes the floor sent to 0.
        beyond: What of it lies outside the target's limits of shifts, as sentences.
    """

    path: str
    weight_scales: tuple[float, float]
    largest_bias_code: int | None
    accumulator: int | None
    coarsened: int
    largest_coarsening: float
    silenced: int
    beyond: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class ConversionReport:
    """All layers of a model, for one target.

    Attributes:
        target: Name of the target.
        layers: In the order of the model.
    """

    target: str
    layers: tuple[DeployedLayer, ...]

    @property
    def coarsened(self) -> tuple[DeployedLayer, ...]:
        """Layers in which the bias floor raised a weight scale."""
        return tuple(layer for layer in self.layers if layer.coarsened)

    @property
    def beyond_limits(self) -> tuple[DeployedLayer, ...]:
        """Layers that the target's hardware cannot compute as they were trained."""
        return tuple(layer for layer in self.layers if layer.beyond)

    def __str__(self) -> str:
        width = max((len(layer.path) for layer in self.layers), default=5)
        lines = [
            f"target {self.target}",
            f"{'layer':{width}}  {'weight scales':>21}  {'bias code':>10}  {'accumulator':>11}  bias floor",
        ]
        for layer in self.layers:
            low, high = layer.weight_scales
            floor = "-"
            if layer.coarsened or layer.silenced:
                parts = [f"{layer.coarsened} coarser, up to {layer.largest_coarsening:.3g}x"] if layer.coarsened else []
                floor = ", ".join([*parts, f"{layer.silenced} silenced"] if layer.silenced else parts)
            scales = f"{low:.3g} … {high:.3g}"
            bias, accumulator = ("float" if n is None else n for n in (layer.largest_bias_code, layer.accumulator))
            lines.append(f"{layer.path:{width}}  {scales:>21}  {bias:>10}  {accumulator:>11}  {floor}")
        lines += [f"{layer.path}: {sentence}" for layer in self.beyond_limits for sentence in layer.beyond]
        return "\n".join(lines)

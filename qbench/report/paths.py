"""Which code trained the layers of a model."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

#: What each path is: of a layer that was not called yet, none.
PATHS = {
    "native": "C++",
    "generated": "generated code",
    "fused": "one function in blocks",
    "steps": "step by step",
    "": "not called yet, or compiled with the model",
}


@dataclass(frozen=True)
class TrainingPaths:
    """The path of each layer in its last forward in training.

    Attributes:
        layers: One of `PATHS` by path of the layer in the model.
        refused: Why generated code is not taken where it was asked for, each reason once.
    """

    layers: dict[str, str]
    refused: tuple[str, ...] = ()

    def __str__(self) -> str:
        counts = Counter(self.layers.values())
        parts = [f"{counts[path]} {name}" for path, name in PATHS.items() if counts[path]]
        text = f"training path of {len(self.layers)} layers: {', '.join(parts) or 'none'}"
        return f"{text} ({'; '.join(self.refused)})" if self.refused else text


"""What is asked for some modules and not for others: a name pattern or a type, and what holds there.

Overrides are read in order. One holds for the modules that it names and for everything below them; what a later one
says of the same field wins.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from qbench.errors import ConfigError, QBenchError
from qbench.fake_quantize.bias import BiasSpec
from qbench.qconfig import QConfig, QuantizerConfig


@dataclasses.dataclass(frozen=True)
class Override:
    """Other widths for some modules, or none at all; a field that is None says nothing.

    Attributes:
        match: Path of a module in the float model, as `named_modules()` spells it, with the wildcards of a shell
            (`"layer1.*"`, `"*.conv1"`); or a class of module.
        exclude: True leaves the module in float; False takes an earlier exclude back.
        weight_bits: Width of weight codes.
        activation_bits: Width of the codes that the module puts out.
        input_bits: Width of the codes that the module reads: that of the modules before it, or of its own quantizer
            where its input arrives in float. Needs example_inputs.
        bias_bits: Width of bias codes.
        bias_scale: Scale rule of the bias.

    Raises:
        ConfigError: it matches by something else, asks for nothing, or asks for widths of what it excludes.
    """

    match: str | type[nn.Module]
    exclude: bool | None = None
    weight_bits: int | None = None
    activation_bits: int | None = None
    input_bits: int | None = None
    bias_bits: int | None = None
    bias_scale: str | None = None

    def __post_init__(self) -> None:
        by_type = isinstance(self.match, type) and issubclass(self.match, nn.Module)
        if not by_type and not (isinstance(self.match, str) and self.match):
            raise ConfigError(
                f"Override({self.match!r}): expected a path such as 'layer1.*' or a class such as torch.nn.Linear"
            )
        asked = self.asked()
        if not asked:
            raise ConfigError(
                f"Override({self._place()}) asks for nothing; Override({self._place()}, exclude=True) leaves it in "
                f"float, Override({self._place()}, weight_bits=4) gives it other codes"
            )
        if self.exclude and len(asked) > 1:
            raise ConfigError(f"Override({self}): what is excluded has no codes; leave the widths or exclude out")

    def asked(self) -> dict[str, Any]:
        """The fields that say something, without `match`."""
        fields = (field.name for field in dataclasses.fields(self) if field.name != "match")
        return {name: getattr(self, name) for name in fields if getattr(self, name) is not None}

    def hits(self, path: str, kinds: tuple[type[nn.Module], ...]) -> bool:
        """Whether it names a module with this path that is, or stands for, modules of these classes."""
        if isinstance(self.match, str):
            return fnmatchcase(path, self.match)
        return any(issubclass(kind, self.match) for kind in kinds)

    def _place(self) -> str:
        return repr(self.match) if isinstance(self.match, str) else self.match.__name__

    def __str__(self) -> str:
        return ", ".join([self._place(), *(f"{name}={value}" for name, value in self.asked().items())])


def exactly(path: str) -> str:
    """The pattern that this path alone matches."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in path)


def overridden(base: QConfig, asked: Mapping[str, Any], path: str) -> QConfig | None:
    """The qconfig of a module for which other things are asked.

    Args:
        base: What would hold without them.
        asked: Fields of an `Override`.
        path: Of the module, for messages.

    Raises:
        ConfigError: the target does not have it; the message names the nearest that it has.
    """
    if asked.get("exclude"):
        return None
    changes: dict[str, Any] = {}
    try:
        if "weight_bits" in asked:
            changes["weight"] = _resized(base.weight, asked["weight_bits"])
        if "activation_bits" in asked:
            changes["activation"] = _resized(base.activation, asked["activation_bits"])
            changes["input"] = base.input or base.activation  # what the module reads stays as it is
        if "input_bits" in asked:
            changes["input"] = _resized(base.input or base.activation, asked["input_bits"])
        if "bias_bits" in asked or "bias_scale" in asked:
            bits, scale = asked.get("bias_bits", base.bias.bits), asked.get("bias_scale", base.bias.scale)
            changes["bias"] = BiasSpec(bits, scale)
        return dataclasses.replace(base, **changes)
    except QBenchError as error:
        raise type(error)(f"override of {path or '(root)'}: {error}") from None


def _resized(config: object, bits: int) -> QuantizerConfig:
    if not isinstance(config, QuantizerConfig):
        raise ConfigError(
            f"activations of {bits} bits, but activations stay in float; prepare_by_target(..., activation_bits=8) "
            "quantizes them"
        )
    return dataclasses.replace(config, spec=dataclasses.replace(config.spec, bits=bits))

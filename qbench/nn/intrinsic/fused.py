"""Float wrappers: chains of modules that hardware computes as one op."""

from __future__ import annotations

import itertools
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qbench.errors import FusionError
from qbench.nn.frozen import known_types

PartType = type[nn.Module] | tuple[type[nn.Module], ...]


class Fused(nn.Sequential):
    """A chain of float modules that is quantized as one; computes what the chain computes.

    A subclass names its parts, `part_types`; a tuple of types means any of them. Parts are the user's own modules.

    Raises:
        FusionError: the parts are not of the named types, or a BatchNorm cannot be folded into the layer before it.
    """

    part_types: ClassVar[tuple[PartType, ...]] = ()

    def __init__(self, *parts: nn.Module) -> None:
        self.check_parts(parts)
        super().__init__(*parts)
        self.train(parts[0].training)

    @classmethod
    def check_parts(cls, parts: tuple[nn.Module, ...]) -> None:
        """Raise FusionError unless `parts` can make this wrapper."""
        if len(parts) != len(cls.part_types) or not all(map(matches_part, parts, cls.part_types)):
            given = ", ".join(type(part).__name__ for part in parts)
            fitting = _wrapper_that_fits(parts)
            hint = f"; {fitting.__name__}({given}) is the wrapper of these parts" if fitting is not None else ""
            raise FusionError(f"{cls.__name__}({given}): expected {cls.__name__}({cls.describe()}){hint}")
        for linear, bn in itertools.pairwise(parts):
            # A BatchNorm with fixed statistics is no `_BatchNorm`, but has the same attributes.
            if isinstance(bn, _BatchNorm) or isinstance(getattr(bn, "running_mean", None), Tensor):
                _check_foldable(cls.__name__, linear, bn)

    @classmethod
    def describe(cls) -> str:
        """The chain in words, `Conv2d, BatchNorm2d, ReLU|ReLU6`."""
        return ", ".join("|".join(t.__name__ for t in as_types(part)) for part in cls.part_types)


def as_types(part: PartType) -> tuple[type[nn.Module], ...]:
    """The alternatives of one part of a chain."""
    return part if isinstance(part, tuple) else (part,)


def matches_part(module: Any, part: PartType) -> bool:
    """Whether a module is one of these types itself: a subclass may compute something else."""
    return not set(as_types(part)).isdisjoint(known_types(module))


def _wrapper_that_fits(parts: tuple[nn.Module, ...]) -> type[Fused] | None:
    """A wrapper whose chain these parts are, for a message."""
    waiting = list(Fused.__subclasses__())
    while waiting:
        kind = waiting.pop(0)
        waiting += kind.__subclasses__()
        if kind.part_types and len(parts) == len(kind.part_types) and all(map(matches_part, parts, kind.part_types)):
            return kind
    return None


def _check_foldable(wrapper: str, linear: nn.Module, bn: Any) -> None:
    if bn.running_mean is None or bn.running_var is None:
        raise FusionError(
            f"{wrapper}: {bn} has no running statistics, so there is nothing to fold; make it with "
            "track_running_stats=True"
        )
    channels = getattr(linear, "out_channels", getattr(linear, "out_features", None))
    if channels is not None and channels != len(bn.running_mean):
        raise FusionError(
            f"{wrapper}: {type(linear).__name__} puts out {channels} channels, {type(bn).__name__} has "
            f"{len(bn.running_mean)}; they must be equal"
        )

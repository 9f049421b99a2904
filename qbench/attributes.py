"""The attributes of a module that are its own: those that not every module has."""

from __future__ import annotations

from typing import Any

from torch import nn

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


def own_attributes(module: nn.Module) -> dict[str, Any]:
    """What a module has apart from parameters, buffers, submodules, hooks and its mode."""
    return {name: value for name, value in vars(module).items() if name not in _OF_EVERY_MODULE}

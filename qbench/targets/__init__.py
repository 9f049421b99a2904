"""Targets: one file and one entry each."""

from __future__ import annotations

import difflib

from qbench.errors import ConfigError
from qbench.targets.base import Target
from qbench.targets.neutron import NEUTRON
from qbench.targets.onnxruntime import ONNXRUNTIME
from qbench.targets.tosa import TOSA
from qbench.targets.xnnpack import XNNPACK

# Add a target here.
TARGETS: tuple[Target, ...] = (ONNXRUNTIME, XNNPACK, NEUTRON, TOSA)

__all__ = ["TARGETS", "Target", "get", "names"]


def names() -> tuple[str, ...]:
    """Names of the targets, in the order of `TARGETS`."""
    return tuple(target.name for target in TARGETS)


def get(name: str | Target) -> Target:
    """The target of this name (a Target is returned as it is).

    Raises:
        ConfigError: no target has this name; the message lists the names.
    """
    if isinstance(name, Target):
        return name
    for target in TARGETS:
        if target.name == name:
            return target
    near = difflib.get_close_matches(str(name).lower(), names(), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ConfigError(f"target {name!r} is unknown; expected one of {', '.join(names())}{hint}")

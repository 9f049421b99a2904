"""Targets: one file each, with one entry for each deployment that differs."""

from __future__ import annotations

import difflib

from qbench.errors import ConfigError
from qbench.targets.academic import ACADEMIC
from qbench.targets.base import FixedOutput, Target
from qbench.targets.esp_dl import ESP_DL, ESP_DL_P4
from qbench.targets.neutron import NEUTRON
from qbench.targets.onnxruntime import ONNXRUNTIME
from qbench.targets.openvino import OPENVINO
from qbench.targets.qnn import QNN
from qbench.targets.snpe import SNPE
from qbench.targets.tensorrt import TENSORRT
from qbench.targets.tflite import TFLITE, TFLITE_16X8
from qbench.targets.tosa import TOSA
from qbench.targets.vitis import VITIS
from qbench.targets.vulkan import VULKAN
from qbench.targets.xnnpack import XNNPACK

# Add a target here.
TARGETS: tuple[Target, ...] = (
    ONNXRUNTIME,
    XNNPACK,
    NEUTRON,
    TOSA,
    TENSORRT,
    OPENVINO,
    SNPE,
    QNN,
    VITIS,
    ESP_DL,
    ESP_DL_P4,
    TFLITE,
    TFLITE_16X8,
    VULKAN,
    ACADEMIC,
)

__all__ = ["TARGETS", "FixedOutput", "Target", "get", "names"]


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

"""torchvision, imported with one known fault of its wheels repaired.

The registry's torchvision wheel beside a CPU-only torch cannot load its C++ library, and then stops at
`operator torchvision::nms does not exist`: it attaches a fake kernel to an operator that nobody declared. Declaring the
two schemas first is enough for everything that needs no C++ operator, the classification models among it. The repair
acts on that very error and on nothing else.
"""

from __future__ import annotations

import sys
from difflib import get_close_matches
from types import ModuleType

import torch
from torch import nn

from qbench.errors import ConfigError, require

_KNOWN_FAULT = "operator torchvision::nms does not exist"
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_libraries: list[torch.library.Library] = []  # a Library that is collected takes its operators with it


def import_torchvision(purpose: str = "build its models") -> ModuleType:
    """Import torchvision, repairing the one known fault described above.

    Args:
        purpose: What needs it; ends the sentence "torchvision is needed to" of the error.

    Raises:
        MissingDependencyError: torchvision is not installed.
        RuntimeError: torchvision fails to import for any other reason; its own error.
    """
    try:
        return require("torchvision", extra="vision", purpose=purpose)
    except RuntimeError as error:
        if _KNOWN_FAULT not in str(error):
            raise
    _forget("torchvision")
    _declare_schemas()
    return require("torchvision", extra="vision", purpose=purpose)


def classification_names() -> tuple[str, ...]:
    """Names of every classification model that the installed torchvision can build (not its pre-quantized ones)."""
    torchvision = import_torchvision()
    return tuple(torchvision.models.list_models(module=torchvision.models))


def classification_model(name: str, num_classes: int) -> nn.Module:
    """Build a torchvision classification model with fresh weights.

    Args:
        name: As in `torchvision.models`, `"resnet18"`.
        num_classes: Width of its last layer.

    Raises:
        ConfigError: no such model; the message lists near names.
        MissingDependencyError: torchvision is not installed.
    """
    names = classification_names()
    if name not in names:
        near = get_close_matches(name.lower(), names, n=4, cutoff=0.4) or ["resnet18", "mobilenet_v2"]
        raise ConfigError(
            f"model {name!r} is neither a torchvision classification model nor file.py:function; "
            f"near names: {', '.join(near)}"
        )
    # Both add auxiliary outputs by default, and warn until they are told how to initialise.
    with_aux = name in ("googlenet", "inception_v3")
    options = {"aux_logits": False, "init_weights": False} if with_aux else {}
    model: nn.Module = import_torchvision().models.get_model(name, weights=None, num_classes=num_classes, **options)
    return model


def _forget(package: str) -> None:
    """Drop what a failed import left behind: the package itself is gone, its finished submodules are not."""
    for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
        del sys.modules[name]


def _declare_schemas() -> None:
    """Declare the operators that the C++ library would have declared; without kernels, so calling them is an error."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        library.define(schema)
    _libraries.append(library)

"""The layers of a float model and of its QAT form, in pairs.

`fuse` and `prepare_qat` keep paths: a wrapper stands where its first part stood, and its QAT form stands where the
wrapper stood. A pair is what stands at one path.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping

from torch import nn

from qbench.errors import ConfigError, PreparationError
from qbench.nn.frozen import known_types
from qbench.nn.qat.body import QatModule
from qbench.preparation import Examples, prepare_qat
from qbench.qconfig import QConfig, get_qconfig

#: Path -> the module of the float model and that of the QAT model.
Pairs = Mapping[str, tuple[nn.Module, nn.Module]]

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def prepared(fused: nn.Module, qconfig: QConfig | None, example_inputs: Examples) -> nn.Module:
    """The QAT form of a fused model, by its own qconfig where it has one and none is given."""
    if qconfig is None and all(module.__dict__.get("qconfig") is None for module in fused.modules()):
        qconfig = get_qconfig()
    return prepare_qat(fused, qconfig=qconfig, example_inputs=example_inputs)


def twin_of(qat: nn.Module, model: nn.Module, fused: nn.Module) -> nn.Module:
    """The float model whose layers stand where those of `qat` stand.

    Args:
        qat: In training mode.
        model: The user's model; it is not changed.
        fused: The same after `fuse`, in training mode.

    Raises:
        PreparationError: nothing is quantized in `qat`.
        ConfigError: `qat` was made from another model.
    """
    if not has_quantized(qat):
        raise PreparationError(
            f"profile_qat: nothing is quantized in {type(qat).__name__}; qat_model is what prepare_qat returns, or "
            "None: profile_qat(model, example_inputs=(x,))"
        )
    if not _unpaired(fused, qat):
        return fused
    if not _unpaired(model, qat):  # it was prepared without being fused
        return in_training(copy.deepcopy(model))
    path = _unpaired(fused, qat)[0]
    there = dict(fused.named_modules()).get(path)
    raise ConfigError(
        f"profile_qat: qat_model has a {type(qat.get_submodule(path)).__name__} at {_label(path)}, the fused float "
        f"model {'nothing' if there is None else 'a ' + type(there).__name__}; give the model that it was prepared "
        "from, or no qat_model: profile_qat(model, example_inputs=(x,))"
    )


def paired_layers(float_model: nn.Module, qat: nn.Module) -> Pairs:
    """The pairs that get a row: every QAT module, and what else computes without one inside; none inside another."""
    modules = dict(float_model.named_modules(remove_duplicate=False))
    found: dict[nn.Module, str] = {}  # one that stands at several paths has one row
    for path, module in _layers(qat, ""):
        if path in modules:
            found.setdefault(module, path)
    return {_label(path): (modules[path], module) for module, path in found.items()}


def has_quantized(model: nn.Module) -> bool:
    """Whether a model has QAT modules."""
    return any(isinstance(module, QatModule) for module in model.modules())


def in_training(model: nn.Module) -> nn.Module:
    """The model itself, in training mode; of one that is in it every module keeps its own mode."""
    return model if model.training else model.train()


def _layers(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    library = type(module).__module__.startswith("torch.nn") and not isinstance(module, _CONTAINERS)
    whole = not has_quantized(module) and (library or not any(True for _ in module.children()))
    if isinstance(module, QatModule) or (whole and not isinstance(module, nn.Identity)):
        yield path, module
        return
    for name, child in module.named_children():
        yield from _layers(child, f"{path}.{name}" if path else name)


def _unpaired(float_model: nn.Module, qat: nn.Module) -> list[str]:
    """Paths of QAT modules that are not the form of what stands at that path of a float model."""
    modules = dict(float_model.named_modules(remove_duplicate=False))
    quantized = ((path, module) for path, module in qat.named_modules() if isinstance(module, QatModule))
    return [
        path
        for path, module in quantized
        if path not in modules or module.float_type not in known_types(modules[path])
    ]


def _label(path: str) -> str:
    return path or "(the model)"

"""Switches of QAT layers, for `model.apply`, and which path they led to."""

from __future__ import annotations

from torch import nn

from qbench.nn.qat.body import QatModule
from qbench.nn.qat.layer import QatLayer
from qbench.nn.qat.pools import save_codes, save_values
from qbench.nn.qat.sums import Sum
from qbench.numerics.generated import refusals
from qbench.report.paths import TrainingPaths


def enable_low_memory(module: nn.Module) -> None:
    """Save activations and weights for backward as codes: `model.apply(qbench.enable_low_memory)`.

    One byte a value in place of four, and the same gradients, bit for bit: of what goes into convolutions, linear
    layers and max pools, which become of a class that derives from their own. In eager mode, for float32 on CPUs;
    elsewhere nothing changes, and the log of "qbench" says so once. (Under autocast a convolution saves what it
    computes with, in two bytes a value.)
    """
    if isinstance(module, QatModule):
        module.low_memory = True
    save_codes(module)


def disable_low_memory(module: nn.Module) -> None:
    """Save activations and weights for backward as they are again."""
    if isinstance(module, QatModule):
        module.low_memory = False
    save_values(module)


def enable_fast_path(module: nn.Module) -> None:
    """Train by C++ or generated code where there is some: `model.apply(qbench.enable_fast_path)`.

    What follows a layer, and what comes before it, is compiled in its first step: on CPUs C++ that is the same for all
    layers; where that does not serve (other observers, grids that learn without a BatchNorm), what `torch.compile`
    generates, once for all layers that are configured alike. Codes are those of the plain path for the same statistics,
    which are summed in another order. Where there is no compiler, or none for this device, dtype or layout, the plain
    path goes on, with one line in the log of "qbench".
    """
    if isinstance(module, QatModule):
        module.fast_path = True


def disable_fast_path(module: nn.Module) -> None:
    """Train by PyTorch's operators again."""
    if isinstance(module, QatModule):
        module.fast_path = False


def training_paths(model: nn.Module) -> TrainingPaths:
    """Which code layers and sums took in their last forward in training: C++, generated, or PyTorch's operators."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, (QatLayer, Sum))}
    wanted = any(layer.fast_path for layer in layers.values())
    return TrainingPaths({name: layer.path for name, layer in layers.items()}, refusals() if wanted else ())


def freeze_bn_stats(module: nn.Module) -> None:
    """Normalise with the running statistics from now on: `model.apply(qbench.freeze_bn_stats)`."""
    if isinstance(module, QatLayer):
        module.bn_frozen = True
        module.train(module.training)


def update_bn_stats(module: nn.Module) -> None:
    """Normalise with the batch's statistics again, in training mode."""
    if isinstance(module, QatLayer):
        module.bn_frozen = False
        module.train(module.training)

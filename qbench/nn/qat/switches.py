"""Switches of QAT layers, for `model.apply`."""

from __future__ import annotations

from torch import nn

from qbench.nn.qat.layer import QatLayer


def enable_low_memory(module: nn.Module) -> None:
    """Save activations and weights for backward as codes: `model.apply(qbench.enable_low_memory)`.

    One byte a value in place of four, and the same gradients, bit for bit. In eager mode on CPUs; elsewhere nothing
    changes.
    """
    if isinstance(module, QatLayer):
        module.low_memory = True


def disable_low_memory(module: nn.Module) -> None:
    """Save activations and weights for backward as they are again."""
    if isinstance(module, QatLayer):
        module.low_memory = False


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

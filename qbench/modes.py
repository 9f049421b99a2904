"""The modes of modules, `module.training`, put back after a block.

Every module has its own: a frozen BatchNorm is in eval inside a model in training, so `model.train(was_training)` is no
way back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import nn


@contextlib.contextmanager
def modes_kept(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Whatever the block does with the modes of these modules, each has its own again afterwards."""
    before = [(module, module.training) for module in modules]
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients inside the block; every module's own mode is put back."""
    with modes_kept(model.modules()), torch.no_grad():
        model.eval()
        yield

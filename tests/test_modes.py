"""Modes of modules are put back one by one, whatever happens in the block."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn

from qbench.modes import evaluating, modes_kept


def mixed() -> nn.Sequential:
    """In training, but for its BatchNorm and the dropout inside its block."""
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Sequential(nn.ReLU(), nn.Dropout(0.9)))
    model[1].eval()
    model[2][1].eval()
    return model


def modes(model: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


@pytest.mark.parametrize("raises", [False, True])
def test_every_module_has_its_own_mode_again(raises: bool) -> None:
    model = mixed()
    before = modes(model)
    with contextlib.suppress(RuntimeError), modes_kept(model.modules()):
        model.train(False)
        model[2].train()
        assert modes(model) != before
        if raises:
            raise RuntimeError
    assert modes(model) == before


@pytest.mark.parametrize("raises", [False, True])
def test_evaluating_is_eval_without_gradients(raises: bool) -> None:
    model, x = mixed(), torch.randn(4, 1, 3, 3)
    before, statistics = modes(model), model[1].running_mean.clone()
    model[1].train()
    before["1"] = True
    with contextlib.suppress(RuntimeError), evaluating(model):
        assert not any(modes(model).values())
        assert not model(x).requires_grad
        if raises:
            raise RuntimeError
    assert modes(model) == before
    assert torch.equal(model[1].running_mean, statistics)
    assert model(x).requires_grad


def test_modules_that_were_not_named_are_left_alone() -> None:
    model = mixed()
    with modes_kept([model[0]]):
        model.eval()
    assert modes(model) == {name: name == "0" for name in modes(model)}

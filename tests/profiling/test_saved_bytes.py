"""Bytes saved for backward: counted once, for whoever saved first, whatever form they are kept in."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import qbench
from qbench.profiling import counting_saved, saved_for_backward

X = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("call", "numbers"),
    [
        (lambda x: x.exp().sum(), 96),  # its result
        (lambda x: (x.exp() * x.exp()).sum(), 2 * 96),
        (lambda x: x.exp().exp().relu().sum(), 3 * 96),
        (lambda x: x.exp().view(-1)[:5].square().sum(), 96),  # a view keeps the whole storage, once
        (lambda x: (x * 2).sum(), 0),
        (lambda x: (x * x).sum(), 0),  # the input is there anyhow
    ],
)
def test_storages_are_counted_once(call: object, numbers: int) -> None:
    x = X.clone().requires_grad_()
    result, found = saved_for_backward(lambda: call(x), x)  # type: ignore[operator]
    assert (result.ndim, found) == (0, 4 * numbers)


def test_what_two_layers_save_is_of_the_first() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1))
    running = ""
    for path, module in model.named_children():

        def enter(module: nn.Module, inputs: tuple[Tensor, ...], path: str = path) -> None:
            nonlocal running
            running = path

        module.register_forward_pre_hook(enter)
    with counting_saved([X, *model.parameters()], lambda: running) as found:
        model(X)
    assert found == {"1": 4 * 2 * 8 * 4 * 4}


def test_codes_of_low_memory_are_counted_where_they_are_kept() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1))
    model = qbench.prepare_qat(qbench.fuse(net), qconfig=qbench.get_qconfig(), example_inputs=(X,))
    model(X)
    owned = [X, *model.parameters(), *model.buffers()]
    _, plain = saved_for_backward(lambda: model(X).sum(), *owned)
    model.apply(qbench.enable_low_memory)
    _, low = saved_for_backward(lambda: model(X).sum(), *owned)
    values = 2 * (3 + 8) * 4 * 4 + 8 * 3 + 8 * 8  # both inputs and weights, a byte each in place of four
    assert 3 * values - 200 < plain - low <= 3 * values

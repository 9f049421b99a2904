"""Quantization of activations that is dropped at random while rounding is learned.

    x̃ᵢ = xᵢ with chance p, x̂ᵢ otherwise        x in float, x̂ on its grid, drawn anew for every value and step

Source: Wei et al., "QDrop: Randomly Dropping Quantization for Extremely Low-bit Post-Training Quantization", ICLR 2022,
arXiv:2203.05740, section 4. It is done to what enters a block and to every activation in it; p = 0.5 in the paper.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from qbench.fake_quantize import FakeQuantize
from qbench.nn.qat.layer import QatLayer


def mixed(exact: Any, quantized: Any, chance: float) -> Any:
    """Two equal trees of inputs as one: each value of a float tensor is that of `exact` with this chance."""
    return tree_map(lambda x, x_hat: _drop(x, x_hat, chance), exact, quantized) if chance else quantized


@contextlib.contextmanager
def dropping(block: nn.Module, chance: float) -> Iterator[None]:
    """Inside the with-block, each value of an activation that `block` quantizes stays float with this chance."""
    with contextlib.ExitStack() as stack:
        for quantizer in _of_activations(block) if chance else ():
            hook = quantizer.register_forward_hook(lambda _, given, out: _drop(given[0], out, chance))
            stack.callback(hook.remove)
        yield


def _of_activations(block: nn.Module) -> set[FakeQuantize]:
    layers = (module for module in block.modules() if isinstance(module, QatLayer))
    weights = {layer.weight_quantizer for layer in layers}
    return {module for module in block.modules() if isinstance(module, FakeQuantize)} - weights


def _drop(x: Any, x_hat: Any, chance: float) -> Any:
    if not isinstance(x_hat, Tensor) or not x_hat.is_floating_point():
        return x_hat
    return torch.where(torch.rand_like(x_hat) < chance, x.to(x_hat.dtype), x_hat)

"""The QAT model in eval: its outputs, and how varied the codes of its modules are."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from qbench.fake_quantize import FakeQuantize
from qbench.numerics.qparams import inside_range, quantize
from qbench.preparation import quantized_modules
from qbench.report.data import CodeSpread

_WIDEST = 16  # bits of codes that are counted one by one


class CodeCounts:
    """The codes that a quantizer gives: a forward hook of it.

    Attributes:
        counts: int64, one per code of the grid, from the lowest.
        saturated: How many values were beyond the range.
        low: Smallest value that came in.
        high: Largest value that came in.
    """

    def __init__(self, quantizer: FakeQuantize) -> None:
        self.counts = torch.zeros(quantizer.spec.qmax - quantizer.spec.qmin + 1, dtype=torch.int64)
        self.saturated = 0
        self.low, self.high = float("inf"), float("-inf")

    def __call__(self, quantizer: FakeQuantize, args: tuple[Tensor, ...], output: Tensor) -> None:
        """Count what one forward gave."""
        qparams, given = quantizer.snapshot(), args[0]
        codes = quantize(output, qparams).flatten().long() - qparams.qmin
        self.counts += torch.bincount(codes, minlength=self.counts.numel())
        self.saturated += int((~inside_range(given, qparams)).sum())
        self.low, self.high = min(self.low, float(given.min())), max(self.high, float(given.max()))

    def spread(self, name: str) -> CodeSpread:
        """How varied they are."""
        return CodeSpread(name, int(self.counts.sum()), int((self.counts > 0).sum()), self.saturated)


@contextlib.contextmanager
def counting_codes(model: nn.Module) -> Iterator[dict[str, CodeCounts]]:
    """Count the output codes of every quantized module that is called inside the block, by its path."""
    with contextlib.ExitStack() as stack:
        found: dict[str, CodeCounts] = {}
        for path, module in quantized_modules(model):
            quantizer = module.output_quantizer
            if quantizer is not None and quantizer.spec.bits <= _WIDEST:
                counts = CodeCounts(quantizer)
                stack.callback(quantizer.register_forward_hook(_noting(found, path, counts)).remove)
        yield found


def _noting(found: dict[str, CodeCounts], path: str, counts: CodeCounts) -> Callable[..., None]:
    def hook(*call: Any) -> None:
        found.setdefault(path, counts)(*call)

    return hook


def outputs_of(model: nn.Module, batch: tuple[Tensor, ...]) -> list[np.ndarray]:
    """Output tensors of one batch, in the order in which a program returns them."""
    leaves = pytree.tree_leaves(model(*batch))
    return [leaf.detach().numpy().copy() for leaf in leaves if isinstance(leaf, Tensor)]

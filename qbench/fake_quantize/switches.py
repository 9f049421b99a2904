"""Switches to hand to `model.apply`: each acts on the quantizers and leaves every other module alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

from torch import nn

from qbench.fake_quantize.base import FakeQuantize


def disable_observer(module: nn.Module) -> None:
    """Stop moving the range: `model.apply(qbench.disable_observer)`."""
    if isinstance(module, FakeQuantize):
        module.observer_enabled = False


def enable_observer(module: nn.Module) -> None:
    """Move the range again in training mode."""
    if isinstance(module, FakeQuantize):
        module.observer_enabled = True


def disable_fake_quant(module: nn.Module) -> None:
    """Pass values on in float (the range is still observed); a layer whose input is float has no bias error."""
    if isinstance(module, FakeQuantize):
        module.fake_quant_enabled = False


def enable_fake_quant(module: nn.Module) -> None:
    """Put values on the grid again."""
    if isinstance(module, FakeQuantize):
        module.fake_quant_enabled = True


@contextlib.contextmanager
def switched_off(quantizers: Iterable[FakeQuantize]) -> Iterator[None]:
    """Fake-quant of these quantizers is off inside the block; the switches are put back."""
    before = [(quantizer, quantizer.fake_quant_enabled) for quantizer in quantizers]
    try:
        for quantizer, _ in before:
            quantizer.fake_quant_enabled = False
        yield
    finally:
        for quantizer, enabled in before:
            quantizer.fake_quant_enabled = enabled

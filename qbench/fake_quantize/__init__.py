"""Quantizers: one file per idea, one base, and the switches for `model.apply`."""

from qbench.fake_quantize.base import FakeQuantize
from qbench.fake_quantize.bias import BiasQuantizer
from qbench.fake_quantize.switches import (
    disable_fake_quant,
    disable_observer,
    enable_fake_quant,
    enable_observer,
)

__all__ = [
    "BiasQuantizer",
    "FakeQuantize",
    "disable_fake_quant",
    "disable_observer",
    "enable_fake_quant",
    "enable_observer",
]

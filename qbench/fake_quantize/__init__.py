"""Quantizers: one file per idea, one base, and the switches for `model.apply`."""

from qbench.fake_quantize.base import FakeQuantize
from qbench.fake_quantize.bias import BiasQuantizer
from qbench.fake_quantize.dorefa import DoReFaActivation, DoReFaWeight
from qbench.fake_quantize.dsq import DSQ
from qbench.fake_quantize.learned import LearnedFakeQuantize
from qbench.fake_quantize.lsq import LSQ
from qbench.fake_quantize.lsq_plus import LSQPlus
from qbench.fake_quantize.methods import METHODS, Method, check_role, find_method, find_method_of
from qbench.fake_quantize.pact import PACT
from qbench.fake_quantize.switches import (
    disable_fake_quant,
    disable_observer,
    enable_fake_quant,
    enable_observer,
)
from qbench.fake_quantize.tqt import TQT

__all__ = [
    "DSQ",
    "LSQ",
    "METHODS",
    "PACT",
    "TQT",
    "BiasQuantizer",
    "DoReFaActivation",
    "DoReFaWeight",
    "FakeQuantize",
    "LSQPlus",
    "LearnedFakeQuantize",
    "Method",
    "check_role",
    "disable_fake_quant",
    "disable_observer",
    "enable_fake_quant",
    "enable_observer",
    "find_method",
    "find_method_of",
]

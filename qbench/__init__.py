"""qbench: quantization-aware training of CNNs whose trained codes are the deployed codes."""

import importlib
from typing import TYPE_CHECKING, Any

from qbench import errors, nn, targets
from qbench.attention import attention_report, explicit_attention
from qbench.coverage import quantization_coverage
from qbench.fake_quantize import disable_fake_quant, disable_observer, enable_fake_quant, enable_observer
from qbench.fake_quantize.bias import BiasSpec
from qbench.fusion import fuse, fuse_modules
from qbench.mappings import register_pattern
from qbench.nn.qat import (
    disable_fast_path,
    disable_low_memory,
    enable_fast_path,
    enable_low_memory,
    freeze_bn_stats,
    training_paths,
    update_bn_stats,
)
from qbench.numerics.qparams import QParams, QSpec
from qbench.overrides import Override
from qbench.preparation import preparation_report, prepare_qat
from qbench.qconfig import QConfig, QuantizerConfig, get_qconfig

if TYPE_CHECKING:
    from qbench import export, passes, ptq
    from qbench.checkpoints import load_qat_checkpoint
    from qbench.conversion import conversion_report, convert
    from qbench.evaluation import integer_model
    from qbench.export.program import load_program
    from qbench.one_call import prepare_by_target
    from qbench.profiling import profile_qat
    from qbench.torch_ao import translate_qconfig
    from qbench.verification import verify

__version__ = "0.1.0"

__all__ = [
    "BiasSpec",
    "Override",
    "QConfig",
    "QParams",
    "QSpec",
    "QuantizerConfig",
    "attention_report",
    "conversion_report",
    "convert",
    "disable_fake_quant",
    "disable_fast_path",
    "disable_low_memory",
    "disable_observer",
    "enable_fake_quant",
    "enable_fast_path",
    "enable_low_memory",
    "enable_observer",
    "errors",
    "explicit_attention",
    "export",
    "freeze_bn_stats",
    "fuse",
    "fuse_modules",
    "get_qconfig",
    "integer_model",
    "prepare_by_target",
    "prepare_qat",
    "load_program",
    "load_qat_checkpoint",
    "nn",
    "passes",
    "preparation_report",
    "profile_qat",
    "ptq",
    "quantization_coverage",
    "register_pattern",
    "targets",
    "translate_qconfig",
    "training_paths",
    "update_bn_stats",
    "verify",
]

# What comes before or after training, and not in every program: imported when it is first named.
_LATER = {
    "conversion_report": "qbench.conversion",
    "convert": "qbench.conversion",
    "export": "qbench.export",
    "integer_model": "qbench.evaluation",
    "load_program": "qbench.export.program",
    "load_qat_checkpoint": "qbench.checkpoints",
    "passes": "qbench.passes",
    "prepare_by_target": "qbench.one_call",
    "profile_qat": "qbench.profiling",
    "ptq": "qbench.ptq",
    "translate_qconfig": "qbench.torch_ao",
    "verify": "qbench.verification",
}


def __getattr__(name: str) -> Any:
    own = f"{__name__}.{name}"
    if any(place == own or place.startswith(f"{own}.") for place in _LATER.values()):
        return importlib.import_module(own)
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(importlib.import_module(_LATER[name]), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})

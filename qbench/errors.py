"""Errors and warnings of qbench.

Every message says what was given, what was expected and the call that works, and names the module path where there is
one. All errors derive from `QBenchError`; the kinds below say which step of the flow found the fault.
"""

from __future__ import annotations

import importlib
from types import ModuleType


class QBenchError(Exception):
    """Base of every error that qbench raises on purpose."""


class ConfigError(QBenchError, ValueError):
    """A QSpec, QConfig, target name or option that cannot be met."""


class NumericsError(QBenchError, ValueError):
    """A tensor whose values or shape cannot be quantized (NaN, infinity, wrong axis, a bias that does not fit)."""


class FusionError(QBenchError, ValueError):
    """Modules that cannot be fused, or a wrapper whose parts do not match."""


class PreparationError(QBenchError, RuntimeError):
    """`prepare_qat` cannot make a QAT module (no qconfig, say)."""


class LinkError(QBenchError, RuntimeError):
    """A layer does not know which quantizer produced its input."""


class ConversionError(QBenchError, RuntimeError):
    """`convert` cannot make a Q/DQ program of this model."""


class PassError(QBenchError, RuntimeError):
    """A pass was given a graph that it cannot read."""


class ExportError(QBenchError, RuntimeError):
    """A program cannot be written for a runtime, or the runtime refuses the file."""


class VerificationError(QBenchError, RuntimeError):
    """Two forms of a model cannot be compared."""


class DataError(QBenchError, ValueError):
    """A data folder, data set name or sample that cannot be read."""


class MissingDependencyError(QBenchError, ImportError):
    """An optional dependency is not installed."""


class QBenchWarning(UserWarning):
    """Something that the user should know and that is also in a returned report."""


def require(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Import an optional dependency.

    Args:
        module: Dotted name to import, `"onnxruntime"`.
        extra: The extra of qbench that installs it, `"onnx"`.
        purpose: What needs it, a phrase that ends the sentence "… is needed to".

    Raises:
        MissingDependencyError: the package is not installed; the message holds the pip command.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        # Only the package itself: a submodule that a present package lacks is a broken install, not a missing one.
        if error.name != module.split(".")[0]:
            raise
        raise MissingDependencyError(
            f"{module.split('.')[0]} is needed to {purpose} and is not installed: pip install 'qbench[{extra}]'"
        ) from error

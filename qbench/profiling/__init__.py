"""Where the time and the memory of a training step go: measured here, shown by `qbench.report.profile`."""

from __future__ import annotations

from qbench.profiling.saved import counting_saved, saved_for_backward
from qbench.profiling.training_step import profile_qat

__all__ = ["counting_saved", "profile_qat", "saved_for_backward"]

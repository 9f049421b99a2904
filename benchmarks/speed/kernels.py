"""The part `kernels`: the exact integer operators that score a model in PyTorch, over its float layers, on ResNet-18.

Each form is a group of layers of `benchmarks/integer_kernels.py`, which also prints them one by one.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from benchmarks import integer_kernels
from benchmarks.speed.rows import Job, Row

TARGET = "onnxruntime"
GROUPS = {
    "convolutions": lambda batch: [integer_kernels.conv_pair(shape, batch, TARGET) for shape in integer_kernels.CONVS],
    "other layers": lambda batch: integer_kernels.other_pairs(batch, TARGET),
    "whole network": lambda batch: [integer_kernels.model_pair(batch, TARGET)],
}


def kernels(job: Job) -> Iterator[Row]:
    """Sums over the layers of a group, in milliseconds, and the median of their ratios."""
    for form in job.forms:
        _, total = integer_kernels.measure(GROUPS[form](job.batch), job.rounds, time.perf_counter)
        yield job.row(form, **total)

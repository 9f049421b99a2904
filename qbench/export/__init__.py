"""From a Q/DQ program to files that integer runtimes run, and the runtimes that run them."""

from __future__ import annotations

from qbench.export.executorch import ExecutorchReport, to_executorch
from qbench.export.onnx import OnnxReport, to_onnx
from qbench.export.processes import run_file, run_program
from qbench.export.program import load_program
from qbench.export.runtimes import RUNTIMES

__all__ = [
    "RUNTIMES",
    "ExecutorchReport",
    "OnnxReport",
    "load_program",
    "run_file",
    "run_program",
    "to_executorch",
    "to_onnx",
]

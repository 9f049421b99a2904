"""Counting what differs between the forms of a model, on the same inputs.

    parameters          weight and bias codes that training used  |  those read back from the saved program
                        (the bias itself where it stays float)
    eval_vs_program     values of the QAT model in eval           |  the saved program, reloaded in a fresh process
    program_vs_RUNTIME  codes of that program's outputs           |  the exported file, run in a fresh process
    integer_vs_RUNTIME  outputs and all codes of activations of   |  the exported file, and the same file with its
                        the integer program for its target        |  codes as further outputs

The sides share no code under test: the QAT model computes with `qbench.numerics`, the program with aten and
`quantized_decomposed` operators, the integer program with `qbench.ops`, a runtime with its own kernels. A zero counts
only where codes are varied, so how varied they were is part of the result.
"""

from __future__ import annotations

from qbench.verification.figures import layer_figures
from qbench.verification.flow import verify, verify_files
from qbench.verification.parameters import compare_parameters, output_grids

__all__ = ["compare_parameters", "layer_figures", "output_grids", "verify", "verify_files"]

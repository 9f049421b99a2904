"""The passes do work in proportion to the graph: lines of code that run are counted, not seconds."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import qbench
from benchmarks.passes_slope import conv_chain
from qbench.graph.cleanup import remove_redundant_qdq
from qbench.passes import quantize_bias

WATCHED = (str(Path(qbench.__file__).parent), str(Path(torch.__file__).parent / "export"))


def lines_run(work: Callable[[Any], object], program: Any) -> int:
    """Lines that run in this package and in torch.export; each turn of a loop or comprehension is one at least."""
    count = 0

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal count
        count += event == "line"
        return trace if frame.f_code.co_filename.startswith(WATCHED) else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work(program)
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("work", [remove_redundant_qdq, quantize_bias])
def test_work_grows_with_the_graph_and_not_with_its_square(work: Callable[[Any], object]) -> None:
    work(conv_chain(5))  # caches and operators
    counts = [lines_run(work, conv_chain(layers)) for layers in (20, 40, 80)]
    first, second = counts[1] - counts[0], counts[2] - counts[1]
    # A walk over every node for each of 80 layers would add thousands of lines.
    assert first > 20 * 20 and abs(second - 2 * first) < 0.01 * second, counts


def test_the_chain_is_a_program_that_runs() -> None:
    program = conv_chain(3)
    x = torch.randn(1, 4, 8, 8)
    before = program.module()(x)
    assert remove_redundant_qdq(program) == 6
    report = quantize_bias(program)
    assert len(report.quantized) == 3 and not report.refused
    after = program.module()(x)
    assert before.unique().numel() > 50
    assert ((before - after).abs() > 0.0101).float().mean() < 0.01  # no code moves by more than one step

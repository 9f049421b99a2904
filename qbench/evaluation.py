"""Scoring with deployed arithmetic: a QAT model's integer program as a module that takes and gives floats.

    QAT eval       float sums of values on grids, rounded once a layer        differs from hardware in some codes
    this           int32 sums, rescaled as the target does                    the target's codes, every one

docs/integer.md says by how much the two differ, and when.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from qbench import targets
from qbench.conversion import convert
from qbench.errors import ConfigError, ConversionError
from qbench.passes import FusionReport, fuse_qdq

_BATCH = "batch"


class IntegerModel(nn.Module):
    """The integer form of a QAT model as it was when this was made; training on does not change it.

    Attributes:
        program: The integer program (`torch.export.ExportedProgram`).
        report: What `fuse_qdq` fused and what stays in float.
    """

    def __init__(self, program: torch.export.ExportedProgram, report: FusionReport) -> None:
        super().__init__()
        self.program = program
        self.report = report
        self.run = program.module()

    @torch.no_grad()
    def forward(self, *inputs: Any) -> Any:
        """The model's inputs and outputs: float tensors, of any batch size if its graph allows one."""
        return self.run(*inputs)

    def train(self, mode: bool = True) -> IntegerModel:
        """Only `train(False)` means something: the deployed form does not train.

        Raises:
            ConfigError: `mode` is true.
        """
        if mode:
            raise ConfigError(
                "an integer model does not train: train the QAT model and make a new one, qbench.integer_model(model, "
                "example_inputs)"
            )
        return self

    def __repr__(self) -> str:
        return f"IntegerModel({self.report})"


def integer_model(
    model: nn.Module,
    example_inputs: tuple[Any, ...],
    *,
    target: str | targets.Target | None = None,
    dynamic_shapes: Any = _BATCH,
) -> IntegerModel:
    """A prepared model in the arithmetic of its target: `convert`, `quantize_bias` and `fuse_qdq` in one call.

    Args:
        model: A prepared model whose quantizers have seen data, in any mode; it is not changed.
        example_inputs: One tuple of inputs.
        target: Whose arithmetic; the default is that of the qconfig.
        dynamic_shapes: As for `torch.export.export`; by default the first dim of every tensor may change.

    Returns:
        A module for evaluation. What it computes in float, and why, is in its `report`.

    Raises:
        ConversionError, LinkError, NumericsError: see `qbench.convert`.
        ConfigError: the target has no stated arithmetic.
    """
    if not isinstance(example_inputs, tuple):
        raise ConfigError(
            f"integer_model: example_inputs is {type(example_inputs).__name__}, expected a tuple: integer_model(model, "
            "(x,))"
        )
    if isinstance(dynamic_shapes, str) and dynamic_shapes == _BATCH:
        program = _with_any_batch(model, example_inputs, target)
    else:
        program = convert(model, example_inputs, target=target, dynamic_shapes=dynamic_shapes)
    report = fuse_qdq(program, target=target)
    return IntegerModel(program, report)


def _with_any_batch(
    model: nn.Module, example_inputs: tuple[Any, ...], target: str | targets.Target | None
) -> torch.export.ExportedProgram:
    """Export with a batch that may change, or with a fixed one where the model fixes it."""
    # A batch of one would be taken for a constant.
    doubled = pytree.tree_map(lambda x: torch.cat([x, x]) if _is_batch(x) and len(x) == 1 else x, example_inputs)
    shapes = pytree.tree_map(lambda x: {0: torch.export.Dim.AUTO} if _is_batch(x) else None, example_inputs)
    try:
        return convert(model, doubled, target=target, dynamic_shapes=shapes)
    except ConversionError:
        return convert(model, example_inputs, target=target)


def _is_batch(value: object) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0

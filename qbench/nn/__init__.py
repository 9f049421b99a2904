"""Float modules for functional operations, fixed BatchNorms; wrappers, QAT and deployed forms in the packages below."""

from qbench.nn.frozen import FrozenBatchNorm1d, FrozenBatchNorm2d, FrozenBatchNorm3d
from qbench.nn.ops import (
    Add,
    AddReLU,
    Cat,
    Clamp,
    Div,
    Interpolate,
    MatMul,
    Mean,
    Mul,
    NormalizeGroups,
    NormalizeLayer,
    Stack,
    Sub,
)

__all__ = [
    "Add",
    "AddReLU",
    "Cat",
    "Clamp",
    "Div",
    "FrozenBatchNorm1d",
    "FrozenBatchNorm2d",
    "FrozenBatchNorm3d",
    "Interpolate",
    "MatMul",
    "Mean",
    "Mul",
    "NormalizeGroups",
    "NormalizeLayer",
    "Stack",
    "Sub",
]

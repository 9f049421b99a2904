"""Float modules for functional operations, fixed BatchNorms; wrappers, QAT and deployed forms in the packages below."""

from qbench.nn.frozen import FrozenBatchNorm1d, FrozenBatchNorm2d, FrozenBatchNorm3d
from qbench.nn.ops import Add, AddReLU, Cat, Mean, Mul, Sub

__all__ = [
    "Add",
    "AddReLU",
    "Cat",
    "FrozenBatchNorm1d",
    "FrozenBatchNorm2d",
    "FrozenBatchNorm3d",
    "Mean",
    "Mul",
    "Sub",
]

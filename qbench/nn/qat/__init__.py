"""QAT forms of standalone layers and operations, each with `from_float` and `to_float`."""

from qbench.nn.qat.body import ParameterCodes, QatLayer, QatModule, QatOp, freeze_bn_stats, update_bn_stats
from qbench.nn.qat.layers import (
    AdaptiveAvgPool2d,
    Add,
    AddReLU,
    AvgPool2d,
    Cat,
    Conv1d,
    Conv2d,
    Conv3d,
    ConvTranspose2d,
    Linear,
    Mul,
)

__all__ = [
    "AdaptiveAvgPool2d",
    "Add",
    "AddReLU",
    "AvgPool2d",
    "Cat",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose2d",
    "Linear",
    "Mul",
    "ParameterCodes",
    "QatLayer",
    "QatModule",
    "QatOp",
    "freeze_bn_stats",
    "update_bn_stats",
]

"""QAT forms of the float wrappers, each with `from_float` and `to_float`."""

from qbench.nn.intrinsic.qat.modules import (
    ConvBn1d,
    ConvBn2d,
    ConvBn3d,
    ConvBnReLU1d,
    ConvBnReLU2d,
    ConvBnReLU3d,
    ConvReLU1d,
    ConvReLU2d,
    ConvReLU3d,
    ConvTransposeBn2d,
    ConvTransposeBnReLU2d,
    LinearBn1d,
    LinearBnReLU1d,
    LinearReLU,
)

__all__ = [
    "ConvBn1d",
    "ConvBn2d",
    "ConvBn3d",
    "ConvBnReLU1d",
    "ConvBnReLU2d",
    "ConvBnReLU3d",
    "ConvReLU1d",
    "ConvReLU2d",
    "ConvReLU3d",
    "ConvTransposeBn2d",
    "ConvTransposeBnReLU2d",
    "LinearBn1d",
    "LinearBnReLU1d",
    "LinearReLU",
]

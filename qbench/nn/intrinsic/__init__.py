"""Float wrappers of chains that hardware computes as one op; their QAT forms are in `qbench.nn.intrinsic.qat`."""

from qbench.nn.intrinsic.fused import Fused
from qbench.nn.intrinsic.modules import (
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
    "Fused",
    "LinearBn1d",
    "LinearBnReLU1d",
    "LinearReLU",
]

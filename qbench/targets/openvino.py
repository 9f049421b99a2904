"""OpenVINO on Intel CPUs, as NNCF prepares models for it."""

from qbench.numerics.qparams import QSpec
from qbench.targets.base import Target

_CPU = "openvinotoolkit/nncf nncf/common/hardware/configs/cpu.json"

OPENVINO = Target(
    name="openvino",
    description="OpenVINO (Intel CPU; NNCF's rules)",
    activation=QSpec(bits=8, signed=False, symmetric=False),
    weight=QSpec(bits=8, signed=True, symmetric=True, axis=0, narrow=True),
    bits=(7, 8),
    weight_zero_points=True,
    requantization="float32 multiplier",
    unverified="OpenVINO. The bias is trained on the int32 grid; OpenVINO adds it in floating point, where it has the "
    "same value. On CPUs without VNNI sums of 8-bit products may overflow 16 bits: weight_bits=7 avoids that",
    sources={
        "activation 8 bits per tensor, 256 levels, zero exactly on the grid": "openvinotoolkit/nncf docs/usage/"
        "training_time_compression/other_algorithms/LegacyQuantization.md",
        "weight 8 bits symmetric or asymmetric, per channel or per tensor; 255 levels": f"{_CPU} and the same document",
        "bias in floating point": f"{_CPU}: biases have no quantizer",
        "requantization: the dequantization moves behind the layer": "OpenVINO, ConvolutionTransformation: https://docs.openvino.ai/2024/documentation/openvino-"
        "extensibility/openvino-plugin-library/advanced-guides/low-precision-transformations/step3-main/convolution/"
        "convolution.html",
        "weight of 7 bits against overflow": "openvinotoolkit/nncf, the same document: overflow_fix",
        "cat on one grid": f"{_CPU}: Concat has unified scales",
    },
)

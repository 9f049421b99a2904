"""NVIDIA TensorRT, explicit quantization: ONNX models with QuantizeLinear and DequantizeLinear."""

from qbench.numerics.qparams import QSpec
from qbench.targets.base import Target

TENSORRT = Target(
    name="tensorrt",
    description="NVIDIA TensorRT (QDQ model, GPU)",
    activation=QSpec(bits=8, signed=True, symmetric=True),
    weight=QSpec(bits=8, signed=True, symmetric=True, axis=0, narrow=True),
    shared_ops=(),
    requantization="not public",
    unverified="TensorRT and every GPU. The bias is trained on the int32 grid; TensorRT adds it in floating point, "
    "where it has the same value",
    sources={
        "activation int8 symmetric per tensor, codes in [-128, 127]": "NVIDIA TensorRT documentation, Working with "
        "Quantized Types: https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/"
        "work-quantized-types.html",
        "weight int8 symmetric per channel, codes in [-127, 127]": "ModelTC/MQBench docs/source/user_guide/hardware/"
        "tensorrt.rst",
        "bias in floating point": "ModelTC/MQBench mqbench/prepare_by_platform.py: the backend has no bias quantizer",
        "requantization": "not public",
    },
)

"""Qualcomm SNPE: the Snapdragon Neural Processing Engine, DSP and HTP."""

from qbench.numerics.qparams import QSpec
from qbench.targets.base import Target

SNPE = Target(
    name="snpe",
    description="Qualcomm SNPE (Snapdragon DSP, HTP)",
    activation=QSpec(bits=8, signed=False, symmetric=False),
    weight=QSpec(bits=8, signed=False, symmetric=False),
    bits=(8, 16),
    weight_bits=(8,),
    bias_bits=(8, 32),
    bias_scales=("input_weight", "own"),
    shared_ops=(),
    accumulator_bits=64,
    requantization="not public",
    unverified="the SDK and the hardware. An 8-bit bias has a grid of its own with zero point 0, one of the grids that "
    "the SDK can be given",
    sources={
        "activation 8 or 16 bits, asymmetric per tensor, codes from 0": "ModelTC/MQBench docs/source/user_guide/"
        "hardware/snpe.rst",
        "weight 8 bits, asymmetric per tensor": "the same, and mqbench/prepare_by_platform.py there",
        "bias 8 or 32 bits": "Qualcomm documentation 80-63442-10, Quantized vs Non-Quantized Models: "
        "https://docs.qualcomm.com/bundle/publicresource/80-63442-10/topics/quantized_models.md",
        "zero exactly on the grid": "Qualcomm documentation 80-63442-10, Quantization: "
        "https://docs.qualcomm.com/bundle/publicresource/80-63442-10/topics/quantization.md",
        "requantization": "not public",
    },
)

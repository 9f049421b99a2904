"""AMD Xilinx DPUs through Vitis AI: every scale is a power of two, hardware shifts instead of multiplying."""

from qbench.fake_quantize.bias import BiasSpec
from qbench.numerics.qparams import QSpec
from qbench.numerics.shifts import ShiftLimits
from qbench.targets.base import Target

VITIS = Target(
    name="vitis",
    description="AMD Vitis AI (Xilinx DPU)",
    activation=QSpec(bits=8, signed=True, symmetric=True, power_of_two=True),
    weight=QSpec(bits=8, signed=True, symmetric=True, power_of_two=True),
    bias=BiasSpec(8, "own_pow2"),
    bias_bits=(8,),
    bias_scales=("own_pow2",),
    shared_ops=("Cat", "AvgPool2d", "AdaptiveAvgPool2d"),
    shifts=ShiftLimits(requantize=(0, 16), bias=16, bias_right=16),
    requantization="shift by 0 to 16 bits",
    unverified="the compiler and the DPU. Activations round half to even here, on the DPU half up. Layers outside the "
    "shift limits are named at convert, as the compiler would change their codes; limits of additions, products and "
    "sigmoids are not checked",
    sources={
        "activation, weight and bias 8 bits symmetric per tensor at power-of-two scales": "AMD, Vitis AI User Guide "
        "UG1414: https://docs.amd.com/r/en-US/ug1414-vitis-ai/Quantizing-with-Float-Scale",
        "activation, weight: codes in [-128, 127]": "ModelTC/MQBench docs/source/user_guide/hardware/vitis.rst",
        "requantization and bias shifts, with their limits": "microsoft/Olive olive/passes/onnx/vitis_ai/refine.py: "
        "adjust_shift_cut, adjust_shift_bias",
        "cat and average pools on one grid": "the same file: align_concat, align_pool",
    },
)

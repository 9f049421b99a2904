"""ExecuTorch's Vulkan backend: linear layers with 8- or 4-bit weights, activations in floating point."""

from torch import nn

from qbench.numerics.qparams import QSpec
from qbench.targets.base import Target

VULKAN = Target(
    name="vulkan",
    description="ExecuTorch with the Vulkan delegate (GPU), weight-only",
    activation=None,
    weight=QSpec(bits=8, signed=True, symmetric=True, axis=0, narrow=True),
    bits=(4, 8),
    layers=(nn.Linear,),
    weight_only=True,
    requantization="none",
    unverified="the delegate and every GPU. Codes leave out the lowest one, which the backend would allow",
    sources={
        "activation in float32 or float16": "ExecuTorch documentation, Vulkan backend, Quantization: "
        "https://docs.pytorch.org/executorch/stable/backends/vulkan/vulkan-quantization.html",
        "weight 8 or 4 bits symmetric, per channel or per group, of linear layers only": "the same; pytorch/executorch "
        "backends/vulkan/quantizer/vulkan_quantizer.py",
        "bias in floating point": "pytorch/executorch backends/vulkan/quantizer/vulkan_quantizer.py: bias=None",
        "requantization": "there is none",
    },
)

"""No hardware: the setting of papers, any width, with the first and the last layer at 8 bits."""

from qbench.numerics.qparams import QSpec
from qbench.targets.base import Target

ACADEMIC = Target(
    name="academic",
    description="no hardware: any widths, first and last layer at 8 bits",
    activation=QSpec(bits=4, signed=True, symmetric=False),
    weight=QSpec(bits=4, signed=True, symmetric=True, axis=0, narrow=True),
    bits=tuple(range(2, 17)),
    weight_zero_points=True,
    bias_bits=tuple(range(8, 65)),
    bias_scales=("input_weight", "own", "own_pow2"),
    shared_ops=(),
    accumulator_bits=64,
    first_last_bits=8,
    weight_only=True,
    requantization="none",
    unverified="there is no runtime",
    sources={
        "activation, weight of any width": "ModelTC/MQBench mqbench/prepare_by_platform.py: BackendType.Academic",
        "activation, weight at 8 bits in the first and the last layer": "ModelTC/MQBench mqbench/custom_quantizer/"
        "academic_quantizer.py; Esser et al., Learned Step Size Quantization, 2020, https://arxiv.org/abs/1902.08153",
        "bias": "papers leave it in float; here it is on the int32 grid unless asked otherwise",
        "requantization": "papers have none",
    },
)

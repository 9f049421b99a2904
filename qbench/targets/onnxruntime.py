"""ONNX Runtime, CPU execution provider, QDQ models."""

from qbench.numerics.arithmetic.onnxruntime import ARITHMETIC
from qbench.numerics.qparams import QSpec
from qbench.targets.base import Target

ONNXRUNTIME = Target(
    name="onnxruntime",
    description="ONNX Runtime (QDQ model, CPU)",
    activation=QSpec(bits=8, signed=True, symmetric=False),
    weight=QSpec(bits=8, signed=True, symmetric=True, axis=0, narrow=True),
    bits=(2, 3, 4, 5, 6, 7, 8),
    weight_zero_points=True,
    bias_bits=tuple(range(8, 33)),
    bias_scales=("input_weight", "own", "own_pow2"),
    weight_only=True,
    arithmetic=ARITHMETIC,
    requantization="float32 multiplier, rounded half to even",
    verified="integer program against ONNX Runtime, every code (docs/exactness.md)",
    unverified="execution providers other than the CPU's",
    sources={
        "activation int8 asymmetric behind a float input": "ONNX QuantizeLinear; onnxruntime QDQ selectors: int8 graph "
        "inputs stay float, a float input with QuantizeLinear fuses",
        "weight int8 symmetric per channel": "ONNX QLinearConv: w_zero_point must be 0 per channel for int8 kernels",
        "bias int32 at s_in·s_w": "ONNX QLinearConv specification, input B",
        "requantization": "measured by benchmarks/exactness/ops.py",
        "narrower codes": "stored in int8; the grid has fewer codes, the arithmetic is that of 8 bits",
        "weight-only": "it computes float layers too; qbench.export refuses programs without any quantized activation",
        "cat on one grid": "not needed by ONNX Runtime, which requantizes; kept so that one model serves XNNPACK too",
    },
)

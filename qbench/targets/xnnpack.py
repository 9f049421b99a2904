"""ExecuTorch with the XNNPACK delegate."""

from qbench.numerics.arithmetic.xnnpack import ARITHMETIC
from qbench.numerics.qparams import QSpec
from qbench.targets.base import Target

XNNPACK = Target(
    name="xnnpack",
    description="ExecuTorch with the XNNPACK delegate (CPU)",
    activation=QSpec(bits=8, signed=True, symmetric=False),
    weight=QSpec(bits=8, signed=True, symmetric=True, axis=0, narrow=True),
    bits=(2, 3, 4, 5, 6, 7, 8),
    bias_bits=tuple(range(8, 33)),
    bias_scales=("input_weight", "own", "own_pow2"),
    weight_only=True,
    arithmetic=ARITHMETIC,
    requantization="float32 multiplier, rounded half to even",
    verified="integer program against ExecuTorch's XNNPACK delegate, every code (docs/exactness.md)",
    unverified="processors other than x86-64",
    sources={
        "activation int8 asymmetric": "executorch/backends/xnnpack/quantizer/xnnpack_quantizer.py",
        "weight int8 symmetric per channel": "the same; xnn_datatype_qcint8",
        "bias int32 at s_in·s_w, made by the delegate from a float bias": "executorch/backends/xnnpack/operators: the "
        "partitioner refuses a convolution whose bias is already int32",
        "requantization": "measured by benchmarks/exactness/ops.py",
        "weight-only": "it computes float layers too; qbench.export refuses programs without any quantized activation",
        "cat on one grid": "XNNPACK concatenate: equal qparams, else the file fails at load",
    },
)

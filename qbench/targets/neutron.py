"""NXP eIQ Neutron NPU through ExecuTorch."""

from qbench.numerics.qparams import QSpec
from qbench.targets.base import PROBABILITIES, FixedOutput, Target

NEUTRON = Target(
    name="neutron",
    description="NXP eIQ Neutron NPU (ExecuTorch backend, int32 bias pass)",
    activation=QSpec(bits=8, signed=True, symmetric=False),
    weight=QSpec(bits=8, signed=True, symmetric=True, axis=0, narrow=True),
    fixed_outputs=(
        FixedOutput(("Sigmoid", *PROBABILITIES), 1 / 256, -128),
        FixedOutput(("Tanh",), 1 / 128, 0),
    ),
    symmetric_bias=True,
    requantization="not public",
    unverified="NXP's converter and the NPU",
    sources={
        "activation int8 affine per tensor": "executorch/backends/nxp/quantizer/neutron_quantizer.py",
        "weight int8 symmetric in [-127, 127]": "the same",
        "bias int32 without the lowest code, added by a pass before lowering": "executorch/backends/nxp: the bias pass "
        "runs with symmetric_quant=True; its converter fails on a convolution without a quantized bias",
        "fixed outputs": "executorch/backends/nxp/quantizer/patterns.py: SigmoidPattern, SoftMaxPattern, TanhPattern",
        "requantization": "not public",
    },
)

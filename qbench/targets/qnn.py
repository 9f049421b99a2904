"""Qualcomm AI Engine Direct (QNN), as ExecuTorch's backend prepares models for it."""

from qbench.numerics.qparams import QSpec
from qbench.targets.base import FixedOutput, Target

QNN = Target(
    name="qnn",
    description="Qualcomm AI Engine Direct, QNN (HTP)",
    activation=QSpec(bits=8, signed=False, symmetric=False),
    weight=QSpec(bits=8, signed=True, symmetric=True, axis=0, narrow=True),
    bits=(8, 16),
    weight_bits=(4, 8),
    bias_bits=(8, 32),
    bias_scales=("input_weight", "own"),
    fixed_outputs=(
        FixedOutput(("Sigmoid", "Hardsigmoid"), 1 / 256, 0),
        FixedOutput(("Sigmoid", "Hardsigmoid"), 1 / 65536, 0, bits=16),
        FixedOutput(("Tanh",), 1 / 32768, 32768, bits=16),
    ),
    accumulator_bits=64,
    requantization="not public",
    unverified="the SDK, ExecuTorch's lowering to it and the hardware",
    sources={
        "activation uint8 or uint16 affine per tensor": "pytorch/executorch backends/qualcomm/quantizer/qconfig.py: "
        "get_8a8w_qnn_ptq_config, get_16a4w_qnn_ptq_config",
        "weight int8 in [-127, 127] or int4 in [-7, 7], symmetric, per channel": "the same file",
        "bias int32 at s_in·s_w where weights are per channel": "the same file: _derived_bias_quant_spec",
        "bias 8 bits at a scale of its own": "Qualcomm documentation 80-63442-10, Quantized vs Non-Quantized Models: "
        "https://docs.qualcomm.com/bundle/publicresource/80-63442-10/topics/quantized_models.md",
        "requantization": "not public",
        "fixed outputs": "pytorch/executorch backends/qualcomm/quantizer/annotators/htp_rules.py: Sigmoid, "
        "HardSigmoid, Tanh",
        "cat on one grid": "pytorch/executorch backends/qualcomm/quantizer/observers/concat_observer.py",
    },
)

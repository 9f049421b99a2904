"""Fixed-point hardware that runs TOSA: Arm Ethos-U and the like."""

from qbench.numerics.arithmetic.fixed_point import ARITHMETIC
from qbench.numerics.qparams import QSpec
from qbench.targets.base import Target

TOSA = Target(
    name="tosa",
    description="TOSA (fixed-point NPUs, Arm Ethos-U through ExecuTorch)",
    activation=QSpec(bits=8, signed=True, symmetric=False),
    weight=QSpec(bits=8, signed=True, symmetric=True, axis=0, narrow=True),
    arithmetic=ARITHMETIC,
    requantization="fixed-point multiplier and shift",
    verified="integer arithmetic against the TOSA reference model (docs/integer.md)",
    unverified="hardware",
    annotation={"_arm_annotation_info": {"quantized": True}},
    sources={
        "activation int8 asymmetric, weight int8 symmetric": "TOSA specification, CONV2D: weight zero point is 0",
        "bias int32 at s_in·s_w": "the same, input `bias`, int32 for int8 inputs",
        "requantization by multiplier and shift": "TOSA specification, RESCALE: apply_scale_32",
    },
)

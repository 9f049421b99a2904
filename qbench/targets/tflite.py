"""LiteRT (TensorFlow Lite): int8, and int8 weights under int16 activations."""

import dataclasses

from qbench.fake_quantize.bias import BiasSpec
from qbench.numerics.qparams import QSpec
from qbench.targets.base import PROBABILITIES, FixedOutput, Target

_SPECIFICATION = "tensorflow/tensorflow tensorflow/lite/g3doc/performance/quantization_spec.md"
_KERNELS = "tensorflow/tensorflow tensorflow/lite/kernels/conv.cc, depthwise_conv.cc, fully_connected.cc"
_ACTIVATIONS = "tensorflow/tensorflow tensorflow/lite/kernels/activations.cc"
_MULTIPLIER = "tensorflow/tensorflow tensorflow/lite/kernels/internal/common.h: MultiplyByQuantizedMultiplier"

TFLITE = Target(
    name="tflite",
    description="LiteRT, TensorFlow Lite (int8)",
    activation=QSpec(bits=8, signed=True, symmetric=False),
    weight=QSpec(bits=8, signed=True, symmetric=True, axis=0, narrow=True),
    shared_ops=("Cat", "AvgPool2d"),
    fixed_outputs=(
        FixedOutput(("Sigmoid", *PROBABILITIES), 1 / 256, -128),
        FixedOutput(("Tanh", "Normalize"), 1 / 128, 0),
        FixedOutput(("LogSoftmax",), 16 / 256, 127),
    ),
    requantization="fixed-point multiplier and shift",
    unverified="LiteRT, whose rounding depends on the build. Older versions take a linear layer's weight per tensor "
    "only",
    sources={
        "activation int8 asymmetric in [-128, 127]": _SPECIFICATION,
        "weight int8 symmetric in [-127, 127], per channel": _SPECIFICATION,
        "bias int32 at s_in·s_w, zero point 0": _SPECIFICATION,
        "requantization": _MULTIPLIER,
        "cat and average pools on one grid": f"{_SPECIFICATION}: CONCATENATION, AVERAGE_POOL_2D",
        "fixed outputs": f"{_SPECIFICATION}: LOGISTIC, SOFTMAX, TANH, L2_NORMALIZATION, LOG_SOFTMAX",
    },
)

TFLITE_16X8 = dataclasses.replace(
    TFLITE,
    name="tflite_16x8",
    description="LiteRT, TensorFlow Lite (int8 weights, int16 activations)",
    activation=QSpec(bits=16, signed=True, symmetric=True),
    bits=(16,),
    weight_bits=(8,),
    bias=BiasSpec(64),
    bias_bits=(64,),
    fixed_outputs=(FixedOutput(("Sigmoid", "Tanh", *PROBABILITIES), 1 / 32768, 0, bits=16),),
    accumulator_bits=64,
    unverified="LiteRT. passes.quantize_bias stores int32: a bias beyond it saturates there and is reported; "
    "ParameterCodes has the int64 codes",
    sources={
        "activation int16 symmetric": f"{_KERNELS}: int16 needs zero points of 0; https://ai.google.dev/edge/litert/models/"
        "post_training_integer_quant_16x8",
        "weight int8 symmetric in [-127, 127], per channel": f"{_SPECIFICATION}; {_KERNELS}",
        "bias int64 at s_in·s_w, zero point 0": f"{_KERNELS}: int16 inputs need an int64 bias",
        "fixed outputs": f"{_ACTIVATIONS}: TanhPrepare, SigmoidPrepare, SoftmaxPrepare",
        "requantization": _MULTIPLIER,
        "cat and average pools on one grid": f"{_SPECIFICATION}: CONCATENATION, AVERAGE_POOL_2D",
    },
)

"""Espressif ESP-DL: ESP32-S3 and ESP32-P4, every scale a power of two."""

import dataclasses

from qbench.fake_quantize.bias import BiasSpec
from qbench.numerics.qparams import QSpec
from qbench.targets.base import Target

_QUANTIZER = "espressif/esp-ppq esp_ppq/quantization/quantizer/EspdlQuantizer.py"
_BIAS = "espressif/esp-ppq esp_ppq/quantization/optim/parameters.py: s_b = s_in·s_w"

ESP_DL = Target(
    name="esp_dl",
    description="Espressif ESP-DL (ESP32-S3; 32-bit biases: chips without vector unit)",
    activation=QSpec(bits=8, signed=True, symmetric=True, power_of_two=True),
    weight=QSpec(bits=8, signed=True, symmetric=True, power_of_two=True),
    bias=BiasSpec(20),
    bias_bits=(20, 32),
    requantization="shift, rounded half up",
    unverified="ESP-DL and the chips. Activations round half to even here; ESP32-S3 rounds half up. Its int8 lanes "
    "accumulate in 20 bits: conversion_report shows how large a layer's accumulator can get",
    sources={
        "activation int8 symmetric per tensor at power-of-two scales": f"{_QUANTIZER}; espressif/esp-dl docs/en/"
        "quantization_specification.md",
        "weight int8 symmetric per tensor at power-of-two scales": _QUANTIZER,
        "bias 20 bits on ESP32-S3, 32 bits in the C implementation": f"{_QUANTIZER}: _PLATFORM_CONFIGS; {_BIAS}",
        "requantization rounds half up": f"{_QUANTIZER}: RoundingPolicy.ROUND_HALF_UP",
        "20 bits for each of 16 lanes": "Espressif, ESP32-S3 Technical Reference Manual: registers QACC_H, QACC_L",
    },
)

ESP_DL_P4 = dataclasses.replace(
    ESP_DL,
    name="esp_dl_p4",
    description="Espressif ESP-DL (ESP32-P4)",
    weight=QSpec(bits=8, signed=True, symmetric=True, axis=0, power_of_two=True),
    bias=BiasSpec(),
    bias_bits=(32,),
    requantization="shift, rounded half to even",
    unverified="ESP-DL and the chip",
    sources={
        "activation int8 symmetric per tensor at power-of-two scales": _QUANTIZER,
        "weight int8 symmetric per channel at power-of-two scales": f"{_QUANTIZER}: _PER_CHANNEL_POLICY",
        "bias 32 bits": f"{_QUANTIZER}: _PLATFORM_CONFIGS; {_BIAS}",
        "requantization rounds half to even": f"{_QUANTIZER}: RoundingPolicy.ROUND_HALF_EVEN",
    },
)

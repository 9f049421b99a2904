"""The float32 kernels that XNNPACK runs on x64 CPUs with FMA, step by step and with the same bits.

    hardswish      x · clamp(fma(x, 1/6, 1/2), 0, 1)
    sigmoid        e / (e + 1) of e = exp(−|x|) in five terms;  1 − that for x ≥ 0
    tanh, gelu     a rational function P(x)/Q(x) of erf or tanh on a clamped range, by Horner's rule

The coefficients are those of XNNPACK's kernels (github.com/google/XNNPACK: f32-vhswish, f32-vsigmoid/avx2-rr1-p5,
f32-vtanh/rational-9-8, f32-vgelu/rational-12-10). CPUs with AVX-512 get another kernel for sigmoid; there, and without
FMA, the last bit may differ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from qbench.numerics.arithmetic.float_steps import float32, fma, horner


def hardswish(x: Tensor) -> Tensor:
    """`x · clamp(x/6 + 1/2, 0, 1)`."""
    return fma(x, float32(1 / 6), 0.5).clamp(0.0, 1.0) * x


_MAGIC = float.fromhex("0x1.8000FEp23")  # Adding it leaves round(x) + 127 in the low bits.
_LOG2_E = float.fromhex("0x1.715476p0")
_LN_2 = float.fromhex("0x1.62E43p-1")
_EXP = tuple(map(float.fromhex, ("0x1.0F9F9Cp-7", "0x1.573A1Ap-5", "0x1.555A80p-3", "0x1.FFFDC6p-2", "0x1.FFFFF6p-1")))
_SIGMOID_CUTOFF = float.fromhex("-0x1.5D589Ep6")


def sigmoid(x: Tensor) -> Tensor:
    """`exp(−|x|) / (exp(−|x|) + 1)`, mirrored, with `exp(z) = 2^n · exp(z − n·ln 2)`."""
    z = -x.abs()
    shifted = fma(z, _LOG2_E, _MAGIC)
    power = (shifted.view(torch.int32) << 23).view(torch.float32)  # 2^n
    t = fma(shifted - _MAGIC, -_LN_2, z)
    e = fma(t * power, horner(t, _EXP), power)
    value = torch.where(z < _SIGMOID_CUTOFF, 0.0, e / (e + 1.0))
    return torch.where(torch.signbit(x), value, 1.0 - value)


_TANH_MAX = 7.9807181358
_TANH_P = (1.4248920266e-08, 2.1235626264e-05, 3.5330520477e-03, 1.3412411511e-01, 1.0)
_TANH_Q = (8.1365948290e-07, 3.3472978976e-04, 2.6018999517e-02, 4.6745735407e-01, 1.0)


def tanh(x: Tensor) -> Tensor:
    """The rational function of degrees 9 and 8."""
    x = x.clamp(-_TANH_MAX, _TANH_MAX)
    return (x * horner(x * x, _TANH_P)) / horner(x * x, _TANH_Q)


_ERF_MAX = 5.1638283730
_ERF_P = (4.5835321316e-08, 1.2609783880e-05, 3.2973114867e-04, 9.3065137044e-03, 6.6972173750e-02, 7.9788452387e-01)
_ERF_Q = (1.1988805682e-06, 7.2267655923e-05, 1.8622842617e-03, 2.8431978077e-02, 2.5060352683e-01, 1.0)


def gelu(x: Tensor) -> Tensor:
    """`x/2 · (erf(x/√2) + 1)`, erf as a rational function of degrees 11 and 10."""
    capped = x.clamp(-_ERF_MAX, _ERF_MAX)
    square = capped * capped
    erf = (capped * horner(square, _ERF_P)) / horner(square, _ERF_Q)
    return (x * 0.5) * (erf + 1.0)


#: Function -> (float32 x, its parameters) -> float32.
STEPS: dict[str, Callable[[Tensor, Sequence[float]], Tensor]] = {
    "relu6": lambda x, parameters: F.relu6(x),
    "hardswish": lambda x, parameters: hardswish(x),
    "hardsigmoid": lambda x, parameters: F.hardsigmoid(x),
    "sigmoid": lambda x, parameters: sigmoid(x),
    "silu": lambda x, parameters: x * sigmoid(x),
    "gelu": lambda x, parameters: gelu(x),
    "tanh": lambda x, parameters: tanh(x),
    "leaky_relu": lambda x, parameters: F.leaky_relu(x, parameters[0]),
}

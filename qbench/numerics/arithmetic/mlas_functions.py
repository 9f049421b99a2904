"""Functions of one value with the float32 steps of ONNX Runtime's x64 kernels (AVX2 with FMA).

All start from `x` float32 and are float32 throughout; `·` and `+` round, `fma` rounds once.

    logistic     p(v²)·v / q(v²) + 0.5      v = clamp(x, ±18), p and q Horner by fma, never below 0
    tanh         p(v²)·v / q(v²)            v = clamp(x, ±9)
    erf          |x| < 0.921875: fma(p(x²), |x|, |x|)      else 1 − exp(−fma(p(|x|), |x|, |x|)), the sign of x
    hardsigmoid  clamp(f32(1/6)·x + 0.5, 0, 1)
    hardswish    x · hardsigmoid(x)
    silu         x · logistic(x)
    gelu         x · (0.5 · (erf(x / f32(√2)) + 1))                 the order of torch.onnx at opset 19
    gelu_tanh    x · (0.5 · (tanh(f32(√(2/π)) · (x + f32(0.044715)·x³)) + 1))
    leaky_relu   x, or f32(slope)·x below 0

The coefficients are those of Eigen's rational approximations (logistic, tanh) and of the split erf that MLAS states as
its constants. Every function equals ONNX Runtime's own on every one of millions of floats, wherever they stand in the
buffer; `benchmarks/exactness/onnxruntime_ops.py` counts it, for the one Gelu op of opset 20 and later too. `to_onnx`
writes GELU by tanh out in these steps, because that op's own gave 9 other codes of 1,015,808.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from qbench.numerics.arithmetic.float_steps import float32, fma, horner

_LOGISTIC_P = (
    4.37031012579801e-11,
    1.15627324459942e-07,
    6.08574864600143e-05,
    8.51377133304701e-03,
    0.248287947061529,
)
_LOGISTIC_Q = (
    6.10247389755681e-13,
    5.76102136993427e-09,
    6.29106785017040e-06,
    1.70198817374094e-03,
    0.116817656904453,
    0.993151921023180,
)
_TANH_P = (
    -2.76076847742355e-16,
    2.00018790482477e-13,
    -8.60467152213735e-11,
    5.12229709037114e-08,
    1.48572235717979e-05,
    6.37261928875436e-04,
    4.89352455891786e-03,
)
_TANH_Q = (1.19825839466702e-06, 1.18534705686654e-04, 2.26843463243900e-03, 4.89352518554385e-03)

_ERF_SPLIT, _ERF_END = 0.921875, 3.925
_ERF_SMALL = (-5.99104969e-4, 4.99339588e-3, -2.67667342e-2, 1.12818025e-1, -3.76124859e-1, 1.28379151e-1)
_ERF_BIG = (
    1.72948930e-5,
    -3.83208680e-4,
    3.88393435e-3,
    -2.42545605e-2,
    1.06777847e-1,
    6.34846687e-1,
    1.28717512e-1,
)
# exp(f) on |f| <= log(2)/2; log(2) in two parts, the second what the first lacks.
_EXP = (1.38319808e-3, 8.37550033e-3, 4.16689515e-2, 1.66664466e-1, 4.99999851e-1, 1.0, 1.0)
_LOG2_HIGH, _LOG2_LOW = -6.93145752e-1, -1.42860677e-6
# 1.5 · 2^23: a float32 that large has no fraction, so adding and subtracting it rounds to an integer.
_ROUNDS = 1.5 * 2.0**23


def logistic(x: Tensor) -> Tensor:
    """Sigmoid, any shape; float32."""
    clamped = x.clamp(-18.0, 18.0)
    squared = clamped * clamped
    return (horner(squared, _LOGISTIC_P) * clamped / horner(squared, _LOGISTIC_Q) + 0.5).clamp(min=0.0)


def tanh(x: Tensor) -> Tensor:
    """Hyperbolic tangent, any shape; float32."""
    clamped = x.clamp(-9.0, 9.0)
    squared = clamped * clamped
    return horner(squared, _TANH_P) * clamped / horner(squared, _TANH_Q)


def erf(x: Tensor) -> Tensor:
    """The error function, any shape; float32."""
    size = x.abs().clamp(max=float32(_ERF_END))
    small = fma(horner(size * size, _ERF_SMALL), size, size)
    exponent = -fma(horner(size, _ERF_BIG), size, size)
    unsigned = torch.where(size >= _ERF_SPLIT, 1.0 - _exp(exponent), small)
    return torch.copysign(unsigned, x)


def _exp(x: Tensor) -> Tensor:
    """`exp(x)` for −20 < x <= 0 by the steps of `erf`: 2^n · exp(f), `n` an integer."""
    n = fma(x, float32(1 / math.log(2)), _ROUNDS) - _ROUNDS
    fraction = fma(n, float32(_LOG2_LOW), fma(n, float32(_LOG2_HIGH), x))
    return torch.ldexp(horner(fraction, _EXP), n.to(torch.int32))


def hardsigmoid(x: Tensor) -> Tensor:
    """`max(0, min(1, x/6 + 1/2))`, any shape; float32."""
    return (x * float32(1 / 6) + 0.5).clamp(0.0, 1.0)


def gelu(x: Tensor) -> Tensor:
    """GELU by erf, any shape; float32."""
    return x * ((erf(x / float32(math.sqrt(2))) + 1.0) * 0.5)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by tanh, any shape; float32."""
    cubic = x + x * x * x * float32(0.044715)
    return x * ((tanh(cubic * float32(math.sqrt(2 / math.pi))) + 1.0) * 0.5)


def leaky_relu(x: Tensor, slope: float) -> Tensor:
    """Leaky ReLU, any shape; float32."""
    return torch.where(x >= 0, x, x * float32(slope))


#: Name -> (x float32, the parameters of `FUNCTIONS[name]`) -> float32. `relu6` is none: it is a clip of codes.
STEPS: Mapping[str, Callable[[Tensor, Sequence[float]], Tensor]] = {
    "hardswish": lambda x, parameters: x * hardsigmoid(x),
    "hardsigmoid": lambda x, parameters: hardsigmoid(x),
    "sigmoid": lambda x, parameters: logistic(x),
    "silu": lambda x, parameters: x * logistic(x),
    "gelu": lambda x, parameters: gelu(x),
    "gelu_tanh": lambda x, parameters: gelu_tanh(x),
    "tanh": lambda x, parameters: tanh(x),
    "leaky_relu": lambda x, parameters: leaky_relu(x, parameters[0]),
}

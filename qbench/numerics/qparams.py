"""Affine quantization: what is wanted, what was found, and the step between a real number and its code.

    code = clamp(rne(x · (1/s)) + z, qmin, qmax)          real = (code − z) · s

rne rounds half to even. The reciprocal is taken once and multiplied: this, not a division, is what PyTorch's
`fake_quantize_*` and `quantized_decomposed` operators compute, and it differs from `x / s` at ties. In `fake_quantize`
the zero point stays outside the rounding, `clamp(rne(x · (1/s)), qmin − z, qmax − z) · s`, which gives the values of
dequantize(quantize(x)), except that a zero may keep the sign of x and that NaN stays NaN instead of becoming qmin.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import torch
from torch import Tensor

from qbench.errors import ConfigError, NumericsError
from qbench.numerics.scalars import (
    Number,
    full_int32,
    maximum,
    minimum,
    nan_to_zero,
    rint,
    to_float,
    to_int32,
)

# The smallest scale that is handed out: a range of zero width (a constant tensor) still needs a usable reciprocal.
SMALLEST_SCALE = 2.0**-100


class LearnedScale(NamedTuple):
    """A scale that is learned, for functions that hand it its gradient themselves: `s`, or `|v₀ + δ|`.

    Attributes:
        learned: float32, () or (channels,), what gets the gradient: `s` itself, or `δ`.
        beside: `v₀`, of the same shape; None where `s` itself is learned.
        factor: Of the gradient to `δ`, which has the sign of `v₀ + δ` as well.
    """

    learned: Tensor
    beside: Tensor | None = None
    factor: float = 1.0

    def resolved(self) -> tuple[Tensor, Tensor | None]:
        """`s`, and what its gradient is multiplied by on its way to what is learned; both without a gradient."""
        if self.beside is None:
            return self.learned.detach(), None
        value = self.beside + self.learned.detach()
        return value.abs().clamp_(min=SMALLEST_SCALE), torch.copysign(torch.full_like(value, self.factor), value)


def to_learned(grad: Tensor, slope: Tensor | None) -> Tensor:
    """The gradient to `LearnedScale.learned`, from that to `s` and the slope of `resolved`."""
    return grad if slope is None else grad * slope


# float32 holds every integer up to here.
_EXACT_FLOAT = 2**24


@dataclasses.dataclass(frozen=True)
class QSpec:
    """What is wanted of a quantizer.

    Attributes:
        bits: Width of a code, 2 to 32.
        signed: Whether codes are signed.
        symmetric: Zero point fixed at 0 (signed) or at the middle code (unsigned).
        axis: Channel axis of a per-channel quantizer; None quantizes per tensor.
        group_size: Of a matrix (out, in), axis 0: how many neighbours along the last axis share one scale; None gives
            one scale to the whole channel.
        narrow: Leave out the lowest signed code, so that codes are symmetric: [−127, 127].
        power_of_two: Restrict scales to powers of two.
    """

    bits: int = 8
    signed: bool = True
    symmetric: bool = False
    axis: int | None = None
    narrow: bool = False
    power_of_two: bool = False
    group_size: int | None = None

    def __post_init__(self) -> None:
        if self.group_size is not None:
            self._check_groups()
        if not isinstance(self.bits, int) or not 2 <= self.bits <= 32:
            raise ConfigError(f"QSpec(bits={self.bits!r}): a code is 2 to 32 bits wide, QSpec(bits=8) for example")
        if self.bits == 32 and not self.signed:
            raise ConfigError("QSpec(bits=32, signed=False): codes are stored in int32 at most, QSpec(bits=32) fits")
        if self.narrow and not self.signed:
            raise ConfigError("QSpec(signed=False, narrow=True): only signed codes have a lowest code to leave out")

    def _check_groups(self) -> None:
        if not isinstance(self.group_size, int) or self.group_size < 2:
            raise ConfigError(
                f"QSpec(group_size={self.group_size!r}): a group is 2 or more weights along the input axis, "
                "group_size=32 for example; None gives one scale to each output channel"
            )
        if self.axis != 0:
            raise ConfigError(
                f"QSpec(axis={self.axis}, group_size={self.group_size}): groups divide the rows of a weight (out, in); "
                f"QSpec(axis=0, group_size={self.group_size}) works"
            )

    @property
    def qmin(self) -> int:
        """Lowest code."""
        return -(2 ** (self.bits - 1)) + int(self.narrow) if self.signed else 0

    @property
    def qmax(self) -> int:
        """Highest code."""
        return 2 ** (self.bits - 1) - 1 if self.signed else 2**self.bits - 1

    @property
    def dtype(self) -> torch.dtype:
        """Smallest integer dtype that stores the codes."""
        return storage_dtype(self.qmin, self.qmax)

    def __str__(self) -> str:
        name = f"{'int' if self.signed else 'uint'}{self.bits}"
        place = "per tensor" if self.axis is None else f"per channel (axis {self.axis})"
        if self.group_size is not None:
            place = f"per group of {self.group_size}"
        kind = "symmetric" if self.symmetric else "asymmetric"
        return f"{name} {kind} {place}" + (", power-of-two" if self.power_of_two else "")


@dataclasses.dataclass(frozen=True)
class QParams:
    """What was found: the grid of a tensor.

    Attributes:
        scale: float32, shape () per tensor, (channels,) per channel or (out, in/group_size) per group, positive and
            finite.
        zero_point: int32, same shape as `scale`.
        qmin: Lowest code.
        qmax: Highest code.
        axis: Channel axis, or None per tensor.
        group_size: Neighbours along the last axis that share a scale, or None.
    """

    scale: Tensor
    zero_point: Tensor
    qmin: int
    qmax: int
    axis: int | None = None
    group_size: int | None = None

    def __post_init__(self) -> None:
        if self.scale.shape != self.zero_point.shape:
            raise NumericsError(
                f"QParams: scale has shape {tuple(self.scale.shape)}, zero_point {tuple(self.zero_point.shape)}; "
                "they must be equal"
            )
        if self.scale.ndim != (0 if self.axis is None else 1 if self.group_size is None else 2):
            raise NumericsError(
                f"QParams(axis={self.axis}, group_size={self.group_size}): scale has shape {tuple(self.scale.shape)}; "
                "per tensor is shape () with axis=None, per channel is shape (channels,) with an axis, per group is "
                "shape (out, in/group_size) with axis=0 and a group_size"
            )
        if self.qmin >= self.qmax:
            raise NumericsError(f"QParams: qmin {self.qmin} is not below qmax {self.qmax}")

    @property
    def dtype(self) -> torch.dtype:
        """Smallest integer dtype that stores the codes."""
        return storage_dtype(self.qmin, self.qmax)

    def spread(self, values: Tensor, x: Tensor) -> Tensor:
        """Values of the shape of `scale`, shaped so that they broadcast against `x`."""
        return along_axis(values, self.axis, x.ndim, self.group_size)

    def check(self, where: str) -> None:
        """Raise NumericsError if a scale is not positive and finite or a zero point lies outside the codes.

        Reads values on the host: for the edges of the flow, not for a training step.
        """
        if self._in_order():
            return
        bad = ~(torch.isfinite(self.scale) & (self.scale > 0))
        if bool(bad.any()):
            value = self.scale[bad].flatten()[0].item()
            raise NumericsError(f"{where}: a scale is {value}; scales must be positive and finite")
        outside = (self.zero_point < self.qmin) | (self.zero_point > self.qmax)
        if bool(outside.any()):
            value = self.zero_point[outside].flatten()[0].item()
            raise NumericsError(f"{where}: zero point {value} lies outside the codes [{self.qmin}, {self.qmax}]")


    def _in_order(self) -> bool:
        """Whether `check` finds nothing; NaN compares as false."""
        if self.scale.numel() == 0:
            return True
        lowest, highest = torch.aminmax(self.scale)
        first, last = torch.aminmax(self.zero_point)
        return float(lowest) > 0.0 and float(highest) < math.inf and self.qmin <= int(first) and int(last) <= self.qmax


def storage_dtype(qmin: int, qmax: int) -> torch.dtype:
    """Smallest of int8, uint8, int16, int32 that stores every code of [qmin, qmax]."""
    for dtype in (torch.int8, torch.uint8, torch.int16, torch.int32):
        info = torch.iinfo(dtype)
        if info.min <= qmin and qmax <= info.max:
            return dtype
    raise NumericsError(f"no integer dtype up to 32 bits stores codes of [{qmin}, {qmax}]")


def along_axis(values: Tensor, axis: int | None, ndim: int, group_size: int | None = None) -> Tensor:
    """Shape values so that they broadcast against a tensor of `ndim` axes.

    per tensor    () stays
    per channel   (channels,) -> (1, …, channels, …, 1)
    per group     (out, in/group_size) -> (out, in)
    """
    if group_size is not None:
        return values.repeat_interleave(group_size, dim=1)
    if axis is None or values.ndim == 0:
        return values
    shape = [1] * ndim
    shape[axis] = -1
    return values.reshape(shape)


def steps_from_zero(zero_point: Tensor, qmin: int, qmax: int) -> tuple[Tensor, Tensor]:
    """`qmin − z` and `qmax − z`, float32, of the shape of the zero point."""
    # int32 would wrap.
    zero = zero_point.float() if qmax - qmin <= _EXACT_FLOAT else zero_point.long()
    return (qmin - zero).float(), (qmax - zero).float()


def in_groups(weight: Tensor, group_size: int) -> Tensor:
    """(out, in) -> (out, in/group_size, group_size).

    Raises:
        NumericsError: it is no matrix, or `group_size` does not divide its columns; the message names what does.
    """
    if weight.ndim != 2:
        raise NumericsError(
            f"a weight of shape {tuple(weight.shape)} has no groups: they divide the rows of a matrix (out, in); "
            "group_size=None gives it one scale per output channel"
        )
    columns = weight.shape[1]
    if columns % group_size:
        fitting = [size for size in range(2, columns + 1) if columns % size == 0]
        near = min(fitting, key=lambda size: abs(size - group_size), default=None)
        raise NumericsError(
            f"group_size={group_size} does not divide the {columns} input features of a weight {tuple(weight.shape)}; "
            f"group_size={near} is the nearest that does"
        )
    return weight.unflatten(1, (-1, group_size))


def choose_qparams(low: Tensor, high: Tensor, spec: QSpec) -> QParams:
    """Grid that covers the observed range [low, high] extended to contain zero.

        asymmetric   s = (high − low) / (qmax − qmin)      z = clamp(qmin − rne(low / s))
        symmetric    s = max(|low|, |high|) / qmax         z = 0, or the middle code when unsigned

    Both ends of a symmetric signed range use qmax: dividing by qmax + ½ (as some libraries do) breaks the sign symmetry
    of the codes.

    Args:
        low: float, shape (), (channels,) or (out, in/group_size).
        high: same shape.
        spec: What is wanted.

    Returns:
        QParams whose tensors are new: changing an observer later does not change them.
    """
    return QParams(*grid_of(low, high, spec), spec.qmin, spec.qmax, spec.axis, spec.group_size)


def grid_of(low: Number, high: Number, spec: QSpec) -> tuple[Number, Number]:
    """`choose_qparams`, of tensors or of numbers (where scales are no powers of two): scale and zero point."""
    low, high = to_float(low), to_float(high)
    half = spec.qmax if spec.signed else (spec.qmax - spec.qmin) // 2
    if spec.symmetric:
        scale = maximum(-low, high) / half
    else:
        low = minimum(low, 0.0)
        scale = (maximum(high, 0.0) - low) / (spec.qmax - spec.qmin)
    scale = maximum(scale, SMALLEST_SCALE)
    if spec.power_of_two:
        scale = next_power_of_two(scale)
    if spec.symmetric:
        return scale, full_int32(0 if spec.signed else spec.qmin + half + 1, scale)
    shift = nan_to_zero(spec.qmin - rint(low / scale))
    if max(abs(spec.qmin), abs(spec.qmax)) <= _EXACT_FLOAT:
        return scale, to_int32(minimum(maximum(shift, spec.qmin), spec.qmax))
    return scale, _to_integer(shift, spec.qmin, spec.qmax).to(torch.int32)


def next_power_of_two(scale: Tensor) -> Tensor:
    """Smallest power of two that is not below `scale` (exact: taken from the float's exponent)."""
    mantissa, exponent = torch.frexp(scale)
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)
    # frexp gives NaN and infinity the exponent 0: they must stay what they are, to be found by QParams.check.
    return torch.where(torch.isfinite(scale), torch.ldexp(torch.ones_like(scale), exponent), scale)


def quantize(x: Tensor, qparams: QParams) -> Tensor:
    """Codes of a float tensor, in the smallest integer dtype; saturates at qmin and qmax, NaN becomes qmin."""
    inverse, zero_point = qparams.spread(1.0 / qparams.scale, x), qparams.spread(qparams.zero_point, x)
    codes = torch.round(x.float() * inverse) + zero_point
    return _to_integer(codes, qparams.qmin, qparams.qmax)


def dequantize(codes: Tensor, qparams: QParams) -> Tensor:
    """Real values of codes, float32."""
    return (codes.float() - qparams.spread(qparams.zero_point, codes)) * qparams.spread(qparams.scale, codes)


def fake_quantize(x: Tensor, qparams: QParams) -> Tensor:
    """Real values on the grid, equal to dequantize(quantize(x)), as plain differentiable-free tensor operations.

    `x` is float32 (or float64): in half precision the rounding itself would be half precision. A value that rounds to
    zero from below gives −0.0, and NaN stays NaN, so that a broken activation is seen.
    """
    scale = qparams.spread(qparams.scale, x)
    zero_point = qparams.spread(qparams.zero_point.long(), x)  # int32 would wrap in qmin − z
    steps = torch.round(x * (1.0 / scale))
    return torch.clamp(steps, qparams.qmin - zero_point, qparams.qmax - zero_point) * scale


def inside_range(x: Tensor, qparams: QParams) -> Tensor:
    """Bool mask of the values that are not clipped: the straight-through estimator lets their gradient pass."""
    scale = qparams.spread(qparams.scale, x)
    zero_point = qparams.spread(qparams.zero_point.long(), x)  # int32 would wrap in qmin − z
    steps = torch.round(x * (1.0 / scale))
    return (steps >= qparams.qmin - zero_point) & (steps <= qparams.qmax - zero_point)


def _to_integer(codes: Tensor, qmin: int, qmax: int) -> Tensor:
    dtype = storage_dtype(qmin, qmax)
    codes = torch.nan_to_num(codes, nan=float(qmin), posinf=math.inf, neginf=-math.inf).clamp(qmin, qmax)
    if max(abs(qmin), abs(qmax)) <= _EXACT_FLOAT:
        return codes.to(dtype)
    # float32 cannot hold 2**31 − 1: clamping there gives 2**31, which wraps. Saturate again in integers.
    return codes.to(torch.int64).clamp(qmin, qmax).to(dtype)

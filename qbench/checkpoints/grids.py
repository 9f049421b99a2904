"""Grids of another library's activations as grids of ours.

A grid is `real = (code − z) · s` for codes `lowest … highest`. Numbering the codes from another lowest code moves the
zero point with it and changes no real value:

    s' = s        z' = z + (qmin − lowest)

A state dict holds s, z and the observed range [m, M], but not the codes. Those follow from how the range became a grid:

    affine       (max(M, 0) − min(m, 0)) / s = highest − lowest    lowest = z + rne(min(m, 0) / s)
    symmetric    2 · max(|m|, |M|) / s = highest − lowest          lowest = 0 where z > 0, else −2^(bits − 1), or 1 more

torch.ao, `UniformQuantizationObserverBase._calculate_qparams`; MQBench uses the same. A learned scale has left its
range, then the caller says the codes, or they are taken to be of our width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qbench.checkpoints.source import SourceQuantizer
from qbench.errors import ConfigError
from qbench.numerics.qparams import QParams, QSpec

Codes = tuple[int, int]

_WIDTHS = range(2, 17)
# How far a quotient may be from a whole number of steps: 127 and 127.5 must not be taken for each other.
_TOLERANCE = 1e-3


def codes_of(quantizer: SourceQuantizer) -> Codes | None:
    """Lowest and highest code of a quantizer, from its grid and its range; None where they do not fit together."""
    scale, zero_point = quantizer.find("scale"), quantizer.find("zero_point")
    low, high = quantizer.find("min_val"), quantizer.find("max_val")
    if scale is None or zero_point is None or low is None or high is None or scale.numel() != 1:
        return None
    step, zero = float(scale), round(float(zero_point))
    bottom, top = min(float(low), 0.0), max(float(high), 0.0)
    bits = _width((top - bottom) / step)
    if bits is not None:
        lowest = zero + round(bottom / step)
        for known in (0, -(2 ** (bits - 1))):
            if abs(lowest - known) <= 1:  # the source rounded in float32
                return known, known + 2**bits - 1
    steps = 2 * max(-bottom, top) / step
    bits = _width(steps)
    if bits is not None:
        lowest = 0 if zero > 0 else -(2 ** (bits - 1))
        return lowest, lowest + 2**bits - 1
    bits = _width(steps, left_out=1)
    return None if bits is None else (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1)


def _width(steps: float, left_out: int = 0) -> int | None:
    """Bits of codes that are so many steps apart; `left_out` of them are not used."""
    return next((b for b in _WIDTHS if abs(steps - (2**b - 1 - left_out)) <= _TOLERANCE * steps), None)


def assumed_codes(quantizers: list[SourceQuantizer], spec: QSpec) -> Codes:
    """Codes of our width for quantizers whose range does not tell: signed if every zero point is 0."""
    zeros = [zero for found in quantizers if (zero := found.find("zero_point")) is not None]
    lowest = 0 if any(bool((zero != 0).any()) for zero in zeros) else -(2 ** (spec.bits - 1))
    return lowest, lowest + 2**spec.bits - 1


def translated_grid(quantizer: SourceQuantizer, codes: Codes, spec: QSpec) -> QParams:
    """The grid in our numbering of the codes; per tensor.

    Raises:
        ConfigError: the codes are of another width than ours, or the grid is per channel.
    """
    scale, zero_point = quantizer.tensors["scale"].detach(), quantizer.tensors["zero_point"].detach()
    lowest, highest = codes
    if scale.numel() != 1:
        raise ConfigError(f"an activation with {scale.numel()} scales; integer layers need one per tensor")
    if highest - lowest != spec.qmax - spec.qmin:
        bits = (highest - lowest).bit_length()
        raise ConfigError(
            f"its codes are {lowest} … {highest}, the model's {spec.qmin} … {spec.qmax}: other values would saturate. "
            f"Prepare the model with qbench.get_qconfig(activation_bits={bits}), or with the source's own qconfig"
        )
    zero = torch.round(_scalar(zero_point)).to(torch.int32) + (spec.qmin - lowest)
    return QParams(_scalar(scale).float(), zero, spec.qmin, spec.qmax)


def known_grid(known: tuple[float, int], spec: QSpec) -> QParams:
    """The grid of a quantizer that needs no data for it; per tensor."""
    scale, zero_point = known
    return QParams(torch.tensor(scale), torch.tensor(zero_point, dtype=torch.int32), spec.qmin, spec.qmax)


def _scalar(tensor: Tensor) -> Tensor:
    return tensor.reshape(()).clone()

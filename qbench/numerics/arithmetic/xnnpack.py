"""XNNPACK's arithmetic on x64 CPUs, as ExecuTorch delegates to it.

    quantize       rne(x · f32(1/s)) + z, saturated; NaN becomes the highest code
    requantize     clamp(rne(f32(acc) · f32(s_b / s_out)) + z_out)
"""

from __future__ import annotations

import torch
from torch import Tensor

from qbench.numerics.arithmetic.base import Arithmetic, Grid, saturate
from qbench.numerics.arithmetic.onnxruntime import requantize


def quantize(x: Tensor, out: Grid) -> Tensor:
    """The convert operator from float32 to 8 bits."""
    inverse = 1.0 / torch.tensor(out.scale, dtype=torch.float32, device=x.device)
    rounded = torch.round(x.to(torch.float32) * inverse) + out.zero_point
    return saturate(torch.nan_to_num(rounded, nan=out.qmax), out)


ARITHMETIC = Arithmetic(name="xnnpack", quantize=quantize, requantize=requantize)

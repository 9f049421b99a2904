"""ONNX Runtime's arithmetic on x64 CPUs.

    quantize       rne(x / s) + z, saturated; NaN becomes the lowest code
    requantize     clamp(rne(f32(acc) · f32(s_b / s_out)) + z_out)
"""

from __future__ import annotations

import torch
from torch import Tensor

from qbench.numerics.arithmetic.base import Arithmetic, Grid, saturate


def quantize(x: Tensor, out: Grid) -> Tensor:
    """QuantizeLinear."""
    rounded = torch.round(x.to(torch.float32) / out.scale) + out.zero_point
    return saturate(torch.nan_to_num(rounded, nan=out.qmin), out)


def requantize(acc: Tensor, scale: Tensor, out: Grid) -> Tensor:
    """The output of QLinearConv and QGemm."""
    multiplier = scale / torch.tensor(out.scale, dtype=torch.float32, device=scale.device)
    return saturate(torch.round(acc.to(torch.float32) * multiplier) + out.zero_point, out)


ARITHMETIC = Arithmetic(name="onnxruntime", quantize=quantize, requantize=requantize)

"""Which floating-point kernel sums codes exactly, from a bound that is proven for each layer.

    acc = Σ (x − z)·w + bias            lo = code min − z            hi = code max − z

A kernel may add the products in any order and may add the bias first or last. Whatever subset of them has been added
so far, the partial sum of an output channel lies in

    [ Σ min(w·lo, w·hi, 0) + min(bias, 0),  Σ max(w·lo, w·hi, 0) + max(bias, 0) ]

and is an integer. float32 holds every integer up to 2²⁴ and float64 every one up to 2⁵³, so while the interval lies
inside, every addition, fused or not, is exact: the kernel returns `acc` whatever its order and its threads. That holds
for kernels that add products of inputs and weights (direct convolution, matrix product), not for Winograd or FFT.

`acc` also fits int32 wherever a runtime accumulates in it: `convert` refuses a layer that does not fit its target's
accumulator, so no wrap-around is emulated here.
"""

from __future__ import annotations

import dataclasses
import platform

import torch
from torch import Tensor

from qbench.numerics.arithmetic import Grid

FLOAT32_INTEGERS = 2**24


@dataclasses.dataclass(frozen=True)
class Layer:
    """Weight and bias of one layer in the dtype in which its sum is proven exact.

    Attributes:
        weight: The codes, float32 or float64, shape as given.
        bias: The same dtype, (out,), or None.
    """

    weight: Tensor
    bias: Tensor | None


def differences(codes: Tensor, grid: Grid, dtype: torch.dtype) -> Tensor:
    """`x − z` as floats, which hold it exactly; a tensor of its own."""
    return codes.to(dtype, copy=True).sub_(grid.zero_point)


def reach(rows: Tensor, bias: Tensor | None, grid: Grid) -> int:
    """Largest magnitude of any partial sum, over all output channels.

    Args:
        rows: (out, products of one output) weight codes, int8.
        bias: (out,) int32 codes, or None.
        grid: Of the input.
    """
    lo, hi = grid.qmin - grid.zero_point, grid.qmax - grid.zero_point
    if rows.numel() == 0:
        return 0 if bias is None or bias.numel() == 0 else int(bias.to(torch.int64).abs().max())
    positive = rows.clamp(min=0).sum(1, dtype=torch.int64)
    negative = rows.clamp(max=0).sum(1, dtype=torch.int64)
    upper = positive * max(hi, 0) + negative * min(lo, 0)
    lower = positive * min(lo, 0) + negative * max(hi, 0)
    if bias is not None:
        upper, lower = upper + bias.clamp(min=0), lower + bias.clamp(max=0)
    return max(int(upper.max()), -int(lower.min()))


def plan(weight: Tensor, rows: Tensor, bias: Tensor | None, grid: Grid, *, float32: bool) -> Layer:
    """The layer in float32 where that is proven exact and `float32` allows it, else in float64."""
    dtype = torch.float32 if float32 and reach(rows, bias, grid) <= FLOAT32_INTEGERS else torch.float64
    return Layer(weight.to(dtype), None if bias is None else bias.to(dtype))


def float32_is_summed(device: torch.device, kind: str) -> bool:
    """Whether float32 kernels of `kind` ("conv", "matmul") add plain products: no Winograd, no reduced precision.

    Shown for oneDNN on x86 alone; elsewhere, and where the process allows bfloat16 or TF32 inside float32 kernels,
    float64 is taken.
    """
    if device.type != "cpu" or platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    precision = getattr(torch.backends.mkldnn, kind).fp32_precision
    return torch.backends.mkldnn.is_available() and precision in ("none", "ieee")

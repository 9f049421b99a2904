"""The integers that a layer deploys, and the check that the numbers they are made of are finite.

    weight_code · weight_scale = Ŵ          bias_code · bias_scale = b̂          bias_scale = f32(s_in · s_w)
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from qbench.errors import NumericsError
from qbench.numerics.qparams import QParams


@dataclasses.dataclass(frozen=True)
class ParameterCodes:
    """What a layer deploys, as integers.

    Attributes:
        weight: Codes, shape of the weight, in the smallest integer dtype.
        weight_qparams: Their grid.
        bias: int64 codes, (out,); None where the bias stays float.
        bias_scale: float32, (out,) or (); None where the bias stays float.
        bias_value: `b̂`, float32, (out,); in float `b_f`, or None where the layer has none.
        bias_saturated: Bool (out,): codes that did not fit; None where the bias stays float.
        coarsened: Factor by which the bias floor raised the weight scale.
        silenced: Bool (out,): channels whose weight codes the floor sent to 0.
    """

    weight: Tensor
    weight_qparams: QParams
    bias: Tensor | None
    bias_scale: Tensor | None
    bias_value: Tensor | None
    bias_saturated: Tensor | None
    coarsened: Tensor
    silenced: Tensor


def check_finite(module: nn.Module, label: str) -> None:
    """Raise NumericsError if a parameter or a BatchNorm statistic of a module is NaN or infinite."""
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if "quantizer" in name or not tensor.is_floating_point():
            continue
        bad = ~torch.isfinite(tensor)
        if bool(bad.any()):
            value = tensor[bad].flatten()[0].item()
            raise NumericsError(
                f"{label}.{name} holds {int(bad.sum())} value(s) that are not finite (the first is {value}); "
                "quantization needs finite numbers: look for a diverged training step or a broken checkpoint"
            )

"""Folding BatchNorm into the linear layer before it.

    k   = γ / sqrt(σ²_r + ε)            (out,)
    W_f = k · W                         along the output channels
    b_f = β + k · (b − μ_r)             b = 0 where the layer has none

`ε` is the BatchNorm's own: it is never assumed. A BatchNorm without affine has γ = 1 and β = 0.

The output channels of a weight:

    linear, conv      W (out, in/groups, …)          axis 0
    transposed conv   W (in, out/groups, …)          axis 1, repeated for each group of the input channels
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from qbench.errors import NumericsError


@dataclasses.dataclass(frozen=True)
class WeightLayout:
    """Where a weight keeps its output channels.

    Attributes:
        transposed: Weight is (in, out/groups, …) instead of (out, in/groups, …).
        groups: Groups of the layer; only a transposed layout needs them.
    """

    transposed: bool = False
    groups: int = 1

    @property
    def axis(self) -> int:
        """Axis along which per-channel scales lie."""
        return 1 if self.transposed else 0

    def out_channels(self, weight: Tensor) -> int:
        """Number of output channels of a weight."""
        return weight.shape[1] * self.groups if self.transposed else weight.shape[0]

    def spread(self, values: Tensor, weight: Tensor) -> Tensor:
        """Shape per-output-channel values so that they multiply `weight`.

        conv         (out,) -> (out, 1, …)
        transposed   (out,) -> (groups, 1, out/groups, 1, …) -> (in, out/groups, 1, …)
        """
        if not self.transposed:
            return values.reshape(-1, *[1] * (weight.ndim - 1))
        inputs, outputs = weight.shape[:2]
        grouped = values.reshape(self.groups, 1, outputs).expand(self.groups, inputs // self.groups, outputs)
        return grouped.reshape(inputs, outputs, *[1] * (weight.ndim - 2))

    def per_channel(self, values: Tensor) -> Tensor:
        """Scales along the weight's axis as one per output channel: (out/groups,) -> (out,) when transposed."""
        if self.transposed and values.ndim == 1:
            return values.repeat(self.groups)
        return values

    def reduce_max(self, values: Tensor) -> Tensor:
        """Largest of the output channels that share one scale: (out,) -> (out/groups,) when transposed."""
        return values.reshape(self.groups, -1).amax(0) if self.transposed else values


class BatchNormTensors(NamedTuple):
    """What folding reads of a BatchNorm: γ and β (or None), running mean and variance, all (out,), and ε."""

    gamma: Tensor | None
    beta: Tensor | None
    mean: Tensor
    var: Tensor
    eps: float


def fold_factor(bn: BatchNormTensors) -> Tensor:
    """`k = γ / sqrt(σ² + ε)`, (out,)."""
    # float32 square roots differ by a bit between MKL, compiled code and GPUs, and so would the codes.
    deviation = torch.sqrt(bn.var.double() + bn.eps).to(bn.var.dtype)
    return 1.0 / deviation if bn.gamma is None else bn.gamma / deviation


def fold_weight(weight: Tensor, factor: Tensor, layout: WeightLayout) -> Tensor:
    """`W_f = k · W`."""
    return weight * layout.spread(factor, weight)


def fold_bias(bias: Tensor | None, bn: BatchNormTensors, factor: Tensor) -> Tensor:
    """`b_f = β + k · (b − μ)`, (out,)."""
    centred = -bn.mean if bias is None else bias - bn.mean
    return factor * centred if bn.beta is None else bn.beta + factor * centred


def fold(
    weight: Tensor, bias: Tensor | None, bn: BatchNormTensors, layout: WeightLayout | None = None
) -> tuple[Tensor, Tensor]:
    """Weight and bias of the layer that does what `weight, bias` followed by `bn` does in eval.

    Args:
        weight: (out, in/groups, …), or (in, out/groups, …) when the layout is transposed.
        bias: (out,) or None.
        bn: The BatchNorm's tensors, each (out,).
        layout: Where the output channels lie; the default is that of Linear and Conv.

    Raises:
        NumericsError: the BatchNorm has another number of channels than the layer puts out.
    """
    layout = layout or WeightLayout()
    channels = layout.out_channels(weight)
    if bn.mean.shape != (channels,):
        raise NumericsError(
            f"fold: the layer puts out {channels} channels (weight {tuple(weight.shape)}), the BatchNorm has "
            f"{tuple(bn.mean.shape)} statistics; they must be equal"
        )
    factor = fold_factor(bn)
    return fold_weight(weight, factor, layout), fold_bias(bias, bn, factor)

"""What an attention computes and PyTorch has no module for: each can own the quantizer of its output.

    ScaledLinear     y = F.linear(x, f·W, f·b)                 f a constant, such as 1/√d
    CosineProduct    y = exp(min(λ, ln 100)) · (q @ kᵀ)         λ learned, one a head
    Normalize        y = x / max(‖x‖₂, ε)                      along the last axis
    MaskedSoftmax    y = softmax(x + m)                        m of 0, −100 or −∞, never quantized

The factors stand inside an operation because a product with a constant that stood alone would round once more. `W` and
`b` stay what they were: folding `f` into them would make training move `f·W` by other steps.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qbench.nn.ops import Operation

#: `logit_scale` is bounded here: section 3.2 of https://arxiv.org/abs/2111.09883 (Swin Transformer V2).
LARGEST_LOGIT_SCALE = math.log(100.0)


class ScaledLinear(nn.Linear):
    """A linear layer with a constant factor; its parameters are those of the layer without it.

    Args:
        in_features: Columns of the weight.
        out_features: Rows of the weight.
        factor: `f`.
        **options: As for `torch.nn.Linear`.
    """

    def __init__(self, in_features: int, out_features: int, factor: float = 1.0, **options: Any) -> None:
        super().__init__(in_features, out_features, **options)
        self.factor = factor

    @property
    def scaled_weight(self) -> Tensor:
        """`f·W`, (out, in)."""
        return self.weight * self.factor

    @property
    def scaled_bias(self) -> Tensor | None:
        """`f·b`, (out,), or None."""
        return None if self.bias is None else self.bias * self.factor

    def forward(self, input: Tensor) -> Tensor:
        """(…, in) -> (…, out)."""
        return F.linear(input, self.scaled_weight, self.scaled_bias)

    def extra_repr(self) -> str:
        """Sizes and factor."""
        return f"{super().extra_repr()}, factor={self.factor:.6g}"


class CosineProduct(Operation):
    """The scaled product of normalized queries and keys.

    One operation, because the codes of the cosines alone would not do: at 8 bits, times 100, they lie 0.8 apart.

    Args:
        logit_scale: `λ`, (heads, 1, 1).
    """

    def __init__(self, logit_scale: nn.Parameter) -> None:
        super().__init__()
        self.logit_scale = logit_scale

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """(…, heads, rows, inner), (…, heads, inner, columns) -> (…, heads, rows, columns)."""
        return torch.matmul(x, y) * torch.clamp(self.logit_scale, max=LARGEST_LOGIT_SCALE).exp()


class Normalize(Operation):
    """Vectors of length 1.

    Args:
        eps: `ε`, the least length that is divided by.
    """

    def __init__(self, eps: float = 1e-12) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(…, size) -> the same shape."""
        return F.normalize(x, dim=-1, eps=self.eps)

    def extra_repr(self) -> str:
        """The least length."""
        return f"eps={self.eps}"


class MaskedSoftmax(Operation):
    """Softmax along the last axis, with a mask that comes with the call.

    The mask is added here, between the codes of the logits and those of the probabilities, and not before: a −100 among
    the logits would have to lie on their grid, and leave it a handful of codes for everything else.
    """

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(…, rows, columns), what is added to it or None -> probabilities of the same shape."""
        return torch.softmax(x if mask is None else x + mask, -1)

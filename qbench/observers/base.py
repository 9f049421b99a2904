"""What an observer is: it watches tensors and answers with the range that they need."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qbench.numerics.qparams import QParams, QSpec, choose_qparams, in_groups


class Observer(nn.Module):
    """Base of the observers: keeps a range [min_val, max_val] per tensor or per channel.

    Subclasses implement `update`. The range starts as [+inf, −inf], which means that nothing was seen.

    Args:
        spec: What is wanted; `spec.axis` decides per tensor or per channel.
    """

    # A stateless observer answers with the range of the tensor at hand, whatever was seen before.
    stateless = False

    min_val: Tensor
    max_val: Tensor

    def __init__(self, spec: QSpec) -> None:
        super().__init__()
        self.spec = spec
        if not self.stateless:
            self.register_buffer("min_val", torch.tensor(float("inf")))
            self.register_buffer("max_val", torch.tensor(float("-inf")))

    def range_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Lowest and highest value of `x`, float32, (), (channels,) or (out, in/group_size)."""
        x = x.detach()
        if self.spec.group_size is not None:
            low, high = torch.aminmax(in_groups(x, self.spec.group_size), dim=-1)
        elif self.spec.axis is None:
            low, high = torch.aminmax(x)
        else:
            low, high = torch.aminmax(x.movedim(self.spec.axis, 0).flatten(1), dim=1)
        return low.float(), high.float()

    def update(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Take `x` into account and return the range as new tensors."""
        raise NotImplementedError(f"{type(self).__name__} must implement update(x) -> (low, high)")

    @torch.no_grad()
    def forward(self, x: Tensor) -> QParams:
        """Observe `x` and return the grid that now holds."""
        return choose_qparams(*self.update(x), self.spec)

    def extra_repr(self) -> str:
        """Nothing: the quantizer prints the grid."""
        return ""

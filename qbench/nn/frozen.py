"""BatchNorm with fixed statistics: an affine per channel that never trains.

    scale = w / sqrt(σ² + ε)            y = x · scale + (b − μ · scale)

Detection models use it, as statistics of one or two images are too noisy to train with. It always folds: what training
computes is what eval computes. A class of another library is taken for this one by its name and its tensors
(torchvision's and detectron2's are called `FrozenBatchNorm2d` and hold the same four), so none has to be imported.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

_TENSORS = ("weight", "bias", "running_mean", "running_var")


class FrozenBatchNorm(nn.Module):
    """Base of the frozen BatchNorms, which differ in name only: the number of axes is that of the input.

    Args:
        num_features: Channels.
        eps: `ε`.

    Attributes:
        weight: `w`, buffer, (channels,).
        bias: `b`, buffer, (channels,).
        running_mean: `μ`, buffer, (channels,).
        running_var: `σ²`, buffer, (channels,).
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.num_features, self.eps = num_features, eps
        for name in _TENSORS:
            fill = torch.ones if name in ("weight", "running_var") else torch.zeros
            self.register_buffer(name, fill(num_features))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, …) -> the same shape."""
        wide = (1, -1, *[1] * (x.ndim - 2))
        # A product with a reciprocal root, as other implementations have it: the bits are theirs.
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return x * scale.reshape(wide) + (self.bias - self.running_mean * scale).reshape(wide)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # Checkpoints of an ordinary BatchNorm count batches.
        state_dict.pop(f"{prefix}num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """Channels and ε."""
        return f"{self.num_features}, eps={self.eps}"


class FrozenBatchNorm1d(FrozenBatchNorm):
    """BatchNorm1d with fixed statistics, (batch, channels) or (batch, channels, length)."""


class FrozenBatchNorm2d(FrozenBatchNorm):
    """BatchNorm2d with fixed statistics, (batch, channels, high, wide)."""


class FrozenBatchNorm3d(FrozenBatchNorm):
    """BatchNorm3d with fixed statistics, (batch, channels, deep, high, wide)."""


def known_types(module: nn.Module) -> tuple[type[nn.Module], ...]:
    """The types by which patterns know a module: its own, and `FrozenBatchNorm2d` for one of another library."""
    kind = type(module)
    if kind.__name__ != FrozenBatchNorm2d.__name__ or kind is FrozenBatchNorm2d:
        return (kind,)
    alike = all(isinstance(getattr(module, name, None), Tensor) for name in _TENSORS) and hasattr(module, "eps")
    return (kind, FrozenBatchNorm2d) if alike else (kind,)


def is_batch_norm(kind: type[nn.Module]) -> bool:
    """Whether a type is a BatchNorm that folds: PyTorch's, or one with fixed statistics and the same names."""
    return issubclass(kind, (_BatchNorm, FrozenBatchNorm)) or kind.__name__.startswith("FrozenBatchNorm")

"""BatchNorm as a step of a layer in training: normalises with the batch's statistics and moves the running ones.

    v = γ·(y − μ)/sqrt(σ² + ε) + (β + e)

The bias error `e` is part of the shift: behind what is normalised, as a further pass over the activation would have it,
and without that pass.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from qbench.fake_quantize.base import is_hooked
from qbench.numerics.fused import Statistics
from qbench.numerics.qparams import along_axis


@dataclasses.dataclass(frozen=True)
class TrainingBatchNorm:
    """One call of a BatchNorm in training.

    Attributes:
        holder: What holds γ, β, the running statistics and the rest; the BatchNorm itself, or the layer that is one.
        kind: Its type.
        error: `e`, (channels,), or None.
        silenced: Bool, (channels,): channels whose weights are all 0; their running statistics stay. Or None.
        axis: Axis of the channels.
    """

    holder: Any
    kind: type[Any]
    error: Tensor | None
    silenced: Tensor | None
    axis: int

    def plain(self, y: Tensor) -> bool:
        """Whether it is PyTorch's own arithmetic, so that `e` may be added to β, and the call be fused with others."""
        bn = self.holder
        tracks = bn.running_mean is not None and bn.running_var is not None and bn.momentum is not None
        own = self.kind.forward is _BatchNorm.forward and y.ndim > 1 and self.axis % y.ndim == 1
        return own and tracks and bn.training and (not isinstance(bn, self.kind) or not is_hooked(bn))

    @property
    def shift(self) -> Tensor | None:
        """`β + e`."""
        beta: Tensor | None = self.holder.bias
        if self.error is None:
            return beta
        return self.error if beta is None else beta + self.error

    def count(self) -> Statistics:
        """Count a batch, and say what to update and how; only where it is plain."""
        bn = self.holder
        if bn.num_batches_tracked is not None:
            bn.num_batches_tracked.add_(1)
        # `.data`: autograd saves these buffers for the eval form of its backward, which training does not read; putting
        # those of silenced channels back would make it refuse.
        return Statistics(bn.running_mean.data, bn.running_var.data, bn.momentum, bn.eps)

    def __call__(self, y: Tensor) -> Tensor:
        """(batch, channels, …) -> the same shape, with `e`."""
        with self.keeping_silenced():
            if self.plain(y):
                self.holder._check_input_dim(y)
                to = self.count()
                mean, var = to.running_mean, to.running_var
                return F.batch_norm(y, mean, var, self.holder.weight, self.shift, True, to.momentum, to.eps)
            bn = self.holder
            normalized: Tensor = bn(y) if isinstance(bn, self.kind) else self.kind.forward(bn, y)
        return normalized if self.error is None else normalized + along_axis(self.error, self.axis, y.ndim).to(y.dtype)

    @contextlib.contextmanager
    def keeping_silenced(self) -> Iterator[None]:
        """Put the running statistics of silenced channels back: their variance is 0, and `k` would explode."""
        buffers = self.holder.running_mean, self.holder.running_var
        if self.silenced is None or buffers[0] is None or buffers[1] is None:
            yield
            return
        before = [buffer.clone() for buffer in buffers]
        yield
        for buffer, old in zip(buffers, before, strict=True):
            buffer.data.copy_(torch.where(self.silenced, old, buffer))

"""torchvision's attention in windows: Swin Transformer, its second version, and MaxViT, written out.

    x  -pad, roll->  windows (batch, windows, positions, features)  -attend->  y  -unroll, crop->  the shape of x

Pads are zeros, which every grid has; a roll, a partition and a crop move values: all of them keep codes. Positions that
a roll brought together without being neighbours are kept apart by a mask of −100, as in the original.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qbench.nn.attention.base import ExplicitAttention, split_linear
from qbench.nn.attention.operations import CosineProduct, Normalize
from qbench.nn.attention.position import ContinuousPositionBias, RelativePositionBias

#: What torchvision adds to logits of positions that are no neighbours.
FAR_APART = -100.0


class ExplicitShiftedWindowAttention(ExplicitAttention):
    """Attention in windows that may be shifted."""

    stands_for = "ShiftedWindowAttention"
    parts = frozenset({"qkv", "proj"})

    window_size: tuple[int, int]
    shift_size: tuple[int, int]

    @classmethod
    def from_module(cls, module: Any) -> ExplicitShiftedWindowAttention:
        """See `ExplicitAttention.from_module`."""
        factor = (module.qkv.in_features // module.num_heads) ** -0.5
        bias = RelativePositionBias(module.relative_position_bias_table, module.relative_position_index)
        query, key, value = split_linear(module.qkv, (factor, None, None))
        dropout = module.attention_dropout
        made = cls(query, key, value, module.proj, heads=module.num_heads, dropout=dropout, bias=bias)
        return made._with_windows(module)

    def _with_windows(self, module: Any) -> ExplicitShiftedWindowAttention:
        self.window_size = tuple(module.window_size)
        self.shift_size = tuple(module.shift_size)
        self.output_dropout = nn.Dropout(module.dropout)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """(batch, high, wide, features) -> the same shape."""
        high, wide = x.shape[1:3]
        tall, broad = self.window_size
        below, right = -high % tall, -wide % broad
        if below or right:
            x = F.pad(x, (0, 0, 0, right, 0, below))
        size = (high + below, wide + right)
        # A window that holds everything is not shifted.
        places = zip(self.window_size, size, self.shift_size, strict=True)
        shift = [0 if window >= whole else by for window, whole, by in places]
        if any(shift):
            x = torch.roll(x, [-by for by in shift], (1, 2))
        windows = self._windows(x)
        mask = self._mask(size, shift, x) if any(shift) else None
        y = self.output_dropout(self.attend(windows, windows, windows, mask)[0])
        # (batch, windows, positions, features) -> (batch, high, wide, features)
        y = y.unflatten(2, (tall, broad)).unflatten(1, (size[0] // tall, size[1] // broad))
        y = y.transpose(2, 3).flatten(3, 4).flatten(1, 2)
        if any(shift):
            y = torch.roll(y, shift, (1, 2))
        return y[:, :high, :wide]

    def _windows(self, x: Tensor) -> Tensor:
        """(batch, high, wide, …) -> (batch, windows, positions, …)."""
        x = x.unflatten(2, (-1, self.window_size[1])).unflatten(1, (-1, self.window_size[0]))
        return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)

    def _mask(self, size: tuple[int, int], shift: list[int], x: Tensor) -> Tensor:
        """(windows, 1, positions, positions): 0 for neighbours, `FAR_APART` for others."""
        parts = []
        for whole, window, by in zip(size, self.window_size, shift, strict=True):
            place = torch.arange(whole, device=x.device)
            parts.append((place >= whole - window).int() + (place >= whole - by).int())
        part = self._windows((3 * parts[0].unsqueeze(1) + parts[1]).unsqueeze(0))  # (1, windows, positions)
        apart = (part.unsqueeze(-1) != part.unsqueeze(-2)).transpose(0, 1)
        return torch.zeros(apart.shape, dtype=x.dtype, device=x.device).masked_fill(apart, FAR_APART)

    def extra_repr(self) -> str:
        """Windows and shift."""
        return f"heads={self.num_heads}, window={self.window_size}, shift={self.shift_size}"


class ExplicitShiftedWindowAttentionV2(ExplicitShiftedWindowAttention):
    """The same with cosines in place of products, and a bias that is a network of the distance."""

    stands_for = "ShiftedWindowAttentionV2"
    parts = frozenset({"qkv", "proj", "cpb_mlp"})

    normalize_query: Normalize
    normalize_key: Normalize

    @classmethod
    def from_module(cls, module: Any) -> ExplicitShiftedWindowAttentionV2:
        """See `ExplicitAttention.from_module`."""
        hidden, _, out = module.cpb_mlp
        coords = module.relative_coords_table.flatten(0, 2)
        query, key, value = split_linear(module.qkv, (None, None, None))
        key.register_parameter("bias", None)  # the original sets it to 0 in every call
        made = cls(
            query,
            key,
            value,
            module.proj,
            heads=module.num_heads,
            dropout=module.attention_dropout,
            bias=ContinuousPositionBias(coords, module.relative_position_index, hidden, out),
            product=CosineProduct(module.logit_scale),
        )
        made.normalize_query, made.normalize_key = Normalize(), Normalize()
        made._with_windows(module)
        return made

    def normalized(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys of length 1."""
        unit: tuple[Tensor, Tensor] = self.normalize_query(q), self.normalize_key(k)
        return unit


class ExplicitRelativePositionalAttention(ExplicitAttention):
    """MaxViT's: windows are an axis of the input, and the factor is that of the keys."""

    stands_for = "RelativePositionalMultiHeadAttention"
    parts = frozenset({"to_qkv", "merge"})

    @classmethod
    def from_module(cls, module: Any) -> ExplicitRelativePositionalAttention:
        """See `ExplicitAttention.from_module`."""
        query, key, value = split_linear(module.to_qkv, (None, module.scale_factor, None))
        bias = RelativePositionBias(module.relative_position_bias_table, module.relative_position_index)
        return cls(query, key, value, module.merge, heads=module.n_heads, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, windows, positions, features) -> the same shape."""
        return self.attend(x, x, x)[0]

"""What is added to the logits of two positions of a window, by how far they lie apart.

    learned       B[h, i, j] = table[index[i, j], h]
    continuous    B[h, i, j] = 16 · sigmoid(W₂ · relu(W₁ · coords[index[i, j]] + b₁))[h]

Both depend on parameters alone: `B` is one tensor that is deployed as its codes, with no gather and no network left.
The equations are those of https://arxiv.org/abs/2103.14030 (section 3.2) and https://arxiv.org/abs/2111.09883 (3.3).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

#: Of `sigmoid` in the continuous bias.
LARGEST_BIAS = 16.0


def _gather(rows: Tensor, index: Tensor) -> Tensor:
    """(distances, heads), (positions, positions) -> (heads, positions, positions)."""
    return rows[index.flatten()].view(*index.shape, -1).permute(2, 0, 1).contiguous()


class RelativePositionBias(nn.Module):
    """A learned number for each distance and head.

    Args:
        table: (distances, heads).
        index: Row of the table for each pair of positions, int64 (positions, positions), or flat.
    """

    index: Tensor

    def __init__(self, table: nn.Parameter, index: Tensor) -> None:
        super().__init__()
        self.table = table
        self.register_buffer("index", as_square(index))

    def forward(self) -> Tensor:
        """`B`, (heads, positions, positions)."""
        return _gather(self.table, self.index)


class ContinuousPositionBias(nn.Module):
    """A small network of the distance.

    Its layers are no modules: they are not deployed, so their weights have no codes.

    Args:
        coords: Of each distance, (distances, 2).
        index: As of `RelativePositionBias`.
        hidden: The first layer of the network, 2 -> any width.
        out: The second, -> heads, without a bias.
    """

    coords: Tensor
    index: Tensor

    def __init__(self, coords: Tensor, index: Tensor, hidden: nn.Linear, out: nn.Linear) -> None:
        super().__init__()
        self.hidden_weight, self.hidden_bias = hidden.weight, hidden.bias
        self.out_weight = out.weight
        self.register_buffer("coords", coords)
        self.register_buffer("index", as_square(index))

    def forward(self) -> Tensor:
        """`B`, (heads, positions, positions)."""
        hidden = F.relu(F.linear(self.coords, self.hidden_weight, self.hidden_bias))
        return LARGEST_BIAS * torch.sigmoid(_gather(F.linear(hidden, self.out_weight), self.index))


def as_square(index: Tensor) -> Tensor:
    """(positions²,) or (positions, positions) -> (positions, positions)."""
    side = int(index.numel() ** 0.5)
    return index.reshape(side, side)

"""Min–max ranges.

    latest           [min x, max x]                                of the tensor at hand
    running          [min over all x, max over all x]
    moving average   m ← m + c·(min x − m),  M alike               c = 0.01; the first tensor sets the range

A quantizer that is used `n` times in each forward (the inputs of a concat, pyramid levels through one head) must cover
all of these tensors. Moved towards each in turn, a range would settle at the mean of theirs, which clips the wider
ones; so it moves towards the hull of the last `n`, as far in `n` uses as otherwise in one:

    L = min of min x over the last n tensors,  U = max of max x
    m ← m + cₙ·(L − m),  M ← M + cₙ·(U − M)                        cₙ = 1 − (1 − c)^(1/n)
    m ← min(m, L),  M ← max(M, U)                                  while there are fewer than n
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qbench.numerics.qparams import QSpec
from qbench.numerics.scalars import Number, maximum, minimum, of_numbers, where
from qbench.observers.base import LatestObserver, Observer, stored


class LatestMinMaxObserver(LatestObserver):
    """Range of the tensor at hand: the one definition of a weight's range in train, eval and convert."""


class MinMaxObserver(Observer):
    """Range of everything seen."""

    @property
    def weight_of_newest(self) -> float | None:
        """See `Observer.weight_of_newest`: −1, as none has a weight."""
        return -1.0 if type(self).follow is MinMaxObserver.follow else None

    @of_numbers
    def follow(self, low: Number, high: Number, *state: Number) -> tuple[Number, ...]:
        """Widen the range."""
        low, high = minimum(state[0], low), maximum(state[1], high)
        return low, high, low, high


class MovingAverageMinMaxObserver(Observer):
    """Exponential moving average of the range of each tensor, or of the hull of the ranges of the last few.

    Subclasses say with `range_of` which range a tensor needs.

    Args:
        spec: What is wanted.
        averaging_constant: Weight `c` of the newest tensor; of the newest forward where that has several.

    Attributes:
        uses: `n`, how many tensors a forward shows it.
        recent: float32 buffer (2, uses, *range): both ends of the last `uses` tensors, oldest first, [+inf, −inf] where
            there was none. Only where `uses` is above 1.
    """

    uses = 1

    recent: Tensor

    def __init__(self, spec: QSpec, averaging_constant: float = 0.01) -> None:
        super().__init__(spec)
        self.averaging_constant = averaging_constant

    def expect(self, uses: int) -> None:
        """Say how many tensors a forward shows it; what it remembers of single tensors is forgotten.

        A forward may show more or fewer: the hull is that of the last `uses` tensors, whichever forward they are of.

        Args:
            uses: `n`, 1 or more.
        """
        self.uses = uses
        if uses > 1:
            nothing = torch.tensor([[torch.inf], [-torch.inf]], dtype=self.min_val.dtype, device=self.min_val.device)
            self.register_buffer("recent", nothing.repeat(1, uses))
        elif "recent" in self._buffers:
            del self.recent

    @property
    def weight_of_newest(self) -> float | None:
        """See `Observer.weight_of_newest`: `c`; None with several uses, as it then follows their hull."""
        averages = type(self).follow is MovingAverageMinMaxObserver.follow and self.uses == 1
        return self.averaging_constant if averages else None

    def state(self) -> tuple[Tensor, ...]:
        """The range; with several uses what it follows, too."""
        return (*super().state(), self.recent) if self.uses > 1 else super().state()

    def keep(self, low: Tensor, high: Tensor, *rest: Tensor) -> None:
        """Remember a range and what it follows."""
        super().keep(low, high)
        for recent in rest:
            self.recent = stored(self.recent, recent)

    @of_numbers
    def follow(self, low: Number, high: Number, *state: Number) -> tuple[Number, ...]:
        """Move the range towards this one; the first tensor sets it (decided on the device, without a sync)."""
        before, recent = state[:2], state[2:]
        if recent:
            first, low, high, newest = self._hull(low, high, *state)
            recent = (newest,)
            weight = 1.0 - (1.0 - self.averaging_constant) ** (1.0 / self.uses)
        else:
            first = before[0] > before[1]  # [+inf, −inf] stands for nothing seen; one infinite value does not
            weight = self.averaging_constant
        low, high = (
            where(first, new, old + weight * (new - old))
            for old, new in zip(before, (low, high), strict=True)
        )
        return low, high, low, high, *recent

    def _hull(
        self, low: Tensor, high: Tensor, min_val: Tensor, max_val: Tensor, recent: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Whether a range is among the first `uses`, the hull (then with the range that is kept), and the last few."""
        newest = torch.stack((low, high)).unsqueeze(1)  # (2, 1, *range)
        older = recent[:, 1:]
        if older.ndim != newest.ndim:  # per channel, before any data
            older = older.reshape(*older.shape, *[1] * low.ndim).expand(-1, -1, *low.shape)
        first = recent[0, 0] > recent[1, 0]
        recent = torch.cat((older, newest.to(older.dtype)), 1)
        low, high = recent[0].amin(0), recent[1].amax(0)
        # A range that is kept without what it came from is of a state dict: it must not be lost.
        low = torch.where(first, torch.minimum(min_val, low), low)
        return first, low, torch.where(first, torch.maximum(max_val, high), high), recent

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # Of a model that was recorded with other examples, or by a version without `recent`, only the range is taken.
        name = f"{prefix}recent"
        if self.uses == 1:
            state_dict.pop(name, None)
        elif name not in state_dict or state_dict[name].shape[1] != self.uses:
            self.expect(self.uses)
            state_dict[name] = self.recent
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

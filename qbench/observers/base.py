"""What an observer is: it watches tensors and answers with the range that they need."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qbench.attributes import own_attributes
from qbench.errors import ConfigError
from qbench.numerics.blocks import at_hand, dense
from qbench.numerics.interval import Numbers, is_served
from qbench.numerics.qparams import QParams, QSpec, choose_qparams, grid_of, in_groups
from qbench.numerics.scalars import Number, is_of_numbers, numbers, quietly


class Observer(nn.Module):
    """Base of the observers: keeps a range [min_val, max_val] per tensor or per channel.

    Subclasses implement `follow`, which combines ranges, and `range_of` where a tensor needs another range than from
    its lowest to its highest value; or `update`, which is both. The range starts as [+inf, −inf]: nothing was seen.

    Args:
        spec: What is wanted; `spec.axis` decides per tensor or per channel.
    """

    # A stateless observer answers with the range of the tensor at hand, whatever was seen before.
    stateless = False
    # Whether values may lie outside the range that it answers with: their gradient is then 0.
    clips = False

    min_val: Tensor
    max_val: Tensor

    def __init__(self, spec: QSpec) -> None:
        super().__init__()
        self.spec = spec
        if not self.stateless:
            self.register_buffer("min_val", torch.tensor(float("inf")))
            self.register_buffer("max_val", torch.tensor(float("-inf")))

    def range_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Lowest and highest value that `x` needs, float32, (), (channels,) or (out, in/group_size)."""
        if self.spec.axis is None:
            low, high = torch.aminmax(dense(x.detach()))
            return low.float(), high.float()
        rows = self.rows(x)  # Two reductions along an axis are vectorised on CPUs, `aminmax` along an axis is not.
        return self.from_rows(rows.amin(1), x), self.from_rows(rows.amax(1), x)

    def rows(self, x: Tensor) -> Tensor:
        """`x`, float32, with one row for each scale.

        per tensor    (1, values)
        per channel   (channels, values)
        per group     (out · in/group_size, group_size)
        """
        x = x.detach().float()
        if self.spec.group_size is not None:
            return in_groups(x, self.spec.group_size).flatten(0, 1)
        if self.spec.axis is None:
            return x.reshape(1, -1)
        return x.movedim(self.spec.axis, 0).flatten(1)

    def from_rows(self, values: Tensor, x: Tensor) -> Tensor:
        """One value for each row as one for each scale: (rows,) -> (), (channels,) or (out, in/group_size)."""
        if self.spec.group_size is not None:
            return values.reshape(x.shape[0], -1)
        return values.squeeze(0) if self.spec.axis is None else values

    def update(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Take `x` into account and return the range as new tensors."""
        return self.take(*self.range_of(x))

    def take(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Take the range that one tensor needs into account and return the range as new tensors."""
        low, high, *state = self.follow(low, high, *self.state())
        self.keep(*state)
        return low, high

    def follow(self, low: Number, high: Number, *state: Number) -> tuple[Number, ...]:
        """The range with that of one more tensor, and what to remember; nothing is changed, so that it can be compiled.

        On a CPU, one that says `qbench.numerics.scalars.of_numbers` gets numbers of a range that is one.

        Args:
            low: Lowest value that the tensor needs.
            high: Highest value that it needs.
            state: As of `state()`.

        Returns:
            Both ends of the range, then the new state.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must implement follow(low, high, *state), or update(x) -> (low, high)"
        )

    def state(self) -> tuple[Tensor, ...]:
        """What it remembers; the range first."""
        return self.min_val, self.max_val

    def settings(self) -> tuple[tuple[str, Any], ...]:
        """What it has apart from tensors: those of the same type and settings follow ranges alike."""
        return tuple(own_attributes(self).items())

    @property
    def by_ends(self) -> bool:
        """Whether all that it wants to know of a tensor is its lowest and highest value: see `observe_ends`."""
        kind, base = type(self), Observer
        inherits = (kind.forward, kind.update, kind.range_of) == (base.forward, base.update, base.range_of)
        return inherits and self.spec.axis is None

    @property
    def weight_of_newest(self) -> float | None:
        """The weight of the newest range in a moving average of ranges, −1 where all that was seen is kept; else None.

        Of an observer with such a weight, that and its range say how it follows: code in other languages can do it too.
        """
        return None

    def expect(self, uses: int) -> None:
        """Say how many tensors a forward shows it, 1 or more. Here: that does not matter."""

    def keep(self, low: Tensor, high: Tensor, *rest: Tensor) -> None:
        """Remember a range, and whatever else `state` has."""
        self.min_val, self.max_val = stored(self.min_val, low), stored(self.max_val, high)

    @torch.no_grad()
    def forward(self, x: Tensor) -> QParams:
        """Observe `x` and return the grid that now holds."""
        return choose_qparams(*self.update(x), self.spec)

    @torch.no_grad()
    def observe_ends(self, low: Tensor, high: Tensor) -> QParams:
        """`forward`, given the lowest and the highest value of `x`; only where `by_ends`."""
        return choose_qparams(*self.take(low, high), self.spec)

    @torch.no_grad()
    def numbers_of_ends(self, low: Tensor, high: Tensor) -> Numbers | None:
        """`observe_ends` in numbers; None where it takes tensors."""
        kind, state = type(self), self.state()
        plain = is_of_numbers(kind.follow) and kind.take is Observer.take and not state[2:]
        if not plain or self.spec.power_of_two or not is_served(self.spec):
            return None
        if any(value.ndim for value in state) or not (at_hand(low) and at_hand(state[0])):
            return None
        with quietly():
            found = self.follow(*numbers(low, high, *state))
            scale, zero_point = grid_of(found[0], found[1], self.spec)
        for buffer, value in zip(state, found[2:], strict=True):
            buffer.fill_(value.item())
        return Numbers(scale.item(), zero_point, self.spec.qmin, self.spec.qmax)

    def extra_repr(self) -> str:
        """Nothing: the quantizer prints the grid."""
        return ""


class LatestObserver(Observer):
    """Answers with the range of the tensor at hand: the one definition of a weight's range in train, eval, convert."""

    stateless = True

    def expect(self, uses: int) -> None:
        """See `Observer.expect`: the tensor at hand is all that matters, also where a base remembers others."""

    def update(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the range of `x`."""
        return self.range_of(x)


def stored(buffer: Tensor, value: Tensor) -> Tensor:
    """Write `value` into the buffer in place (DDP and compiled graphs refer to it); a first use may grow it."""
    if buffer.shape != value.shape:
        return value.clone()
    return buffer.copy_(value)


def share_between(name: str, value: float, low: float, high: float) -> float:
    """`value`, checked: low < value ≤ high.

    Raises:
        ConfigError: it lies outside.
    """
    if not low < value <= high:
        raise ConfigError(
            f"{name}={value!r}: expected a number above {low} and up to {high}; {name}={high} clips nothing"
        )
    return value

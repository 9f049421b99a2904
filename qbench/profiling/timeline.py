"""Whose each moment of a training step is.

    share of a mark = time of the next mark − its own          so all shares together are the whole step

forward   A layer's share goes from its call to its return.
backward  Autograd numbers its nodes as it records them: those that got their numbers while a layer ran are the layer's.
          A node's share goes from its start to the start of the next node, so it holds what adds up gradients of
          branches.

A watched module only has hooks on itself: hooks on what is inside a QAT layer would change what it computes with.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import time
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

#: Owners that are no layers.
OUTSIDE, OPTIMIZER = "outside layers", "optimizer"
_NOT_COUNTED = ""
# The number of nodes that hand a gradient to a leaf: they run as soon as they can.
_ACCUMULATES = 2**64 - 1


class Clock(Protocol):
    """Takes times on a device."""

    def now(self) -> Any:
        """A point in time."""

    def settle(self) -> None:
        """Wait until everything before has happened."""

    def seconds(self, start: Any, end: Any) -> float:
        """From one point to another; after `settle`."""


class HostClock:
    """For CPUs: what is called has happened when the call returns."""

    def now(self) -> float:
        """Seconds since some start."""
        return time.perf_counter()

    def settle(self) -> None:
        """Nothing to wait for."""

    def seconds(self, start: float, end: float) -> float:
        """Their difference."""
        return end - start


class CudaClock:
    """For CUDA: events in the stream, so that the step runs as it does without a clock.

    Args:
        device: Where the model is.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.current_stream(device)

    def now(self) -> torch.cuda.Event:
        """An event that happens when what was launched before is done."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        return event

    def settle(self) -> None:
        """Wait for the device."""
        torch.cuda.synchronize(self._device)

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        """On the device, to about a microsecond."""
        return start.elapsed_time(end) / 1000


class Watch:
    """A training step with marks; hooks are there while it is entered.

    Args:
        layers: Modules by the owner whose time and memory is theirs; none of them inside another. Without any, only
            the phases are told apart.
        clock: Takes the times.

    Attributes:
        owner: Whose the present moment is.
    """

    def __init__(self, layers: Mapping[str, nn.Module], clock: Clock) -> None:
        self.owner = OUTSIDE
        self._layers, self._clock = layers, clock
        self._phase = "forward"
        self._marks: list[tuple[str, str, Any]] = []
        self._running: list[tuple[str, int]] = []
        self._recorded: list[tuple[int, int, str]] = []  # first number, number after the last, owner
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Watch:
        for path, module in self._layers.items():
            self._handles += [
                module.register_forward_pre_hook(functools.partial(self._enter, path), prepend=True),
                module.register_forward_hook(self._leave, always_call=True),
            ]
        return self

    def __exit__(self, *args: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def begin(self, phase: str, owner: str = OUTSIDE) -> None:
        """A phase of the step starts: `"forward"`, `"backward"` or `"update"`."""
        self._phase = phase
        self._mark(owner)

    def end(self) -> None:
        """The step is over."""
        self._mark(_NOT_COUNTED)

    def follow(self, loss: Tensor) -> None:
        """Mark the start of every node when backward reaches it; call it between forward and backward.

        Args:
            loss: What backward starts from.
        """
        self._mark(_NOT_COUNTED)
        if not self._layers:
            return
        waiting, seen = [(loss.grad_fn, OUTSIDE)], set()
        self._recorded.sort()
        while waiting:
            node, reader = waiting.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            owner = self._owner_of(node, reader)
            self._handles.append(node.register_prehook(functools.partial(self._start, owner)))
            waiting += [(source, owner) for source, _ in node.next_functions]

    def shares(self) -> dict[tuple[str, str], float]:
        """Seconds by owner and phase; after `end`."""
        self._clock.settle()
        found: dict[tuple[str, str], float] = defaultdict(float)
        for (owner, phase, start), (_, _, end) in itertools.pairwise(self._marks):
            if owner != _NOT_COUNTED:
                found[owner, phase] += self._clock.seconds(start, end)
        return found

    def _mark(self, owner: str) -> None:
        self.owner = owner
        self._marks.append((owner, self._phase, self._clock.now()))

    def _enter(self, path: str, module: nn.Module, args: Any) -> None:
        self._running.append((self.owner, _next_number()))
        self._mark(path)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        before, first = self._running.pop()
        self._recorded.append((first, _next_number(), self.owner))
        self._mark(before)

    def _start(self, owner: str, gradients: Any) -> None:
        self._mark(owner)

    def _owner_of(self, node: Any, reader: str) -> str:
        number = node._sequence_nr()
        if number == _ACCUMULATES:
            return reader
        index = bisect.bisect_right(self._recorded, number, key=lambda span: span[0]) - 1
        if index < 0:
            return OUTSIDE
        _, end, owner = self._recorded[index]
        return owner if number < end else OUTSIDE


def _next_number() -> int:
    """The number of the node that autograd records next, in this thread."""
    number: int = torch._C._autograd._get_sequence_nr()
    return number

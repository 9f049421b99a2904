"""Functions of tensors as generated code: one `torch.compile` each, for all sizes, with the function itself behind it.

    call   →   compiled once a configuration, checked once against the eager function, bit for bit   →   generated code
                        |                          |
                no compiler, an error       other bits: the eager function from then on, with one line in the log

Whole models compile as well; this is for eager training, where a few functions a layer are worth generating and the
rest of a model need not be traceable. Functions are of tensors and of constants: dynamo's guards then are on tensors
alone, no module is looked at in a call, and layers of the same configuration share one piece of code.

Where arguments of the same shapes, strides and dtypes went through dynamo before, what it called then is called
without it: its way to the code takes twice as long as the code of a small layer.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import importlib
import itertools
import logging
import re
import types
import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

Tensors = tuple[Tensor | None, ...]

#: Types of the devices that code is generated for.
DEVICES = ("cpu", "cuda")
_T = TypeVar("_T")

_LOG = logging.getLogger("qbench")
_NUMBERS = itertools.count()
# Why there is no generated code in this process: one failing compiler is enough to know.
_refused: list[str] = []
# Every reason that was logged.
_reasons: list[str] = []
_standing: dict[Any, Any] = {}


class Generated:
    """A function as generated code.

    Args:
        function: Of tensors (or None) first, then of `constants`; answers with a tuple of tensors. It may write to its
            arguments.
        constants: What else it is called with.
        sample: Makes arguments, given the constants, on which generated and eager code must agree, bit for bit; sums in
            it must be exact in any order.

    Attributes:
        failed: Why it is the eager function after all; empty where it is generated.
    """

    def __init__(
        self,
        function: Callable[..., Tensors],
        constants: tuple[Any, ...],
        sample: Callable[..., Sequence[Tensor | None]],
    ) -> None:
        self.failed = ""
        self._eager = functools.partial(_call, function, constants)
        self._backend = _Backend()
        self._compiled = _compiled(function, constants, self._backend)
        self._known: dict[Any, tuple[_Graph, list[int], int]] = {}
        self._sample = functools.partial(sample, *constants)
        self._checked = False

    def ready(self) -> bool:
        """Whether it is generated code; compiles and checks it at the first question."""
        if not self._checked and not self.failed:
            self._checked = True
            self._check()
        return not self.failed

    @torch.no_grad()
    def __call__(self, *tensors: Tensor | None) -> Tensors:
        """The function's answer; from the eager function where compiling for these arguments fails."""
        if not self.failed:
            # The sizes of a Parameter would be constants to dynamo, and whether there is a gradient a guard.
            given = [x.detach() if x is not None and x.requires_grad else x for x in tensors]
            key = tuple(map(_known_by, given))
            try:
                known = self._known.get(key)
                if known is not None:
                    with contextlib.suppress(AssertionError):
                        return _direct(known, given)
                return self._learn(key, given)
            except Exception as error:  # whatever a compiler raises, before anything was computed
                self._give_up(error)
        return self._eager(*tensors)

    def _learn(self, key: Any, given: Sequence[Tensor | None]) -> Tensors:
        """Call by way of dynamo, and remember what it called if the answer is just what that gave."""
        self._backend.called = None
        found = self._compiled(*given)
        if self._backend.called is not None:
            graph, outputs = self._backend.called
            self._backend.called = None
            places = [index for index, value in enumerate(found) if value is not None]
            same = len(places) == len(outputs) and all(found[i] is out for i, out in zip(places, outputs, strict=True))
            if graph.inputs is not None and same:
                self._known[key] = graph, places, len(found)
        return found

    @torch.no_grad()
    def _check(self) -> None:
        if _refused:
            self.failed = _refused[0]
            return
        # Views would be compiled for, apart from what comes in training.
        ours, theirs = ([None if x is None else x.clone() for x in self._sample()] for _ in range(2))
        for tensor in ours:
            if tensor is not None and tensor.ndim:
                torch._dynamo.maybe_mark_dynamic(tensor, list(range(tensor.ndim)))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # of the compiler's own imports
                found = self._compiled(*ours)
        except Exception as error:  # whatever a compiler raises
            self._give_up(error)
            _refused.append(self.failed)
            return
        wanted = self._eager(*theirs)
        pairs = itertools.chain(zip(found, wanted, strict=True), zip(ours, theirs, strict=True))
        if not all(_equal(a, b) for a, b in pairs):
            self._give_up("generated code gives other bits than PyTorch's operators here")

    def _give_up(self, reason: object) -> None:
        text = reason if isinstance(reason, str) else f"{type(reason).__name__}: {' '.join(str(reason).split())[:200]}"
        self.failed = text
        _reasons.append(text)
        _LOG.warning("fast path: %s; the plain path goes on, with the same codes", text)


@dataclasses.dataclass(frozen=True)
class BothWays:
    """A step as generated code, forward and backward."""

    forward: Generated
    backward: Generated

    def ready(self) -> bool:
        """Whether both directions are compiled and checked; where they are not, the log says why."""
        return self.forward.ready() and self.backward.ready()


def refusals() -> tuple[str, ...]:
    """Why functions are not generated code in this process, each reason once."""
    return tuple(dict.fromkeys(_reasons))


def _call(function: Callable[..., Tensors], constants: tuple[Any, ...], *tensors: Tensor | None) -> Tensors:
    return function(*tensors, *constants)


@dataclasses.dataclass(frozen=True)
class _Graph:
    """What Inductor made of a graph.

    Attributes:
        call: Takes the graph's inputs, answers with its outputs.
        inputs: Which argument each input is, and of which of its axes it is the size (None: itself); None where that
            is not understood.
    """

    call: Callable[..., Sequence[Tensor]]
    inputs: tuple[tuple[int, int | None], ...] | None


class _Backend:
    """Inductor, noting which graph is called and what it answers."""

    def __init__(self) -> None:
        self.called: tuple[_Graph, Sequence[Tensor]] | None = None

    def __call__(self, module: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Sequence[Tensor]]:
        graph = _Graph(torch._dynamo.lookup_backend("inductor")(module, inputs), _inputs_of(module))

        def call(*args: Any) -> Sequence[Tensor]:
            found = graph.call(*args)
            self.called = graph, found
            return found

        return call


_SOURCE = re.compile(r"L\['tensors'\]\[(\d+)\](?:\.size\(\)\[(\d+)\])?")


def _inputs_of(module: torch.fx.GraphModule) -> tuple[tuple[int, int | None], ...] | None:
    found = []
    for node in module.graph.nodes:
        if node.op == "placeholder":
            source = getattr(node.meta.get("grapharg"), "source", None)
            name = getattr(source, "name", "")
            match = _SOURCE.fullmatch(name() if callable(name) else name)
            if match is None:
                return None
            found.append((int(match[1]), None if match[2] is None else int(match[2])))
    return tuple(found)


def _known_by(x: Tensor | None) -> Any:
    """What of an argument tells code from code: of one axis, which is as long as the others say, its length does not.

    Where it is of another length all the same, the code finds that out before it computes anything.
    """
    if x is None:
        return None
    return x.dtype if x.ndim < 2 and x.is_contiguous() else (x.shape, x.stride(), x.dtype)


def _direct(known: tuple[_Graph, list[int], int], given: Sequence[Any]) -> Tensors:
    graph, places, count = known
    args = [given[index] if axis is None else given[index].shape[axis] for index, axis in graph.inputs or ()]
    found: list[Tensor | None] = [None] * count
    for place, value in zip(places, graph.call(*args), strict=True):
        found[place] = value
    return tuple(found)


def _compiled(
    function: Callable[..., Tensors], constants: tuple[Any, ...], backend: _Backend
) -> Callable[..., Tensors]:
    def call(*tensors: Tensor | None) -> Tensors:
        return function(*tensors, *constants)

    importlib.import_module("torch._inductor.inductor_prims")  # registers prims.fma
    # Dynamo keeps compiled code by code object: with one of its own, nothing is shared with other constants.
    code = call.__code__.replace(co_name=f"{function.__name__}_{next(_NUMBERS)}")
    own = types.FunctionType(code, call.__globals__, code.co_name, None, call.__closure__)
    options: dict[str, Any] = {"guard_filter_fn": _on_arguments}
    # Sizes are marked as dynamic on the sample. With dynamic=True the constants would be, too, an input each.
    return torch.compile(own, fullgraph=True, backend=backend, options=options)


def _on_arguments(guards: Sequence[Any]) -> list[bool]:
    """Keep the guards on arguments and on sizes; constants do not change."""
    return [not entry.name or "tensors" in entry.name for entry in guards]


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return torch.equal(a, b) and torch.equal(a.signbit(), b.signbit())


@functools.lru_cache(maxsize=256)
def generated(
    function: Callable[..., Tensors], sample: Callable[..., Sequence[Tensor | None]], *constants: Hashable
) -> Generated:
    """The one `Generated` of a function and these constants."""
    return Generated(function, constants, sample)


def standing_for(configured: _T, *key: Any) -> _T:
    """A copy of the first object that was given with this key: the constant of all that are configured alike.

    Args:
        configured: What its layer owns; what it keeps beside its configuration must not matter to the function.
        key: Its kind and its whole configuration, hashable.
    """
    if key not in _standing:
        _standing[key] = copy.deepcopy(configured)
    found: _T = _standing[key]
    return found


def fma(x: Tensor, factor: Tensor, constant: Tensor) -> Tensor:
    """`x·factor + constant`, rounded once: `addcmul`, which generated code for CPUs would round twice."""
    if torch.compiler.is_compiling() and x.device.type == "cpu":
        found: Tensor = torch.ops.prims.fma(x, factor, constant)
        return found
    return torch.addcmul(constant, x, factor)

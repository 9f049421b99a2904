"""Functions of tensors as generated code: one `torch.compile` each, for all sizes, with the function itself behind it.

    call   →   compiled once a configuration, checked once against the eager function, bit for bit   →   generated code
                        |                          |
                no compiler, an error       other bits: the eager function from then on, with one line in the log

Whole models compile as well; this is for eager training, where a few functions a layer are worth generating and the
rest of a model need not be traceable. Functions are of tensors and of constants: dynamo's guards then are on tensors
alone, no module is looked at in a call, and layers of the same configuration share one piece of code.

Where arguments of the same shapes, strides and dtypes went through dynamo before, Inductor's code is called without it
and without what AOTAutograd puts around: these ways to the code take three times as long as the code of a small layer.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import importlib
import itertools
import logging
import operator
import re
import threading
import types
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

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
# Inductor keeps a value in memory that it guesses to be dear. What is to be kept is said here, with `once`.
_NOTHING_KEPT = {"realize_reads_threshold": 64, "realize_acc_reads_threshold": 64, "realize_opcount_threshold": 512}
# Every reason that was logged.
_reasons: list[str] = []
_standing: dict[Any, Any] = {}
_LOCK = threading.Lock()


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
        self._known: dict[Any, _Way] = {}
        self._sample = functools.partial(sample, *constants)
        self._checked = False

    def ready(self) -> bool:
        """Whether it is generated code; compiles and checks it at the first question."""
        if not self._checked and not self.failed:
            self._checked = True
            self._check()
        return not self.failed

    def __call__(self, *tensors: Tensor | None) -> Tensors:
        """The function's answer, without gradients; from the eager function where compiling for the arguments fails."""
        if not self.failed:
            # What tells code from code: of one axis, which is as long as the others say, its length does not. Where it
            # is of another length all the same, the code finds that out before it computes anything.
            key = tuple(
                [x if x is None else x.dtype if x.ndim < 2 else (x.shape, x.stride(), x.dtype) for x in tensors]
            )
            try:
                known = self._known.get(key)
                if known is not None:
                    with contextlib.suppress(AssertionError):
                        return known(tensors)
                # The sizes of a Parameter would be constants to dynamo, and whether there is a gradient a guard.
                return self._learn(key, [x if x is None else x.detach() for x in tensors])
            except Exception as error:  # whatever a compiler raises, before anything was computed
                self._give_up(error)
        with torch.no_grad():
            return self._eager(*tensors)

    @torch.no_grad()
    def _learn(self, key: Any, given: Sequence[Tensor | None]) -> Tensors:
        """Call by way of dynamo, and remember what it called if the answer is just what that gave."""
        versions = [None if x is None else x._version for x in given]
        self._backend.called = None
        found = self._compiled(*given)
        written = [i for i, x in enumerate(given) if x is not None and x._version != versions[i]]
        way, self._backend.called = _way(self._backend.called, found, written), None
        if way is not None:
            self._known[key] = way
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
        if not all(same_bits(a, b) for a, b in pairs):
            self._give_up("generated code gives other bits than PyTorch's operators here")

    def _give_up(self, reason: object) -> None:
        self.failed = note_refusal(reason)
        _LOG.warning("fast path: %s; the plain path goes on, with the same codes", self.failed)


@dataclasses.dataclass(frozen=True)
class BothWays:
    """A step as generated code, forward and backward."""

    forward: Generated
    backward: Generated

    def ready(self) -> bool:
        """Whether both directions are compiled and checked; where they are not, the log says why."""
        return self.forward.ready() and self.backward.ready()


def note_refusal(reason: object) -> str:
    """Note why there is no code, an exception or a text; answers with the text."""
    text = reason if isinstance(reason, str) else f"{type(reason).__name__}: {' '.join(str(reason).split())[:200]}"
    _reasons.append(text)
    return text


def refusals() -> tuple[str, ...]:
    """Why functions are not generated code in this process, each reason once."""
    return tuple(dict.fromkeys(_reasons))


def _call(function: Callable[..., Tensors], constants: tuple[Any, ...], *tensors: Tensor | None) -> Tensors:
    return function(*tensors, *constants)


@dataclasses.dataclass(frozen=True)
class _Called:
    """A call of what Inductor made of a graph.

    Attributes:
        code: Takes a list of the graph's inputs, which it empties, answers with its outputs.
        inputs: Which argument each input is, and of which of its axes it is the size (None: itself); None where that
            is not understood.
        outputs: What it answered.
    """

    code: Callable[[list[Any]], Sequence[Tensor]]
    inputs: tuple[tuple[int, int | None], ...] | None
    outputs: Sequence[Tensor]


class _Backend:
    """Inductor, noting which code is called and what it answers."""

    def __init__(self) -> None:
        self.called: _Called | None = None

    def __call__(self, module: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Sequence[Tensor]]:
        with importlib.import_module("torch._inductor.config").patch(_NOTHING_KEPT):
            graph = torch._dynamo.lookup_backend("inductor")(module, inputs)
        wanted = _inputs_of(module)

        def call(*args: Any) -> Sequence[Tensor]:
            with _noting() as calls:
                found: Sequence[Tensor] = graph(*args)
            # Where more than one code is called, or with other inputs, or on a way of another version: the whole graph.
            self.called = _Called(lambda given: graph(*given), wanted, found)
            if len(calls) == 1 and calls[0].code is not None:
                code, given, outputs = calls[0].code, calls[0].given, calls[0].outputs
                if len(given) == len(args) and all(map(operator.is_, given, args)):
                    self.called = _Called(code, wanted, outputs)
            return found

        return call


class _Call(NamedTuple):
    code: Callable[[list[Any]], Sequence[Tensor]] | None
    given: list[Any]
    outputs: Sequence[Tensor]


@contextlib.contextmanager
def _noting() -> Iterator[list[_Call]]:
    """The calls of code from Inductor within."""
    kind = importlib.import_module("torch._inductor.output_code").CompiledFxGraph
    calls: list[_Call] = []

    def noted(self: Any, inputs: list[Any]) -> Sequence[Tensor]:
        given = list(inputs)  # the code empties it
        found: Sequence[Tensor] = plain(self, inputs)
        calls.append(_Call(getattr(self, "current_callable", None), given, found))
        return found

    with _LOCK:
        plain, kind.__call__ = kind.__call__, noted
        try:
            yield calls
        finally:
            kind.__call__ = plain


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


class _Way:
    """From arguments to Inductor's code, and from what it answers to the function's answer.

    Args:
        called: A call of the code.
        places: Which of the function's answers its outputs are.
        count: How many answers there are; the others are None.
        written: Which arguments it writes to: autograd must hear of that.
    """

    def __init__(self, called: _Called, places: list[int], count: int, written: list[int]) -> None:
        self._code = called.code
        self._inputs = called.inputs or ()
        self._all = places == list(range(count))
        self._places = [places.index(i) if i in places else None for i in range(count)]
        self._written = written

    def __call__(self, given: Sequence[Any]) -> Tensors:
        found = self._code([given[index] if axis is None else given[index].shape[axis] for index, axis in self._inputs])
        if self._written:
            torch.autograd.graph.increment_version([given[index] for index in self._written])
        if self._all:
            return tuple(found)
        return tuple(None if place is None else found[place] for place in self._places)


def _way(called: _Called | None, found: Tensors, written: list[int]) -> _Way | None:
    """The way of a call that went through dynamo; None where its answer is not just what the code gave."""
    if called is None or called.inputs is None:
        return None
    places = [index for index, value in enumerate(found) if value is not None]
    if len(places) != len(called.outputs):
        return None
    same = all(found[i] is out for i, out in zip(places, called.outputs, strict=True))
    return _Way(called, places, len(found), written) if same else None


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


def same_bits(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether both are there and equal, down to the signs of their zeros, or neither is."""
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


def once(x: Tensor) -> Tensor:
    """`x`, which generated code keeps in memory: it would compute it again wherever it is used, for each value there.

    For what is small and follows from sums, such as a factor for each channel: dividing in float64 for every value
    takes three times as long as all the rest of a loop over an activation.
    """
    return x.as_strided(x.shape, x.stride())


def fma(x: Tensor, factor: Tensor, constant: Tensor) -> Tensor:
    """`x·factor + constant`, rounded once: `addcmul`, which generated code for CPUs would round twice."""
    if torch.compiler.is_compiling() and x.device.type == "cpu":
        found: Tensor = torch.ops.prims.fma(x, factor, constant)
        return found
    return torch.addcmul(constant, x, factor)

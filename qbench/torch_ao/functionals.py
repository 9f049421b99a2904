"""Which operation each FloatFunctional of a model computes.

The class has a method for every operation, and nothing but a run tells which of them is called. Each module that owns
one is traced alone; what that leaves open is found by running the model on its example inputs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx, nn

from qbench.modes import evaluating
from qbench.torch_ao.kinds import is_functional

# Method, and for cat its axis.
Call = tuple[str, int]

_METHODS = ("add", "add_relu", "add_scalar", "mul", "mul_scalar", "cat", "matmul")


def calls_of(model: nn.Module, examples: Sequence[tuple[Any, ...]]) -> dict[int, set[Call] | None]:
    """What is called on each FloatFunctional: its id → the methods; none where its owner was traced and calls none.

    Args:
        model: It is run in eval without gradients; its modes and buffers stay.
        examples: Tuples of inputs; may be empty.

    Returns:
        None in place of the methods where neither tracing nor the examples tell.
    """
    found: dict[int, set[Call]] = {id(m): set() for m in model.modules() if is_functional(m)}
    traced: set[int] = set()
    with _watched(model, found):
        for owner in model.modules():
            owned = [id(child) for child in owner.children() if is_functional(child)]
            # Whatever comes out of tracing a user's forward: running it is the other way to find out.
            with contextlib.suppress(Exception):
                if owned:
                    _Tracer().trace(owner)
                    traced.update(owned)
        if not all(calls or key in traced for key, calls in found.items()):
            _run(model, examples)
    return {key: calls if calls or key in traced else None for key, calls in found.items()}


class _Tracer(fx.Tracer):
    """Traces one forward: every submodule is a leaf."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _run(model: nn.Module, examples: Sequence[tuple[Any, ...]]) -> None:
    with evaluating(model), torch.random.fork_rng():
        for inputs in examples:
            model(*inputs)


@contextlib.contextmanager
def _watched(model: nn.Module, found: dict[int, set[Call]]) -> Iterator[None]:
    """Note every call of a FloatFunctional's methods: an attribute of the module comes before a method of its class."""
    watched = [module for module in model.modules() if id(module) in found]
    try:
        for module in watched:
            module.__dict__.update({name: _noting(module, name, found[id(module)]) for name in _METHODS})
        yield
    finally:
        for module in watched:
            for name in _METHODS:
                module.__dict__.pop(name, None)


def _noting(module: nn.Module, name: str, calls: set[Call]) -> Any:
    method = getattr(type(module), name)

    def noted(*args: Any, **kwargs: Any) -> Any:
        calls.add((name, kwargs.get("dim", args[1] if len(args) > 1 else 0) if name == "cat" else 0))
        return method(module, *args, **kwargs)

    return noted

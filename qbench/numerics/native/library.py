"""Compiles `layer.cpp` with the compiler, flags and cache of generated code, and calls its functions with tensors."""

from __future__ import annotations

import concurrent.futures
import functools
import importlib
import logging
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

from qbench.numerics.generated import note_refusal

Function = Callable[..., None]

_T = TypeVar("_T")

_LOG = logging.getLogger("qbench")
_SOURCE = "layer.cpp"


class Library(NamedTuple):
    """The functions of `layer.cpp`: tensors stand for their memory, in the order of its arguments."""

    parameters: Function
    again: Function
    turned: Function
    forward: Function
    backward: Function
    backward_of_weight: Function
    clip: Function
    masked: Function
    rounded: Function
    backward_of_rounded: Function
    decode: Function


@functools.cache
def library() -> Library | None:
    """The functions; None where they cannot be compiled here, which the log says once."""
    source = Path(__file__).with_name(_SOURCE).read_text(encoding="utf-8")
    try:
        with warnings.catch_warnings(), concurrent.futures.ThreadPoolExecutor(len(Library._fields)) as pool:
            warnings.simplefilter("ignore", DeprecationWarning)  # of the compiler's own imports
            cache = importlib.import_module("torch._inductor.codecache").CppPythonBindingsCodeCache
            compiled = [pool.submit(_compiled, cache, source, name) for name in Library._fields]
            return Library(*(one.result() for one in compiled))
    except Exception as error:  # whatever a compiler raises
        refuse(error)
        return None


def refuse(reason: object) -> None:
    """Note why C++ does not serve here, an exception or a text."""
    # Told quietly, as generated code goes on; where that fails, too, it warns.
    _LOG.info("fast path: no code in C++: %s", note_refusal(reason))


def trusted(found: _T, same_bits: bool) -> _T | None:
    """What was found if it gives the bits of PyTorch's operators; else None, and a note."""
    if same_bits:
        return found
    refuse("other bits than PyTorch's operators here")
    return None


def loaded() -> Library | None:
    """The functions, if somebody asked for them before and they are there."""
    return library() if library.cache_info().currsize else None


def _compiled(cache: type, source: str, name: str) -> Function:
    declared = re.search(rf"^void {name}\(([^)]*)\)", source, re.MULTILINE)
    assert declared is not None
    types = [argument.strip().rpartition(" ")[0] for argument in declared[1].split(",")]
    names = [f"argument{index}" for index in range(len(types))]
    arguments = ", ".join(f"{kind} {one}" for kind, one in zip(types, names, strict=True))
    entry = f'\nextern "C" void kernel({arguments}) {{ {name}({", ".join(names)}); }}\n'
    # Generated code brings its own vectors and has that of the compiler switched off.
    found: Function = cache.load_pybinding(types, source + entry, extra_flags=("-ftree-loop-vectorize",))  # type: ignore[attr-defined]
    return found

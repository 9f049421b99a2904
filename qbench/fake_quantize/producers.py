"""Which quantizer put out a tensor, while a model runs.

Links are recorded once, at `prepare_qat`. A tensor that reaches a layer straight from a quantizer that the recording
did not see there must not be taken for one of the recorded grid, so quantizers note what they put out and layers look.
Notes are kept beside the tensors, not on them: a tensor that is saved must not carry a module along. A note is void
when the tensor was written to since. Compiled code and inference mode have no version to compare, so no notes either.
"""

from __future__ import annotations

import functools
import weakref
from typing import NamedTuple

import torch
from torch import Tensor

from qbench.numerics.saved_codes import Coded


class _Note(NamedTuple):
    tensor: weakref.ref[Tensor]
    producer: object
    version: int
    coded: Coded | None


# By the identity of the tensor, which the reference confirms: a WeakTensorKeyDictionary takes five times as long.
_NOTES: dict[int, _Note] = {}


def note_producer(tensor: Tensor, producer: object, coded: Coded | None = None) -> Tensor:
    """Note what put out `tensor`, and its codes where they are at hand; returns the tensor."""
    if not torch.compiler.is_compiling() and not tensor.is_inference():
        key = id(tensor)
        reference = weakref.ref(tensor, functools.partial(_NOTES.pop, key))
        _NOTES[key] = _Note(reference, producer, tensor._version, coded)
    return tensor


def producer_of(tensor: Tensor) -> object | None:
    """What put out `tensor`, None where that is not known."""
    note = _note_of(tensor)
    return None if note is None else note.producer


def codes_of(tensor: Tensor) -> Coded | None:
    """The codes that were noted of `tensor`, None where there are none."""
    note = _note_of(tensor)
    return None if note is None else note.coded


def _note_of(tensor: Tensor) -> _Note | None:
    if torch.compiler.is_compiling() or tensor.is_inference():
        return None
    note = _NOTES.get(id(tensor))
    if note is None or note.tensor() is not tensor or note.version != tensor._version:
        return None
    return note

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


class _Note(NamedTuple):
    tensor: weakref.ref[Tensor]
    producer: object
    version: int


# By the identity of the tensor, which the reference confirms: a WeakTensorKeyDictionary takes five times as long.
_NOTES: dict[int, _Note] = {}


def note_producer(tensor: Tensor, producer: object) -> Tensor:
    """Note what put out `tensor`; returns the tensor."""
    if not torch.compiler.is_compiling() and not tensor.is_inference():
        key = id(tensor)
        _NOTES[key] = _Note(weakref.ref(tensor, functools.partial(_NOTES.pop, key)), producer, tensor._version)
    return tensor


def producer_of(tensor: Tensor) -> object | None:
    """What put out `tensor`, None where that is not known."""
    if torch.compiler.is_compiling() or tensor.is_inference():
        return None
    note = _NOTES.get(id(tensor))
    if note is None or note.tensor() is not tensor or note.version != tensor._version:
        return None
    return note.producer

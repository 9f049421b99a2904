"""Which quantizer put out a tensor, while a model runs.

Links are recorded once, at `prepare_qat`. A tensor that reaches a layer straight from a quantizer that the recording
did not see there must not be taken for one of the recorded grid, so quantizers note what they put out and layers look.
Notes are kept beside the tensors, not on them: a tensor that is saved must not carry a module along. A note is void
when the tensor was written to since. Compiled code and inference mode have no version to compare, so no notes either.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_PRODUCERS: Any = WeakTensorKeyDictionary()


def note_producer(tensor: Tensor, producer: object) -> Tensor:
    """Note what put out `tensor`; returns the tensor."""
    if not torch.compiler.is_compiling() and not tensor.is_inference():
        _PRODUCERS[tensor] = (producer, tensor._version)
    return tensor


def producer_of(tensor: Tensor) -> object | None:
    """What put out `tensor`, None where that is not known."""
    if torch.compiler.is_compiling() or tensor.is_inference():
        return None
    producer, version = _PRODUCERS.get(tensor, (None, None))
    return producer if version == tensor._version else None

"""Bytes that autograd keeps from forward to backward.

    saved = Σ nbytes of the distinct storages that nodes save, without those of tensors that are kept anyhow

A storage is counted once, for whoever saved it first: a ReLU's output that the next convolution saves again is the
ReLU's.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from qbench.numerics.saved_codes import kept_tensors_told_to


def saved_for_backward(call: Callable[[], Tensor], *owned: Tensor) -> tuple[Tensor, int]:
    """What a call returns, and the bytes of distinct storages that autograd saves in it.

    Args:
        call: A forward.
        owned: Tensors whose storages are not counted: parameters, buffers, inputs.
    """
    with counting_saved(owned) as found:
        result = call()
    return result, sum(found.values())


@contextlib.contextmanager
def counting_saved(owned: Iterable[Tensor], owner: Callable[[], str] = lambda: "") -> Iterator[Counter[str]]:
    """While it is entered, count what autograd saves.

    Args:
        owned: Tensors whose storages are not counted.
        owner: Says for whom something is saved, when it is.

    Yields:
        Bytes by owner.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in owned}
    found: Counter[str] = Counter()

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            known.add(storage.data_ptr())
            found[owner()] += storage.nbytes()
        return tensor

    with kept_tensors_told_to(note), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield found

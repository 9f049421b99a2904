"""What is worked out once for each weight: its parts, their float copies, their packed form.

A plan costs some passes over the weight, so it is kept for as long as the weight tensor lives (weak keys) and remade
when the weight or the bias was written to (`_version`) or is another tensor. It holds a float copy of the weight: four
or eight bytes a code. Writes that PyTorch does not count (`weight.data.copy_`, a NumPy view) are not seen: replace the
tensor instead.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

Plan = TypeVar("Plan")

# Plans of one weight: a weight that several layers share is read from more than one grid.
_MOST = 4


@dataclasses.dataclass
class _Entry(Generic[Plan]):
    plan: Plan
    versions: tuple[int, ...]
    bias: weakref.ref[Tensor] | None

    def holds(self, versions: tuple[int, ...], bias: Tensor | None) -> bool:
        """Whether the plan was made from these tensors as they are now."""
        return self.versions == versions and (None if self.bias is None else self.bias()) is bias


_ENTRIES: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def remembered(weight: Tensor, bias: Tensor | None, key: Hashable, make: Callable[[], Plan]) -> Plan:
    """The plan of this weight and bias for `key`, made by `make` where there is none that still holds.

    Args:
        weight: Codes; the plan must depend on nothing but weight, bias and key, and must not hold `weight` itself.
        bias: Codes or None.
        key: What else the plan depends on.
        make: Called without arguments.
    """
    tensors = [weight] if bias is None else [weight, bias]
    if any(tensor.is_inference() for tensor in tensors):
        # Writes to inference tensors are not counted at all.
        return make()
    versions = tuple(number for tensor in tensors for number in (tensor._version, tensor.data_ptr()))
    entries: dict[Hashable, _Entry[Plan]] = _ENTRIES.setdefault(weight, {})
    entry = entries.get(key)
    if entry is None or not entry.holds(versions, bias):
        entry = _Entry(make(), versions, None if bias is None else weakref.ref(bias))
        if key not in entries and len(entries) >= _MOST:
            entries.clear()
        entries[key] = entry
    return entry.plan

"""What is worked out once for each weight: how its layer is summed, and its codes as floats.

A plan costs some passes over the weight, so it is kept for as long as the weight tensor lives (weak keys) and remade
when the weight or the bias was written to (`_version`) or is another tensor. It holds the weight as floats: four or
eight bytes a code, and as much again for each form that a kernel packs it into. Writes that PyTorch does not count
(`weight.data.copy_`, a NumPy view) are not seen: replace the tensor instead.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Hashable

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from qbench.ops.exact import Part

# A weight that several layers share is read from more than one grid, a layer from images of more than one size.
_MOST = 4


@dataclasses.dataclass
class Plan:
    """How one layer is summed.

    Attributes:
        parts: What `qbench.ops.exact.plan` returns.
        forms: The weight of every part as floats, by the kind of input that it is packed for (None: as it is).
    """

    parts: list[Part]
    forms: dict[Hashable, list[Tensor]] = dataclasses.field(default_factory=dict)

    def floats(self, weight: Tensor) -> list[Tensor]:
        """The weight of every part, as it is."""
        if None not in self.forms:
            self.forms[None] = [part.floats(weight) for part in self.parts]
        return self.forms[None]

    def packed(self, weight: Tensor, key: Hashable, pack: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """The weight of every part, packed for a kind of input; as it is once too many kinds were seen."""
        if key not in self.forms:
            if len(self.forms) >= _MOST:
                return self.floats(weight)
            self.forms[key] = [pack(part.floats(weight)) for part in self.parts]
        return self.forms[key]


@dataclasses.dataclass
class _Entry:
    plan: Plan
    versions: tuple[int, ...]
    bias: weakref.ref[Tensor] | None

    def holds(self, versions: tuple[int, ...], bias: Tensor | None) -> bool:
        """Whether the plan was made from these tensors as they are now."""
        return self.versions == versions and (None if self.bias is None else self.bias()) is bias


_ENTRIES: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def remembered(weight: Tensor, bias: Tensor | None, key: Hashable, make: Callable[[], list[Part]]) -> Plan:
    """The plan of this weight and bias for `key`, made by `make` where there is none that still holds.

    Args:
        weight: Codes; the parts depend on nothing but weight, bias and key.
        bias: Codes or None.
        key: What else the plan depends on.
        make: Returns the parts.
    """
    tensors = [weight] if bias is None else [weight, bias]
    if any(tensor.is_inference() for tensor in tensors):
        # Writes to inference tensors are not counted at all.
        return Plan(make())
    versions = tuple(number for tensor in tensors for number in (tensor._version, tensor.data_ptr()))
    entries: dict[Hashable, _Entry] = _ENTRIES.setdefault(weight, {})
    entry = entries.get(key)
    if entry is None or not entry.holds(versions, bias):
        entry = _Entry(Plan(make()), versions, None if bias is None else weakref.ref(bias))
        if key not in entries and len(entries) >= _MOST:
            entries.clear()
        entries[key] = entry
    return entry.plan

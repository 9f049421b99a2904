"""Max pools that save their input for backward as codes: `enable_low_memory`.

A max pool keeps the grid of its input, so nothing of it is quantized and `prepare_qat` leaves it as it is. But autograd
keeps its input in float, which of a network whose first layer is followed by one is the largest tensor of all.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qbench.fake_quantize import FakeQuantize
from qbench.fake_quantize.producers import codes_of, producer_of
from qbench.numerics.blocks import at_hand
from qbench.numerics.saved_codes import SavingCodes


class _SavingCodes:
    def forward(self, input: Tensor) -> Tensor:
        """As of the max pool."""
        pool = super().forward  # type: ignore[misc]
        source = producer_of(input)
        if not isinstance(source, FakeQuantize) or not (torch.is_grad_enabled() and at_hand(input)):
            found: Tensor = pool(input)
            return found
        with SavingCodes((input, codes_of(input) or source.snapshot())):
            found = pool(input)
        return found


class SavingMaxPool1d(_SavingCodes, nn.MaxPool1d):
    """MaxPool1d."""


class SavingMaxPool2d(_SavingCodes, nn.MaxPool2d):
    """MaxPool2d."""


class SavingMaxPool3d(_SavingCodes, nn.MaxPool3d):
    """MaxPool3d."""


_SAVING: dict[type[nn.Module], type[nn.Module]] = {
    nn.MaxPool1d: SavingMaxPool1d,
    nn.MaxPool2d: SavingMaxPool2d,
    nn.MaxPool3d: SavingMaxPool3d,
}
_PLAIN = {saving: plain for plain, saving in _SAVING.items()}


def save_codes(module: nn.Module) -> None:
    """Let a max pool save codes; it stays the same object, of a class that derives from its own. Others stay."""
    module.__class__ = _SAVING.get(type(module), type(module))


def save_values(module: nn.Module) -> None:
    """Let it save values again."""
    module.__class__ = _PLAIN.get(type(module), type(module))

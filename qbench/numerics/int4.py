"""Two 4-bit codes in a byte.

    byte[j] = (code[2j] + 8)  |  (code[2j + 1] + 8) << 4           code in [−8, 7]

So the lower four bits hold the even column, the upper four the odd one, each with an offset of 8 (not as two's
complement): the byte 0x88 is two zeros. A row of odd length ends in a code 0 that nobody reads. Rows stay rows:
(…, columns) becomes (…, ceil(columns / 2)).

ExecuTorch's Vulkan backend packs the weights of its 4-bit linear operators like this
(backends/vulkan/patterns/weight_packing_utils.py of 1.5.1; it pads a row to 8 columns). Its 4-bit embedding has the two
halves the other way round.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from qbench.errors import NumericsError

OFFSET = 8
LOWEST, HIGHEST = -8, 7


def pack_int4(codes: Tensor) -> Tensor:
    """Codes, int8 (…, columns) in [−8, 7] -> uint8 (…, ceil(columns / 2)).

    Raises:
        NumericsError: no int8 tensor with an axis, or a code outside [−8, 7].
    """
    if codes.dtype != torch.int8 or codes.ndim == 0:
        raise NumericsError(
            f"pack_int4: got {codes.dtype} of shape {tuple(codes.shape)}, expected int8 codes of shape (…, columns)"
        )
    if bool(((codes < LOWEST) | (codes > HIGHEST)).any()):
        raise NumericsError(
            f"pack_int4: codes from {int(codes.min())} to {int(codes.max())} do not fit 4 bits, [{LOWEST}, {HIGHEST}]; "
            "QSpec(bits=4, symmetric=True, axis=0) gives codes that do"
        )
    codes = F.pad(codes, (0, codes.shape[-1] % 2))
    shifted = (codes + OFFSET).to(torch.uint8)
    return shifted[..., ::2] | (shifted[..., 1::2] << 4)


def unpack_int4(packed: Tensor, columns: int) -> Tensor:
    """Bytes, uint8 (…, ceil(columns / 2)) -> int8 codes (…, columns).

    Raises:
        NumericsError: no uint8 tensor, or rows of another length.
    """
    if packed.dtype != torch.uint8 or packed.ndim == 0 or packed.shape[-1] != (columns + 1) // 2:
        raise NumericsError(
            f"unpack_int4: {columns} columns lie in uint8 of shape (…, {(columns + 1) // 2}), two codes a byte; got "
            f"{packed.dtype} of shape {tuple(packed.shape)}"
        )
    halves = torch.stack((packed & 0x0F, packed >> 4), dim=-1)  # (…, bytes) -> (…, bytes, 2)
    return halves.flatten(-2)[..., :columns].to(torch.int8) - OFFSET

"""Two 4-bit codes a byte: the layout, written down in numbers, and back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qbench.errors import NumericsError
from qbench.numerics.int4 import pack_int4, unpack_int4

LAYOUT = [
    ([0, 0], [0x88]),
    ([-8, 7], [0xF0]),
    ([7, -8], [0x0F]),
    ([1, 2, 3, 4], [0xA9, 0xCB]),
    ([-1, -2, -3], [0x67, 0x85]),  # a row of odd length ends in a zero
    ([5], [0x8D]),
]


@pytest.mark.parametrize(("codes", "packed"), LAYOUT)
def test_layout(codes: list[int], packed: list[int]) -> None:
    found = pack_int4(torch.tensor(codes, dtype=torch.int8))
    assert found.dtype == torch.uint8 and found.tolist() == packed
    assert unpack_int4(found, len(codes)).tolist() == codes


def test_every_byte_is_a_pair() -> None:
    pairs = torch.cartesian_prod(torch.arange(-8, 8), torch.arange(-8, 8)).to(torch.int8)
    packed = pack_int4(pairs)
    assert sorted(packed.flatten().tolist()) == list(range(256))
    assert torch.equal(unpack_int4(packed, 2), pairs)


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 16), (2, 3, 9), (4, 0), (0, 6)])
def test_rows_stay_rows(shape: tuple[int, ...]) -> None:
    codes = torch.randint(-8, 8, shape, dtype=torch.int8)
    packed = pack_int4(codes)
    assert packed.shape == (*shape[:-1], (shape[-1] + 1) // 2)
    assert torch.equal(unpack_int4(packed, shape[-1]), codes)


@pytest.mark.slow  # the import takes long
def test_as_executorch_packs_for_vulkan() -> None:
    utils = pytest.importorskip("executorch.backends.vulkan.patterns.weight_packing_utils")
    codes = torch.randint(-8, 8, (6, 40), dtype=torch.int8)
    assert torch.equal(pack_int4(codes), utils.pack_4bit_weight_tensor(codes))


WRONG = {
    "wide codes": (lambda: pack_int4(torch.tensor([3, 9], dtype=torch.int8)), r"from 3 to 9.*\[-8, 7\].*bits=4"),
    "floats": (lambda: pack_int4(torch.zeros(2, 2)), "float32.*expected int8"),
    "no axis": (lambda: pack_int4(torch.tensor(3, dtype=torch.int8)), r"shape \(\).*columns"),
    "other bytes": (lambda: unpack_int4(torch.zeros(2, 2, dtype=torch.int8), 4), r"uint8 of shape \(…, 2\)"),
    "other length": (lambda: unpack_int4(torch.zeros(2, 2, dtype=torch.uint8), 5), r"5 columns.*shape \(…, 3\)"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input(case: str) -> None:
    make, message = WRONG[case]
    with pytest.raises(NumericsError, match=message):
        result: Tensor = make()
        del result

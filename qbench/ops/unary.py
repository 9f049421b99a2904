"""A function of one value on codes, through a table.

    y = table[x − lowest code of the input's dtype]

The table holds the codes that the target computes for each of the 256 input codes (`Arithmetic.table`), so that one
operator serves every function and every target.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qbench.errors import NumericsError
from qbench.ops.arguments import CODE_DTYPES, empty_like_format, memory_format
from qbench.ops.library import define


def unary(input: Tensor, table: Tensor) -> Tensor:
    """Look every code up.

    Args:
        input: Codes, int8 or uint8, any shape.
        table: (256,) codes, int8 or uint8.

    Raises:
        NumericsError: other dtypes or another shape of the table.
    """
    fake_unary(input, table)
    index = input.contiguous(memory_format=memory_format(input)).to(torch.int32)
    index -= torch.iinfo(input.dtype).min
    return table[index]


def fake_unary(input: Tensor, table: Tensor) -> Tensor:
    """Shape and dtype of `unary`."""
    if input.dtype not in CODE_DTYPES:
        raise NumericsError(f"input has dtype {input.dtype}; expected codes in torch.int8 or torch.uint8")
    if table.dtype not in CODE_DTYPES or tuple(table.shape) != (256,):
        raise NumericsError(
            f"table is {table.dtype} of shape {tuple(table.shape)}; expected 256 codes in torch.int8 or torch.uint8: "
            "qbench.targets.get(target).arithmetic.table(function, parameters, grid, out)"
        )
    return empty_like_format(input.shape, table.dtype, input)


define("unary_q8ta_q8to(Tensor input, Tensor table) -> Tensor", unary, fake_unary)

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
    dense = input.contiguous(memory_format=memory_format(input))
    index = dense.to(torch.int32).sub_(torch.iinfo(input.dtype).min)
    # The order in memory: index_select wants one dimension, and is several times faster than table[index].
    codes = torch.empty_like(dense, dtype=table.dtype)
    torch.index_select(table, 0, _in_memory_order(index), out=_in_memory_order(codes))
    return codes


def _in_memory_order(dense: Tensor) -> Tensor:
    """A dense tensor as one dimension, a view of the same memory."""
    return dense.as_strided((dense.numel(),), (1,))


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

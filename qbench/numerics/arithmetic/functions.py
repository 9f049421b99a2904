"""The functions of one value that a 256-entry table holds: names, their parameters in order, the aten operators.

One entry makes a function known to the fusion rule, the operator and the tables of every target.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclasses.dataclass(frozen=True)
class Function:
    """One function of a value.

    Attributes:
        name: What tables, reports and errors call it.
        operators: Qualified names of the aten operators that compute it, `"aten::hardswish"`.
        parameters: Names of the operator's arguments that it depends on, numbers all.
        compute: (float32 x, parameter values) -> float32, as PyTorch computes it: for targets without steps of their
            own.
    """

    name: str
    operators: tuple[str, ...]
    parameters: tuple[str, ...]
    compute: Callable[[Tensor, Sequence[float]], Tensor]


FUNCTIONS: dict[str, Function] = {
    function.name: function
    for function in (
        Function("relu6", ("aten::relu6", "aten::relu6_"), (), lambda x, p: F.relu6(x)),
        Function("hardswish", ("aten::hardswish", "aten::hardswish_"), (), lambda x, p: F.hardswish(x)),
        Function("hardsigmoid", ("aten::hardsigmoid", "aten::hardsigmoid_"), (), lambda x, p: F.hardsigmoid(x)),
        Function("sigmoid", ("aten::sigmoid", "aten::sigmoid_"), (), lambda x, p: torch.sigmoid(x)),
        Function("silu", ("aten::silu", "aten::silu_"), (), lambda x, p: F.silu(x)),
        # approximate is a word in aten: "gelu" takes "none" only, "gelu_tanh" the other.
        Function("gelu", ("aten::gelu", "aten::gelu_"), (), lambda x, p: F.gelu(x)),
        Function("gelu_tanh", (), (), lambda x, p: F.gelu(x, approximate="tanh")),
        Function("tanh", ("aten::tanh", "aten::tanh_"), (), lambda x, p: torch.tanh(x)),
        Function(
            "leaky_relu",
            ("aten::leaky_relu", "aten::leaky_relu_"),
            ("negative_slope",),
            lambda x, p: F.leaky_relu(x, p[0]),
        ),
    )
}

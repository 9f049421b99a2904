"""Attention written out: every value that integer hardware would store is the output of a module.

    q, k, v = split(W_q x_q), split(W_k x_k), split(W_v x_v)       (…, positions, heads·d) -> (…, heads, positions, d)
    A = softmax(q kᵀ [+ B] [+ m])        y = W_o merge(dropout(A) v)

`1/√d` is the factor of a `ScaledLinear`, that of the queries: its weight takes it in as a power of its scale, so that
it costs no rounding. q, k and v come from layers of their own, so that each has a grid of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, TypeVar

from torch import Tensor, nn

from qbench.nn.attention.operations import MaskedSoftmax, ScaledLinear
from qbench.nn.ops import Add, MatMul

Self = TypeVar("Self", bound="ExplicitAttention")


class ExplicitAttention(nn.Module):
    """Base of written-out attentions: the forward calls modules and moves values, so `fuse` finds nothing in it.

    Attributes:
        stands_for: Class of the module that this one is made from.
        parts: Names of that module's submodules, by which a class of the same name that is another one is told apart.
        query: Layer of the queries; `key`, `value` alike.
        product: Of queries and keys.
        bias: What makes `B`, or None; `add` adds it.
        softmax: Logits and a mask -> A.
        dropout: Of A.
        mix: Of A and the values.
        project: Layer of the output.
    """

    stands_for: ClassVar[str]
    parts: ClassVar[frozenset[str]]

    def __init__(
        self,
        query: nn.Linear,
        key: nn.Linear,
        value: nn.Linear,
        project: nn.Linear,
        *,
        heads: int,
        dropout: float = 0.0,
        bias: nn.Module | None = None,
        product: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = heads
        self.query, self.key, self.value = query, key, value
        self.product = MatMul() if product is None else product
        self.bias = bias
        self.add = None if bias is None else Add()
        self.softmax = MaskedSoftmax()
        self.dropout = nn.Dropout(dropout)
        self.mix = MatMul()
        self.project = project

    @classmethod
    def refusal(cls, module: nn.Module) -> str:
        """Why this class cannot stand for this very module; empty where it can."""
        return ""

    @classmethod
    def from_module(cls: type[Self], module: nn.Module) -> Self:
        """The written-out form, with the parameters of `module`."""
        raise NotImplementedError

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The equations above.

        Args:
            query: (…, rows, features); `key` and `value`: (…, columns, features of their own).
            key: See there.
            value: See there.
            mask: Added to the logits, broadcast to (…, heads, rows, columns); never quantized.

        Returns:
            (…, rows, features of the output), and A after its dropout, (…, heads, rows, columns).
        """
        q, k = self.normalized(self.split(self.query(query)), self.split(self.key(key)))
        logits = self.product(q, k.transpose(-2, -1))
        if self.add is not None and self.bias is not None:
            logits = self.add(logits, self.bias())
        weights: Tensor = self.dropout(self.softmax(logits, mask))
        mixed = self.mix(weights, self.split(self.value(value)))
        projected: Tensor = self.project(mixed.transpose(-3, -2).flatten(-2))
        return projected, weights

    def normalized(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys as they are multiplied; here as they come."""
        return q, k

    def split(self, x: Tensor) -> Tensor:
        """(…, positions, heads·d) -> (…, heads, positions, d)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(-3, -2)


def linears(
    weights: Sequence[Tensor], biases: Sequence[Tensor | None], like: Tensor, factors: Sequence[float | None]
) -> list[nn.Linear]:
    """A layer for each weight, with copies of the values; trained if `like` is."""
    made = []
    for weight, bias, factor in zip(weights, biases, factors, strict=True):
        rows, columns = weight.shape
        with_bias = bias is not None
        layer = (
            nn.Linear(columns, rows, with_bias, device="meta")
            if factor is None
            else ScaledLinear(columns, rows, factor, bias=with_bias, device="meta")
        )
        layer.weight = nn.Parameter(weight.detach().clone(), like.requires_grad)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone(), like.requires_grad)
        made.append(layer)
    return made


def split_linear(layer: nn.Linear, factors: Sequence[float | None]) -> list[nn.Linear]:
    """One layer of queries, keys and values -> three."""
    biases: Sequence[Tensor | None] = (None, None, None) if layer.bias is None else layer.bias.chunk(3)
    return linears(layer.weight.chunk(3), biases, layer.weight, factors)

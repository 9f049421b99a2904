"""`torch.nn.MultiheadAttention`, written out.

Masks are added where the softmax is computed, in float: see `MaskedSoftmax`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qbench.errors import FusionError
from qbench.nn.attention.base import ExplicitAttention, linears


class ExplicitMultiheadAttention(ExplicitAttention):
    """Multi-head attention with separate layers of queries, keys and values; called like the original."""

    stands_for = "MultiheadAttention"
    parts = frozenset({"out_proj"})
    # torch.nn.TransformerEncoderLayer reads them to choose its fused kernel: it finds that it cannot.
    in_proj_weight = in_proj_bias = None
    _qkv_same_embed_dim = False

    batch_first: bool

    @classmethod
    def refusal(cls, module: Any) -> str:
        """See `ExplicitAttention.refusal`."""
        if module.bias_k is not None or module.bias_v is not None:
            return "add_bias_kv=True puts a learned key and value behind those of the input"
        if module.add_zero_attn:
            return "add_zero_attn=True puts a key and a value of zeros behind those of the input"
        return ""

    @classmethod
    def from_module(cls, module: Any) -> ExplicitMultiheadAttention:
        """See `ExplicitAttention.from_module`."""
        packed = module.in_proj_weight
        separate = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
        biases = (None, None, None) if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
        weights, like = (separate, separate[0]) if packed is None else (packed.chunk(3), packed)
        query, key, value = linears(weights, biases, like, (module.head_dim**-0.5, None, None))
        project = nn.Linear(module.embed_dim, module.embed_dim, module.out_proj.bias is not None, device="meta")
        project.weight, project.bias = module.out_proj.weight, module.out_proj.bias
        made = cls(query, key, value, project, heads=module.num_heads, dropout=module.dropout)
        made.batch_first = module.batch_first
        return made

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Arguments, shapes and results are those of `torch.nn.MultiheadAttention`.

        Raises:
            FusionError: `is_causal` without the mask that it is a hint of.
        """
        if is_causal and attn_mask is None:
            raise FusionError(
                "is_causal=True says of attn_mask that it is causal, and there is none; "
                "attn_mask=torch.nn.Transformer.generate_square_subsequent_mask(length) works"
            )
        batched = query.ndim == 3
        if not batched:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        y, weights = self.attend(query, key, value, self._mask(attn_mask, key_padding_mask, query))
        if average_attn_weights and need_weights:
            weights = weights.mean(dim=1)
        if not batched:
            y, weights = y.squeeze(0), weights.squeeze(0)
        elif not self.batch_first:
            y = y.transpose(0, 1)
        return y, weights if need_weights else None

    def _mask(self, attention: Tensor | None, padding: Tensor | None, query: Tensor) -> Tensor | None:
        """Both masks as one that is added: (L, S) or (N·heads, L, S), and (N, S) or (S,) -> what broadcasts."""
        found = None if attention is None else _additive(attention, query.dtype)
        if found is not None and found.ndim == 3:
            found = found.unflatten(0, (-1, self.num_heads))
        if padding is None:
            return found
        padding = _additive(padding, query.dtype).reshape(query.shape[0], 1, 1, -1)
        return padding if found is None else found + padding


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask of truths, where True is left out, or of numbers -> one of numbers."""
    if mask.dtype is not torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))

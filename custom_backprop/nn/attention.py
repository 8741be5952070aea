"""Multi-head attention as a module: ``torch.nn.MultiheadAttention`` with another ``forward``.
The other names of this module are those of ``torch.nn.attention``, such as ``sdpa_kernel``."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import functional as F
from ..fallback import fall_back

__all__ = ["MultiheadAttention"]


class MultiheadAttention(torch.nn.MultiheadAttention):
    """With ``need_weights=False``, no tensor of L x S numbers is made: see
    :func:`custom_backprop.functional.scaled_dot_product_attention`. Boolean masks stay boolean.

    Arguments, parameters and results are those of ``torch.nn.MultiheadAttention``, which is left to
    refuse what does not fit, and to run nested tensors.
    """

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None,
        need_weights: bool = True, attn_mask: Tensor | None = None,
        average_attn_weights: bool = True, is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        if not self._fits(query, key, value, key_padding_mask, attn_mask, is_causal):
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights,
                is_causal,
            )  # fmt: skip
        batched, batch_dim = query.dim() == 3, 0 if self.batch_first else 1
        if is_causal and key_padding_mask is None and not need_weights:
            attn_mask = None
        else:  # the masks say the same
            is_causal = False
        q, k, v = (
            self._heads(t if batched else t.unsqueeze(batch_dim))
            for t in self._projections(query, key, value)
        )
        k, v, extra = self._extended(k, v)
        mask = _merged(key_padding_mask, attn_mask, q, extra)
        p = self.dropout if self.training else 0.0
        if need_weights:
            y, weights = _with_weights(q, k, v, mask, p)
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            y, weights = F.scaled_dot_product_attention(q, k, v, mask, p, is_causal), None
        y = y.transpose(1, 2) if self.batch_first else y.permute(2, 0, 1, 3)
        y = F.linear(y.flatten(-2), self.out_proj.weight, self.out_proj.bias)
        if not batched:
            return y.squeeze(batch_dim), None if weights is None else weights.squeeze(0)
        return y, weights

    def _fits(self, q, k, v, padding, mask, is_causal):
        """Whether stock computes with such arguments, nested ones aside."""
        if q.is_nested or k.is_nested or v.is_nested:
            return False
        if not q.dim() == k.dim() == v.dim() in (2, 3) or (is_causal and mask is None):
            return False
        batch_dim = None if q.dim() == 2 else 0 if self.batch_first else 1
        seq_dim = 1 if batch_dim == 0 else 0
        batch = 1 if batch_dim is None else q.shape[batch_dim]
        heads, L, S = batch * self.num_heads, q.shape[seq_dim], k.shape[seq_dim]
        of_padding = (S,) if batch_dim is None else (batch, S)
        return (
            k.shape[:-1] == v.shape[:-1]
            and (batch_dim is None or k.shape[batch_dim] == batch)
            and (q.shape[-1], k.shape[-1], v.shape[-1]) == (self.embed_dim, self.kdim, self.vdim)
            and (padding is None or padding.shape == of_padding)
            and (mask is None or mask.shape in ((L, S), (heads, L, S)))
            and all(m is None or m.dtype in (torch.bool, q.dtype) for m in (padding, mask))
        )

    def _projections(self, query, key, value):
        """One product for what is the same tensor."""
        weight, bias, E = self.in_proj_weight, self.in_proj_bias, self.embed_dim
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        if weight is None:
            weights = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        elif query is key is value:
            return F.linear(query, weight, bias).chunk(3, -1)
        elif key is value:
            of_both = None if bias is None else bias[E:]
            q = F.linear(query, weight[:E], biases[0])
            return q, *F.linear(key, weight[E:], of_both).chunk(2, -1)
        else:
            weights = weight.chunk(3)
        return [
            F.linear(*given) for given in zip((query, key, value), weights, biases, strict=True)
        ]

    def _heads(self, t):
        """(batch, heads, seq, head_dim), a view."""
        t = t.unflatten(-1, (self.num_heads, self.head_dim))
        return t.transpose(1, 2) if self.batch_first else t.permute(1, 2, 0, 3)

    def _extended(self, k, v):
        """The keys and values with those that all queries have, and how many these are."""
        shape, extra = (k.shape[0], self.num_heads, 1, self.head_dim), 0
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (
                torch.cat((t, b.view(1, *shape[1:]).expand(shape)), 2)
                for t, b in ((k, self.bias_k), (v, self.bias_v))
            )
            extra += 1
        if self.add_zero_attn:
            k, v = (torch.cat((t, t.new_zeros(shape)), 2) for t in (k, v))
            extra += 1
        return k, v, extra


def _merged(padding, mask, q, extra):
    """One mask for scaled_dot_product_attention, broadcasting to (batch, heads, L, S + extra), or
    None: boolean, where True lets a query attend to a key, if both masks are; else to be added."""
    if padding is not None:
        padding = padding.view(-1, 1, 1, padding.shape[-1])
    if mask is not None and mask.dim() == 3:
        mask = mask.unflatten(0, q.shape[:2])
    given = [m for m in (padding, mask) if m is not None]
    if not given:
        return None
    if extra:
        given = [torch.nn.functional.pad(m, (0, extra)) for m in given]
    if all(m.dtype == torch.bool for m in given):
        return ~given[0] if len(given) == 1 else ~(given[0] | given[1])
    added = [
        q.new_zeros(m.shape).masked_fill(m, -math.inf) if m.dtype == torch.bool else m
        for m in given
    ]
    return sum(added[1:], added[0])


def _with_weights(q, k, v, mask, p):
    """The result and what it is the average with, (batch, heads, L, S)."""
    scores = (q / math.sqrt(q.shape[-1])) @ k.mT
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    weights = F.dropout(F.softmax(scores, -1), p)
    return weights @ v, weights


if not TYPE_CHECKING:  # a type checker takes this module for torch's: see nn/__init__.py
    __getattr__, __dir__ = fall_back(__name__, torch.nn.attention)

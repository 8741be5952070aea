"""Spec of attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ... import functional
from ...formulas import dropout as formula
from ..spec import Make, OpSpec, Sample

#: (batch, heads of queries, heads of keys, queries, keys, size of a head), and options
SIZES: dict[str, Any] = {
    "awkward": ((1, 2, 1, 37, 67, 24), {"enable_gqa": True, "window": (20, None)}),
    "small": ((1, 2, 2, 32, 32, 32), {}),
    "medium": ((2, 4, 4, 128, 128, 64), {"is_causal": True}),
    "large": ((4, 8, 2, 1024, 1024, 128), {"is_causal": True, "enable_gqa": True}),
    "huge": ((4, 32, 32, 4096, 4096, 128), {"is_causal": True}),
}


def stock(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    window: tuple[int | None, int | None] | None = None,
    alibi_slopes: Tensor | None = None,
    seed: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """torch's own, with the window and ALiBi in a mask; and torch's expressions where it cannot be
    told which zeros to make."""
    if window is not None or alibi_slopes is not None:
        L, S = query.shape[-2], key.shape[-2]
        place = torch.arange(S, device=query.device) - torch.arange(L, device=query.device)[:, None]
        bias = query.new_zeros(L, S)
        if window is not None:
            left, right = (2**31 if w is None else w for w in window)
            outside = (place < S - L - left) | (place > S - L + right)
            bias = bias.masked_fill(outside, float("-inf"))
        if is_causal:
            bias, is_causal = bias.masked_fill(place > 0, float("-inf")), False
        if alibi_slopes is not None:
            bias = bias - alibi_slopes.to(bias.dtype)[:, None, None] * (place - S + L).abs()
        if attn_mask is None:
            attn_mask = bias
        elif attn_mask.dtype == torch.bool:
            attn_mask = bias.masked_fill(~attn_mask, float("-inf"))
        else:
            attn_mask = attn_mask + bias
    if seed is not None:
        return _dropped(query, key, value, attn_mask, dropout_p, is_causal, seed, **options)
    # in float64, the oracle, by its formula: its kernels have no second derivative and no tangent
    by_formula = query.dtype == torch.float64
    with sdpa_kernel(SDPBackend.MATH) if by_formula else nullcontext():
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, **options
        )


def _dropped(q, k, v, mask, p, is_causal, seed, *, scale=None, enable_gqa=False):
    """(P n) v in four dimensions."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = q @ k.mT * (q.shape[3] ** -0.5 if scale is None else scale)
    if is_causal:
        causal = torch.ones_like(scores[0, 0], dtype=torch.bool).tril()
        scores = scores.masked_fill(~causal, float("-inf"))
    if mask is not None:
        allowed = mask.dtype == torch.bool
        scores = scores.masked_fill(~mask, float("-inf")) if allowed else scores + mask
    B, H, L, S = scores.shape
    columns = S + -S % 4
    kept = formula.kept(seed, B * H * L * columns, p).view(B, H, L, columns)[..., :S]
    return (scores.softmax(3) * kept / (1 - p)) @ v


def _qkv(
    make: Make, B: int, H: int, K: int, L: int, S: int, E: int, width: int | None = None
) -> tuple[Tensor, ...]:
    return make.tensor(B, H, L, E), make.tensor(B, K, S, E), make.tensor(B, K, S, width or E)


def _by_length(make: Make, rows: int, n: int) -> Sample:
    """n tokens, in up to 16 heads of 128 numbers."""
    heads = max(1, min(16, rows // 128))
    batch = max(1, rows // 128 // heads)
    return Sample(_qkv(make, batch, heads, heads, n, n, 128), {"is_causal": True})


def _samples(make: Make) -> Iterator[Sample]:
    yield Sample(_qkv(make, 1, 1, 1, 2, 2, 2), {"is_causal": True}, name="causal")
    tensors = *_qkv(make, 1, 2, 1, 2, 2, 1, 2), make.tensor(2, 1, 2)
    options: Any = {"scale": 0.4, "enable_gqa": True}
    yield Sample(tensors, options, name="a mask's gradient, grouped queries")
    mask = torch.tensor([[True, True, False], [False] * 3], device=make.device)
    yield Sample(
        (make.tensor(2, 1), make.tensor(3, 1), make.tensor(3, 1), mask, 0.0, False),
        {"window": (1, 1)},
        name="2-d, a row that attends to nothing",
    )
    slopes = make.tensor(2, low=0.1, high=1.0, requires_grad=False)
    yield Sample(
        (make.tensor(2, 2, 1), make.tensor(2, 1), make.tensor(2, 2, 1)),
        {"window": (1, 0), "alibi_slopes": slopes},
        name="window, ALiBi, shared keys",
    )
    yield Sample(_qkv(make, 1, 1, 1, 2, 0, 1), name="no keys")
    tensors = *_qkv(make, 1, 2, 1, 2, 5, 1), make.tensor(2, 5)
    seed = torch.tensor(2**62 + 5, device=make.device)
    options = {"enable_gqa": True, "seed": seed}
    yield Sample((*tensors, 0.4), options, name="dropout")


def _regimes(make: Make) -> Iterator[Sample]:
    """Heads of each width with all that adds to their scores, and every gradient left out once."""
    everything: Any = {"enable_gqa": True, "window": (64, 64)}
    everything["alibi_slopes"] = make.tensor(4, requires_grad=False)
    dropout: Any = {"dropout_p": 0.1, "seed": torch.tensor(3, device=make.device)}
    if make.dtype == torch.float64:
        tensors = _qkv(make, 2, 4, 2, 64, 64, 64)
        yield Sample((*tensors, make.tensor(64, 64)), everything, name="float64")
        yield Sample((*tensors, make.tensor(64, 64)), {**everything, **dropout}, name="dropout")
        return
    for dtype, width, heads, frozen in (
        (torch.float32, 64, 4, 0),
        (torch.float32, 128, 1, 1),
        (torch.bfloat16, 64, 4, 2),
        (torch.bfloat16, 128, 1, None),
        (torch.bfloat16, 256, 4, None),
    ):
        tensors = tuple(t.detach().to(dtype) for t in _qkv(make, 2, 4, 2, 256, 256, width))
        for i, t in enumerate(tensors):
            t.requires_grad_(i != frozen)
        mask = make.tensor(2 if heads == 1 else 1, heads, 256, 256)
        yield Sample((*tensors, mask), everything, name=f"{dtype}, heads of {width}")
    mask = make.index(2, 1, 256, 256, high=2).bool()
    yield Sample((*_qkv(make, 2, 4, 2, 256, 256, 32), mask), {"enable_gqa": True}, name="booleans")
    yield Sample((*_qkv(make, 2, 4, 4, 256, 256, 32), make.tensor(256, 256)), name="a mask alone")
    # dropout, alone and with all else
    for dtype, width in (
        (torch.float32, 64), (torch.float32, 128), (torch.bfloat16, 64), (torch.bfloat16, 128),
        (torch.bfloat16, 256),
    ):  # fmt: skip
        tensors = _qkv(Make(make.device, dtype), 2, 4, 2, 256, 256, width)
        mask = Make(make.device, dtype).tensor(256, 256)
        yield Sample((*tensors, mask), {**everything, **dropout}, name=f"dropout, {dtype}")
        yield Sample(tensors, {"enable_gqa": True, **dropout}, name=f"dropout alone, {dtype}")


SPECS = [
    OpSpec(
        name="scaled_dot_product_attention",
        family="attention",
        formula="y = P v, P = softmax(c q kᵀ + b);  "
        "ds = P (dy vᵀ - dy · y), dq = c ds k, dk = c dsᵀ q, dv = Pᵀ dy, db = ds",
        function=functional.scaled_dot_product_attention,
        reference=stock,
        samples=_samples,
        launches=(1, 2),
        large=lambda make, size: Sample(_qkv(make, *SIZES[size][0]), SIZES[size][1]),
        by_length=_by_length,
        regimes=_regimes,
        excused={
            ("", "in_place"): "backward reads the output, even where stock's does not",
            ("aten", "non_finite"): "torch's kernel for CPUs gives 0 where a query is NaN",
        },
    ),
]

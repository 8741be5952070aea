"""Scaled dot-product attention: for each query the mean of the values, weighted by a softmax over
the keys (Vaswani et al., 2017).

    s = c q kᵀ + b,   P = softmax(s),   y = P v

for queries q (B, H, L, E), keys k (B, K, S, E) and values v (B, K, S, F). Where K < H, heads of
keys serve H / K heads of queries each, one after another (Ainslie et al., 2023). b is the sum of

- a mask (1 or B, 1 or H, L, S): numbers, or booleans, of which False is -∞;
- ALiBi, -m |i + S - L - j|, with a slope m for each head (Press, Smith and Lewis, 2022);
- the band: -∞ unless lowest <= j - i <= highest. The causal mask is the band up to 0.

A row of s that is all -∞ attends to nothing: its P, y and gradients are 0, as in torch. The keys of
ALiBi are counted from the end, so that the last query stands at the last key.

Backward has dy and wants dq, dk, dv and db. From y = P v

    dv = Pᵀ dy,   dP = dy vᵀ,

ds = P (dP - Σ_j P dP) is the softmax's, and s is linear in q and k, so that

    db = ds,   dq = c ds k,   dk = c dsᵀ q.

Where one key has nearly all of a row's P, its dP and Σ_j P dP are nearly the same, and in float32
their difference has few digits or none: so it is in the kernels and in torch's flash kernel, but
not here, where dP is relative to that of the largest P (:mod:`custom_backprop.formulas.softmax`).
To be exact, forward would save which key is the largest of each row, and every kernel of backward
would gather that key's row of v for each query and start from dy · v of it.

No P is saved: with the logarithm of each row's sum, l = log Σ_j e^s, it is e^(s - l), block by
block (Rabe and Staats, 2021; Dao et al., 2022); and Σ_j P dP = Σ_j P dy vᵀ = dy · y.

**Dropout** multiplies P by a noise n, which is 0 with probability p and else 1 / (1 - p):

    y = (P ∘ n) v,   dv = (P ∘ n)ᵀ dy,   dP = n ∘ (dy vᵀ).

The softmax is before it, so that l is that of the whole row, and ds as above; and

    Σ_j P dP = Σ_j P n (dy vᵀ) = dy · (P ∘ n) v = dy · y

stands: y has the noise already. No noise is stored. It is made from a seed where it is needed, as
:mod:`custom_backprop.formulas.dropout` makes it: score (b, h, i, j) is kept where the word of

    number ((b H + h) L + i) S' + j,   S' = 4 ⌈S / 4⌉,

is not below p 2^32. Four neighbours of a row then are the four words of one counter, whatever S,
and every block of every kernel finds the same noise, as do all backends.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .constant import indices
from .dropout import coefficients, philox, threshold
from .precision import widen
from .softmax import softmax, softmax_backward, softmax_jvp


def grouped(t: Tensor, k: Tensor) -> Tensor:
    """(B, H, L, N) as (B, K, H / K L, N): beside each head of keys, all queries that it serves."""
    B, H, L, N = t.shape
    return t.reshape(B, k.shape[1], H // k.shape[1] * L, N) if k.shape[1] else t


def products(q: Tensor, k: Tensor) -> Tensor:
    """q kᵀ (B, H, L, S)."""
    return (grouped(q, k) @ k.transpose(2, 3)).reshape(*q.shape[:3], k.shape[2])


def weighted(P: Tensor, v: Tensor) -> Tensor:
    """P v (B, H, L, F)."""
    return (grouped(P, v) @ v).reshape(*P.shape[:3], v.shape[3])


def gathered(P: Tensor, t: Tensor, k: Tensor) -> Tensor:
    """Pᵀ t, summed over the queries that a head of keys serves: (B, K, S, N)."""
    return grouped(P, k).transpose(2, 3) @ grouped(t, k)


def places(s: Tensor, first: int = 0, start: int = 0) -> Tensor:
    """j - i of each score, of which the first query and the first key have these numbers."""
    i = indices(s, s.shape[2]) + first
    return indices(s, s.shape[3]) + start - i.unsqueeze(1)


def biased(
    s: Tensor,
    mask: Tensor | None,
    slopes: Tensor | None,
    lowest: int | None,
    highest: int | None,
    excess: int,
    first: int = 0,
    start: int = 0,
) -> Tensor:
    """s + b, for s c q kᵀ of the queries from ``first`` and the keys from ``start`` on; ``excess``
    is S - L."""
    if mask is not None:
        s = s.where(mask, -math.inf) if mask.dtype == torch.bool else s + widen(mask)
    if slopes is not None:
        distance = (places(s, first, start) - excess).abs()
        s = s - slopes.to(s.dtype).view(-1, 1, 1) * distance
    if lowest is not None:
        s = s.where(places(s, first, start) >= lowest, -math.inf)
    if highest is not None:
        s = s.where(places(s, first, start) <= highest, -math.inf)
    return s


def probabilities(s: Tensor) -> tuple[Tensor, Tensor]:
    """P and l; both 0 in a row that is all -∞."""
    if not s.shape[3]:
        return s, s.sum(3)
    dead = (s == -math.inf).all(3, keepdim=True)
    s = s.masked_fill(dead, 0)
    return softmax(s, 3).masked_fill(dead, 0), s.logsumexp(3).masked_fill(dead.squeeze(3), 0)


def scores(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    slopes: Tensor | None,
    lowest: int | None,
    highest: int | None,
    scale: float,
) -> Tensor:
    """s (B, H, L, S)."""
    s = products(q, k) * scale
    return biased(s, mask, slopes, lowest, highest, k.shape[2] - q.shape[2])


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    slopes: Tensor | None,
    seed: Tensor | None,
    p: float,
    lowest: int | None,
    highest: int | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """y (B, H, L, F) and l (B, H, L), the latter in the dtype that is computed in."""
    P, l = probabilities(scores(widen(q), widen(k), mask, slopes, lowest, highest, scale))
    noise = noise_of(P, seed, p, q.shape[2], k.shape[2])
    return weighted(dropped(P, noise), widen(v)).to(q.dtype), l


def dropped(P: Tensor, noise: Tensor | None) -> Tensor:
    """P ∘ n."""
    return P if noise is None else P * noise


def noise_of(
    P: Tensor,
    seed: Tensor | None,
    p: float,
    queries: int,
    keys: int,
    batch: int = 0,
    first: int = 0,
    start: int = 0,
) -> Tensor | None:
    """n of a block of P, whose first batch, query and key have these numbers, among so many queries
    and keys; None without a seed."""
    if seed is None:
        return None
    batches, heads, rows = (torch.arange(n, device=P.device) for n in P.shape[:3])
    row = (batches.view(-1, 1, 1) + batch) * P.shape[1] + heads.view(-1, 1)
    row = row * queries + rows + first
    counters = torch.arange(start // 4, -(-(start + P.shape[3]) // 4), device=P.device)
    counters = row.unsqueeze(3) * -(-keys // 4) + counters
    words = torch.stack(philox(seed, counters), 4).flatten(3)
    kept = words.narrow(3, start % 4, P.shape[3]) >= threshold(p)
    return kept.to(P.dtype) * coefficients(p, False)[0]


def attention_backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    slopes: Tensor | None,
    seed: Tensor | None,
    y: Tensor,
    l: Tensor,
    p: float,
    lowest: int | None,
    highest: int | None,
    scale: float,
    *needs: bool,
) -> tuple[Tensor | None, ...]:
    """dq, dk, dv and dmask, None for each that is not needed.

    From the inputs alone: where this is differentiated, y and l are constants.
    """
    need_q, need_k, need_v, need_mask = needs
    dy, q_, k_, v_ = map(widen, (dy, q, k, v))
    P, _ = probabilities(scores(q_, k_, mask, slopes, lowest, highest, scale))
    noise = noise_of(P, seed, p, q.shape[2], k.shape[2])
    dv = gathered(dropped(P, noise), dy, v).to(v.dtype) if need_v else None
    if not (need_q or need_k or need_mask):
        return None, None, dv, None
    ds = softmax_backward(dropped(products(dy, v_), noise), P, 3)
    dmask = ds.sum_to_size(mask.shape).to(mask.dtype) if need_mask and mask is not None else None
    dq = (scale * weighted(ds, k_)).to(q.dtype) if need_q else None
    dk = (scale * gathered(ds, q_, k)).to(k.dtype) if need_k else None
    return dq, dk, dv, dmask


def attention_jvp(
    tangents: tuple[Tensor | None, ...],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    slopes: Tensor | None,
    seed: Tensor | None,
    p: float,
    lowest: int | None,
    highest: int | None,
    scale: float,
) -> Tensor:
    """ty = tP v + P tv, with tP = P (ts - Σ_j P ts) and ts = c (tq kᵀ + q tkᵀ) + tmask."""
    dtype = q.dtype
    q, k, v = map(widen, (q, k, v))
    tq, tk, tv, tmask = map(widen, tangents)
    P, _ = probabilities(scores(q, k, mask, slopes, lowest, highest, scale))
    noise = noise_of(P, seed, p, q.shape[2], k.shape[2])
    parts = [] if tv is None else [weighted(dropped(P, noise), tv)]
    ts = [scale * products(*pair) for pair in ((tq, k), (q, tk)) if None not in pair]
    ts += [] if tmask is None else [tmask.expand(P.shape)]
    if ts:
        tP = softmax_jvp(sum(ts[1:], ts[0]), P, 3)
        parts.append(weighted(dropped(tP, noise), v))
    return sum(parts[1:], parts[0]).to(dtype)

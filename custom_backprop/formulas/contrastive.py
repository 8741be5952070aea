"""Losses that compare whole vectors: the triplet margin and InfoNCE, and the division by the norm
that often comes before them.

Rows are vectors of D components. L_r is the loss of row r, and dy_r is its gradient (dy / rows for
a mean). Such a loss depends on each vector only through distances or inner products, so each
gradient is a product with their derivatives.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .constant import indices
from .cross_entropy import of_certain
from .loss import MEAN, NONE, reduced
from .precision import widen


def pairs(a: Tensor, p: Tensor, n: Tensor, swap: bool) -> tuple[tuple[Tensor, Tensor], ...]:
    """The differences whose lengths are the distances of the triplet margin."""
    return ((a, p), (a, n), (p, n)) if swap else ((a, p), (a, n))


def direction(v: Tensor, d: Tensor, order: float) -> Tensor:
    """u = ∂d/∂v of d = ‖v‖_p: sign(v) (|v| / d)^(p-1), and 0 where d is 0.

    d^p = Σ |v_i|^p gives p d^(p-1) ∂d/∂v_i = p |v_i|^(p-1) sign(v_i). For p = 2 that is v / d, and
    for p = 1 sign(v). For p = ∞ only the largest component counts; if several are equal, they share
    the derivative. If p < 2, a component of 0 is a kink or a cusp, and its derivative is 0.
    """
    d = d.unsqueeze(-1)
    if order == 1:
        return torch.sign(v)
    if order == math.inf:
        hit = (v.abs() == d).to(v.dtype)
        return torch.sign(v) * (hit / hit.sum(-1, keepdim=True))
    d = torch.where(d == 0, math.inf, d)
    if order == 2:
        return v / d
    return torch.sign(v) * (torch.where(v == 0, 1, v).abs() / d) ** (order - 1)


def hinge(d: Tensor, margin: float) -> Tensor:
    """h = m + d_ap - min(d_an, d_pn): positive as long as the negative is not farther than the
    positive by at least the margin m."""
    return margin + d[0] - (torch.minimum(d[1], d[2]) if len(d) == 3 else d[1])


def distances(a: Tensor, p: Tensor, n: Tensor, order: float, eps: float, swap: bool) -> Tensor:
    """‖x - y + ε‖ for each pair, stacked."""
    return torch.stack(
        [torch.linalg.vector_norm(x - y + eps, order, dim=-1) for x, y in pairs(a, p, n, swap)]
    )


def triplet(
    a: Tensor,
    p: Tensor,
    n: Tensor,
    margin: float,
    order: float,
    eps: float,
    swap: bool,
    reduction: int,
) -> tuple[Tensor, Tensor]:
    """L = max(0, m + d(a, p) - d(a, n)), d(x, y) = ‖x - y + ε‖_p (Weinberger and Saul, 2009), and
    the distances.

    With ``swap`` the smaller of d(a, n) and d(p, n) replaces d(a, n) (Balntas et al., 2016). a, p
    and n are (..., D), of the same shape.
    """
    d = distances(widen(a), widen(p), widen(n), order, eps, swap)
    return reduced(hinge(d, margin).clamp_min(0), reduction).to(a.dtype), d


def triplet_slopes(
    a: Tensor, p: Tensor, n: Tensor, d: Tensor, margin: float, order: float, eps: float, swap: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """∂L/∂a, ∂L/∂p and ∂L/∂n for each row.

    With u the direction of each pair's distance, s = [h >= 0], and e the share of d_an in min(d_an,
    d_pn): 1, 0, or 1/2 if equal,

        ∂L/∂a = s (u_ap - e u_an)
        ∂L/∂p = -s (u_ap + (1-e) u_pn)
        ∂L/∂n = s (e u_an + (1-e) u_pn)

    since ∂d(x, y)/∂x = u and ∂d(x, y)/∂y = -u. They sum to zero, because moving all three by the
    same vector changes nothing.
    """
    active = (hinge(d, margin) >= 0).to(d.dtype).unsqueeze(-1)
    u = [
        direction(x - y + eps, of, order)
        for (x, y), of in zip(pairs(a, p, n, swap), d, strict=True)
    ]
    to_p, to_n = active * u[0], active * u[1]
    if not swap:
        return to_p - to_n, -to_p, to_n
    e = ((d[1] < d[2]).to(d.dtype) + (d[1] <= d[2]).to(d.dtype)).unsqueeze(-1) / 2
    to_n, between = e * to_n, (1 - e) * (active * u[2])
    return to_p - to_n, -(to_p + between), to_n + between


def triplet_backward(
    dy: Tensor,
    a: Tensor,
    p: Tensor,
    n: Tensor,
    d: Tensor,
    margin: float,
    order: float,
    eps: float,
    swap: bool,
    reduction: int,
    needs: Any,
) -> tuple[Tensor, ...]:
    """da, dp and dn, given the distances from :func:`triplet`; an empty tensor for each that is not
    in ``needs``."""
    share = widen(dy) / a.shape[:-1].numel() if reduction == MEAN else widen(dy)
    share = share.unsqueeze(-1) if reduction == NONE else share
    slopes = triplet_slopes(widen(a), widen(p), widen(n), d, margin, order, eps, swap)
    return tuple(
        (share * slope).to(a.dtype) if need else a.new_empty(0)
        for slope, need in zip(slopes, needs, strict=True)
    )


def triplet_jvp(
    tangents: Any,
    a: Tensor,
    p: Tensor,
    n: Tensor,
    margin: float,
    order: float,
    eps: float,
    swap: bool,
    reduction: int,
) -> Tensor:
    """tL = Σ ∂L/∂a ta + ∂L/∂p tp + ∂L/∂n tn, summed over the components."""
    a, p, n = map(widen, (a, p, n))
    slopes = triplet_slopes(a, p, n, distances(a, p, n, order, eps, swap), margin, order, eps, swap)
    parts = [
        (slope * t).sum(-1) for slope, t in zip(slopes, tangents, strict=True) if t is not None
    ]
    return reduced(sum(parts[1:], parts[0]), reduction)


def logits(q: Tensor, k: Tensor, n: Tensor | None, temperature: float) -> Tensor:
    """s_ij = q_i · k_j / τ (N, N); with negatives s_i = (q_i · k_i, q_i · n_1, ..., q_i · n_M) / τ
    (N, 1 + M)."""
    if n is None:
        return q @ k.transpose(0, 1) / temperature
    of_negatives = q @ n.transpose(0, 1) if n.dim() == 2 else (n @ q.unsqueeze(2)).squeeze(2)
    return torch.cat([(q * k).sum(1, keepdim=True), of_negatives], 1) / temperature


def positives(s: Tensor, among_keys: bool) -> Tensor:
    """The logit of each row's positive: on the diagonal, or the first one."""
    return s.diagonal() if among_keys else s[:, 0]


def info_nce(
    q: Tensor,
    k: Tensor,
    n: Tensor | None,
    temperature: float,
    symmetric: bool,
    reduction: int,
    makes_G: bool,
) -> tuple[Tensor, Tensor]:
    """L_i = -log(e^(s_it) / Σ_j e^(s_ij)): a cross-entropy that picks the positive t among all keys
    (van den Oord, Li and Vinyals, 2018).

    Also G = ∂L/∂s / τ with ``makes_G`` (else an empty tensor). ``symmetric`` is the mean of this
    loss and the same with q and k exchanged (Radford et al., 2021): over the rows and over the
    columns of s.
    """
    q_, k_, n_ = map(widen, (q, k, n))
    s = logits(q_, k_, n_, temperature)
    of = likelihoods(s, symmetric)
    losses = [-positives(log_p, n is None) for log_p, *_ in of]
    loss = sum(losses[1:], losses[0]) / len(of)
    G = (slope(of, n is None) / temperature).to(q.dtype) if makes_G else q.new_empty(0)
    return reduced(loss, reduction).to(q.dtype), G


def likelihoods(s: Tensor, symmetric: bool) -> list[tuple[Tensor, ...]]:
    """:func:`of_certain` of the rows, and for the symmetric loss of the columns."""
    return [of_certain(s, dim) for dim in ((1, 0) if symmetric else (1,))]


def slope(of: list[tuple[Tensor, ...]], among_keys: bool) -> Tensor:
    """∂L_i/∂s_ij = P_ij - [j = t], where P is the softmax of the row. For the symmetric loss, P is
    the mean of the softmaxes of row and column.

    The latter is the gradient of the sum of the losses (and, divided, of their mean), not that of
    each loss. Where the positive is certain, P_it - 1 is minus the sum of the others' P, as in
    :mod:`custom_backprop.formulas.cross_entropy`.
    """
    s = of[0][0]
    columns = indices(s, s.shape[1])
    is_positive = columns == indices(s, len(s)).unsqueeze(1) if among_keys else columns == 0
    slopes = [
        torch.where(is_positive, torch.where(certain, -others, P - 1), P)
        for _, P, certain, others in of
    ]
    return sum(slopes[1:], slopes[0]) / len(slopes)


def slope_of(q: Tensor, k: Tensor, n: Tensor | None, temperature: float, symmetric: bool) -> Tensor:
    """G = ∂L/∂s / τ, as a differentiable function of the vectors."""
    s = logits(widen(q), widen(k), widen(n), temperature)
    return slope(likelihoods(s, symmetric), n is None) / temperature


def info_nce_backward(
    dy: Tensor, q: Tensor, k: Tensor, n: Tensor | None, G: Tensor, reduction: int, needs: Any
) -> tuple[Tensor | None, ...]:
    """dq, dk and dn, None for each that is not in ``needs``.

    s is linear in q and in the keys. So with G of :func:`info_nce`, whose columns G⁺ and G⁻ belong
    to the positives and the negatives,

        dq_i = dy_i Σ_j G_ij k_j                  dk_j = Σ_i G_ij dy_i q_i
        dq_i = dy_i (G⁺_i k_i + Σ_j G⁻_ij n_j)    dk_i = G⁺_i dy_i q_i
                                                  dn_j = Σ_i G⁻_ij dy_i q_i

    dy only scales the rows of G from the left, and so multiplies the small matrices: G itself is
    not written again.
    """
    dy = widen(dy) / len(q) if reduction == MEAN else widen(dy)
    before, after = (dy.unsqueeze(1), 1) if reduction == NONE else (1, dy)
    q_, k_ = q.to(G.dtype), k.to(G.dtype)
    weighted = (before * widen(q)).to(G.dtype) if reduction == NONE else q_
    need_q, need_k, need_n = needs
    dq = dk = dn = None
    if n is None:
        dq = G @ k_ if need_q else None
        dk = G.transpose(0, 1) @ weighted if need_k else None
    else:
        n_ = n.to(G.dtype)
        first, rest = G[:, :1], G[:, 1:]
        if need_q:
            dq = first * k_ + (rest @ n_ if n_.dim() == 2 else (rest.unsqueeze(1) @ n_).squeeze(1))
        dk = first * weighted if need_k else None
        if need_n:
            dn = (
                rest.transpose(0, 1) @ weighted
                if n_.dim() == 2
                else rest.unsqueeze(2) * weighted.unsqueeze(1)
            )
    factors = (before * after, after, after)
    return tuple(
        None if d is None else (factor * widen(d)).to(q.dtype)
        for d, factor in zip((dq, dk, dn), factors, strict=True)
    )


def info_nce_jvp(
    tangents: Any,
    q: Tensor,
    k: Tensor,
    n: Tensor | None,
    temperature: float,
    symmetric: bool,
    reduction: int,
) -> Tensor:
    """tL = Σ_j ∂L_i/∂s_ij ts_ij, where ts = s(tq, k) + s(q, tk): s is linear in q, and in the
    keys."""
    tq, tk, tn = tangents
    ts = torch.zeros((), dtype=q.dtype, device=q.device)
    if tq is not None:
        ts = ts + logits(tq, k, n, temperature)
    if tk is not None or tn is not None:
        ts = ts + logits(
            q,
            torch.zeros_like(k) if tk is None else tk,
            torch.zeros_like(n) if n is not None and tn is None else tn,
            temperature,
        )
    of = likelihoods(logits(q, k, n, temperature), symmetric)
    return reduced((slope(of, n is None) * ts).sum(1), reduction)

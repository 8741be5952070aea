"""Primitives of the triplet margin and of InfoNCE, on rows of vectors.

On a CPU they walk in chunks of rows that stay in cache: the differences and the similarities of a
chunk are never seen by memory.
"""

from __future__ import annotations

from math import prod

import torch

from ..formulas import contrastive as formula
from ..formulas.linear import rows
from ..formulas.loss import MEAN, NONE, SUM, reduced
from ..formulas.precision import HALF, wide, widen
from . import tasks
from .cross_entropy import minus_log, without_
from .library import P, R, launcher, primitive, slices
from .tasks import CHUNK

#: elements of a chunk of similarities: the product that makes them wants more rows
SIMILARITIES = 2**19


def _triplet_forward(a, p, n, margin, order, eps, swap, reduction):
    flat = [rows(t) for t in (a, p, n)]
    d = a.new_empty((3 if swap else 2, len(flat[0])), dtype=wide(a.dtype))

    def work(part, _):
        a_, p_, n_ = (widen(t[part]) for t in flat)
        for (x, y), out in zip(formula.pairs(a_, p_, n_, swap), d, strict=True):
            out[part] = torch.linalg.vector_norm(torch.sub(x, y).add_(eps), order, dim=-1)

    tasks.each(a.device, work, slices(len(flat[0]), flat[0].shape[1], CHUNK))
    d = d.view(len(d), *a.shape[:-1])
    return reduced(formula.hinge(d, margin).clamp_min_(0), reduction).to(a.dtype), d


def _triplet_backward(dy, a, p, n, d, margin, order, eps, swap, reduction, needs):
    flat = [rows(t) for t in (a, p, n)]
    grads = [a.new_empty(a.shape) if need else None for need in needs]
    dy = dy.reshape(-1) if reduction == NONE else dy / len(flat[0]) if reduction == MEAN else dy
    d = d.reshape(len(d), -1)

    def work(part, _):
        share, which = (dy[part], NONE) if reduction == NONE else (dy, SUM)
        a_, p_, n_ = (t[part] for t in flat)
        if order == 2 and not swap and a.dtype not in HALF:
            found = _euclidean(share, a_, p_, n_, d[:, part], margin, eps)
        else:
            found = formula.triplet_backward(
                share, a_, p_, n_, d[:, part], margin, order, eps, swap, which, needs
            )
        for grad, result in zip(grads, found, strict=True):
            if grad is not None:
                grad.view(flat[0].shape)[part] = result

    tasks.each(a.device, work, slices(len(flat[0]), flat[0].shape[1], CHUNK))
    return tuple(grads)


def _euclidean(dy, a, p, n, d, margin, eps):
    """The formula's gradients for p = 2 without swap: what is the same for a row is multiplied
    before it meets the row."""
    of_row = torch.where(d == 0, 0, dy * (formula.hinge(d, margin) >= 0) / d).unsqueeze(2)
    to_p, to_n = (torch.sub(a, b).add_(eps).mul_(k) for b, k in zip((p, n), of_row, strict=True))
    return to_p - to_n, to_p.neg_(), to_n


def _fake_triplet(a, p, n, margin, order, eps, swap, reduction):
    d = a.new_empty((3 if swap else 2, *a.shape[:-1]), dtype=wide(a.dtype))
    return a.new_empty(a.shape[:-1] if reduction == NONE else ()), d


def _formula_triplet_backward(*args):
    return tuple(g.contiguous() for g in formula.triplet_backward(*args))


def _info_nce(q, k, n, temperature, symmetric, reduction, makes_G):
    if symmetric and len(q):
        return _symmetric(q, k, temperature, reduction, makes_G)
    q_, k_, n_ = widen(q), widen(k), widen(n)
    count = len(q)
    width = count if n is None else 1 + n.shape[-2]
    index = (
        torch.arange(count, device=q.device) if n is None else q.new_zeros(count, dtype=torch.int64)
    ).unsqueeze(1)
    G = q.new_empty((count, width) if makes_G else 0)
    losses = q_.new_empty(count)

    def work(part, _):
        # the keys are everyone's; positives and negatives of one's own are of this chunk
        keys = k_ if n_ is None else k_[part]
        negatives = n_ if n_ is None or n_.dim() == 2 else n_[part]
        s, t = formula.logits(q_[part], keys, negatives, temperature), index[part]
        lead = s.gather(1, t) - s.amax(1, True)
        P = torch.softmax(s, 1)
        top = P.amax(1, True)
        others = without_(P, t)
        losses[part] = (minus_log(top, others) - lead).squeeze(1)
        if makes_G:
            G[part] = P.scatter_(1, t, others.neg_()).div_(temperature)

    tasks.each(q.device, work, slices(count, width, SIMILARITIES))
    return reduced(losses, reduction).to(q.dtype), G


def _symmetric(q, k, temperature, reduction, makes_G):
    s = formula.logits(widen(q), widen(k), None, temperature)
    index = torch.arange(len(s), device=s.device)
    losses, slopes = [], []
    for dim, t in ((1, index.unsqueeze(1)), (0, index.unsqueeze(0))):
        lead = s.diagonal().unsqueeze(dim) - s.amax(dim, True)
        P = torch.softmax(s, dim)
        top = P.amax(dim, True)
        others = without_(P, t, dim)
        losses.append((minus_log(top, others) - lead).flatten())
        slopes.append(P.scatter_(dim, t, others.neg_()))
    loss = reduced((losses[0] + losses[1]) / 2, reduction).to(q.dtype)
    if not makes_G:
        return loss, q.new_empty(0)
    return loss, slopes[0].add_(slopes[1]).div_(2 * temperature).to(q.dtype)


def _fake_info_nce(q, k, n, temperature, symmetric, reduction, makes_G):
    count = len(q)
    shape = (count, count if n is None else 1 + n.shape[-2]) if makes_G else (0,)
    return q.new_empty(count if reduction == NONE else ()), q.new_empty(shape)


def _fake_backward(dy, *rest):
    """That of both: a gradient of each of the three vectors that needs one."""
    pairs = zip(rest[:3], rest[-1], strict=True)
    return tuple(t.new_empty(t.shape) if need else None for t, need in pairs)


def _triplet_sharding(a, p, n, *options):
    """The distances are (2, ...) or (3, ...), for a of shape (..., D)."""
    if (reduction := options[-1]) != MEAN:
        for i in range(a.dim() - 1):
            yield [i if reduction == NONE else P, i + 1], [i] * 3


def _triplet_backward_sharding(dy, a, *rest):
    *_, reduction, needs = rest
    if reduction != MEAN:
        for i in range(a.dim() - 1):
            outputs = [i if need else R for need in needs]
            yield outputs, [i if reduction == NONE else R, *[i] * 3, i + 1]


def _info_nce_flops(q, k, n, *_):
    """q kᵀ, or q times the negatives."""
    return 2 * prod(q) * (q[0] if n is None else n[-2])


def _info_nce_backward_flops(dy, q, k, n, *rest):
    """The same, once a gradient; that of each row's own negatives is no sum."""
    of_queries, of_keys, of_negatives = rest[-1]
    products = of_queries + (of_keys if n is None else of_negatives and len(n) == 2)
    return products * _info_nce_flops(q, k, n)


_OPTIONS = "float margin, float order, float eps, bool swap, int reduction"

triplet_forward = primitive(
    f"triplet_forward(Tensor a, Tensor p, Tensor n, {_OPTIONS}) -> (Tensor loss, Tensor d)",
    formula=formula.triplet,
    aten=_triplet_forward,
    triton=launcher("contrastive", "triplet_forward"),
    fake=_fake_triplet,
    sharding=_triplet_sharding,
)
triplet_backward = primitive(
    f"triplet_backward(Tensor dy, Tensor a, Tensor p, Tensor n, Tensor d, {_OPTIONS}, "
    "bool[3] needs) -> (Tensor da, Tensor dp, Tensor dn)",
    formula=_formula_triplet_backward,
    aten=_triplet_backward,
    triton=launcher("contrastive", "triplet_backward"),
    fake=_fake_backward,
    sharding=_triplet_backward_sharding,
)
info_nce = primitive(
    "info_nce(Tensor q, Tensor k, Tensor? n, float temperature, bool symmetric, int reduction, "
    "bool makes_G) -> (Tensor loss, Tensor G)",
    formula=formula.info_nce,
    aten=_info_nce,
    triton=launcher("contrastive", "info_nce"),
    fake=_fake_info_nce,
    flops=_info_nce_flops,
)
info_nce_backward = primitive(
    "info_nce_backward(Tensor dy, Tensor q, Tensor k, Tensor? n, Tensor G, int reduction, "
    "bool[3] needs) -> (Tensor dq, Tensor dk, Tensor dn)",
    formula=formula.info_nce_backward,
    triton=formula.info_nce_backward,  # three products of matrices, and nothing else
    fake=_fake_backward,
    flops=_info_nce_backward_flops,
)

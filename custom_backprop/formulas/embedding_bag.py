"""Sums, means and maxima of bags of looked-up rows.

Entry k is the index t_k; a bag is the entries in [bounds_b, bounds_(b+1)), and n_b of them count,
all but those of ``padding_idx``. A bag in which none counts is 0.

    sum:   y_b = Σ_k p_k W_t,        dW_v = Σ_k [t_k = v] p_k dy_b(k),   dp_k = <dy_b(k), W_t>
    mean:  y_b = Σ_k W_t / n_b,      dW_v = Σ_k [t_k = v] dy_b(k) / n_b(k)
    max:   y_bc = max_k W_tc,        dW_vc = Σ_b [v is picked by (b, c)] dy_bc

where p_k, the per-sample weights, are 1 by default and b(k) is the bag of entry k. A maximum picks
its first entry. So the gradient of a sum or a mean is that of embedding, of one row an entry.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .constant import indices
from .embedding import embedding, embedding_backward
from .precision import widen


def bags_of(index: Tensor, bounds: Tensor) -> Tensor:
    """b(k); the number of bags, where an entry is behind the last."""
    n, ends = index.shape[0], bounds[1:]
    # the bags that end at entry k or before are counted: DTensor has no searchsorted
    ended = ends.new_zeros(n + 1).index_add(0, ends.clamp(max=n), torch.ones_like(ends))
    return ended.cumsum(0)[:n]


def factors(
    per_sample_weights: Tensor | None, index: Tensor, bag: Tensor, bags: int, mode: str,
    padding_idx: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """What each entry's row is multiplied by: p_k or 1 / n_b(k), 0 for padding."""
    counted = index != padding_idx
    if per_sample_weights is not None:
        return torch.where(counted, per_sample_weights.to(dtype), 0)
    f = counted.to(dtype)
    if mode == "mean":
        f = f / f.new_zeros(bags + 1).index_add(0, bag, f).clamp_min(1)[bag]
    return f


def _picked(rows: Tensor, index: Tensor, bag: Tensor, bags: int, padding_idx: int) -> Tensor:
    """The entry of each bag's and column's maximum; the number of entries where there is none."""
    to, counted = bag.unsqueeze(1).expand_as(rows), (index != padding_idx).unsqueeze(1)
    x = torch.where(counted, rows, -torch.inf)
    top = x.new_full((bags + 1, rows.shape[1]), -torch.inf).scatter_reduce(0, to, x, "amax")
    entry, none = indices(index, index.shape[0]).unsqueeze(1), index.shape[0]
    first = torch.where(counted & ((x >= top.gather(0, to)) | x.isnan()), entry, none)
    return torch.full_like(top, none, dtype=torch.int64).scatter_reduce(0, to, first, "amin")[:bags]


def bag_forward(
    weight: Tensor, per_sample_weights: Tensor | None, index: Tensor, bounds: Tensor, mode: str,
    padding_idx: int, scale_grad_by_freq: bool, sparse: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """y; and of maxima the index that each picked, or -1."""
    rows = widen(embedding(weight, index, padding_idx, scale_grad_by_freq, sparse))
    bag, bags = bags_of(index, bounds), bounds.shape[0] - 1
    if mode == "max":
        entry = _picked(rows.detach(), index, bag, bags, padding_idx)
        y = torch.cat((rows, rows.new_zeros(1, rows.shape[1]))).gather(0, entry)
        return y.to(weight.dtype), torch.cat((index, index.new_full((1,), -1)))[entry]
    f = factors(per_sample_weights, index, bag, bags, mode, padding_idx, rows.dtype)
    sums = rows.new_zeros(bags + 1, rows.shape[1]).index_add(0, bag, f.unsqueeze(1) * rows)
    return sums[:bags].to(weight.dtype, copy=True), None


def of_entries(dy: Tensor, bag: Tensor) -> Tensor:
    """dy_b(k), 0 behind the last bag."""
    return torch.cat((dy, dy.new_zeros(1, dy.shape[1])))[bag]


def entry_gradients(
    dy: Tensor, per_sample_weights: Tensor | None, index: Tensor, bounds: Tensor, mode: str,
    padding_idx: int,
) -> Tensor:  # fmt: skip
    """The gradient of the row of each entry of a sum or a mean."""
    bag, wide = bags_of(index, bounds), widen(dy)
    f = factors(per_sample_weights, index, bag, dy.shape[0], mode, padding_idx, wide.dtype)
    return of_entries(wide, bag) * f.unsqueeze(1)


def gradient_of_picked(dy: Tensor, picked: Tensor, rows: int) -> Tensor:
    """dW of maxima."""
    wide = widen(dy)
    dw = wide.new_zeros(rows + 1, dy.shape[1])
    return dw.scatter_add(0, torch.where(picked < 0, rows, picked).long(), wide)[:rows].to(dy.dtype)


def bag_backward(
    dy, weight, per_sample_weights, picked, index, bounds, rows, mode, padding_idx,
    scale_grad_by_freq, need_weight, need_per_sample_weights,
):  # fmt: skip
    """dW, of ``rows`` rows, and dp; None for what is not needed."""
    dw = dp = None
    if need_weight and mode == "max":
        dw = gradient_of_picked(dy, picked, rows)
    elif need_weight:
        each = entry_gradients(dy, per_sample_weights, index, bounds, mode, padding_idx)
        dw = embedding_backward(each, index, rows, padding_idx, scale_grad_by_freq).to(dy.dtype)
    if need_per_sample_weights:
        each = of_entries(widen(dy), bags_of(index, bounds))
        dp = (each * widen(embedding(weight, index, -1, False, False))).sum(1)
        dp = torch.where(index == padding_idx, 0, dp).to(per_sample_weights.dtype)
    return dw, dp


def bag_jvp(tw, tp, weight, per_sample_weights, picked, index, bounds, mode, padding_idx, *options):
    """ty: y is linear in W and in p; a maximum follows what it picked."""
    if mode == "max":
        rows = torch.cat((tw, tw.new_zeros(1, tw.shape[1])))
        return rows.gather(0, torch.where(picked < 0, tw.shape[0], picked).long())
    terms = [
        bag_forward(w, p, index, bounds, mode, padding_idx, False, False)[0]
        for w, p in ((tw, per_sample_weights), (weight, tp))
        if w is not None and (w is tw or p is not None)
    ]
    return sum(terms[1:], terms[0])

"""Negative log likelihood and cross-entropy. x is (N, C) or (N, C, D), where D stands for any
number of dimensions; a row r is one of its N·D vectors of C numbers, one a class.

**nll_loss.** L_r = -w_t x_rt for the class t = t_r of the row. Only that x_rt meets the loss: dx_rc
= -w_t dy_r [c = t].

**cross_entropy.** With lse_r = log Σ_c e^(x_rc), the log-probabilities are log p_rc = x_rc - lse_r,
and for any target distribution q

    L_r = -Σ_c q_rc log p_rc = Σ_c q_rc (lse_r - x_rc).

Since dlse_r/dx_rc = e^(x_rc) / Σ_k e^(x_rk) = p_rc, and q does not depend on x,

    dx_rc = dy_r (p_rc Q_r - q_rc),  Q_r = Σ_c q_rc.

Every case is a q, the sum of a soft part u over all classes and of a hard part h_r on the class t
alone, with s = label_smoothing:

    class indices                    u = 0                          h = w_t           Q = h:  dx = dy h (p - [c = t])
    class indices, label smoothing   u_c = w_c s/C                  h = (1 - s) w_t
    class probabilities y            u_c = w_c ((1 - s) y_c + s/C)  h = 0             dy_rc = dL_r w_c (1 - s) (lse_r - x_rc)
    target = ignore_index            u = 0                          h = 0

**Reductions.** "sum" is Σ_r L_r: the gradient of each row's loss is dy_r = dy. "mean" divides by
the weight of the rows, not by their
count: (Σ_r L_r) / (Σ_r w_t), so dy_r = dy / Σ_r w_t (for probabilities: by the number of rows). If
all rows are ignored that is 0/0: the loss is NaN, and dx is 0, as dy_r is taken as 0 where the row
is ignored.

A class outside [0, C) has the weight NaN, and so is its loss.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .constant import constant_in, numbers
from .loss import MEAN, NONE
from .precision import widen

#: what forward keeps for backward: nothing; dx for dy = 1; or of each row its largest x, m, and log
#: Σ e^(x - m). Their sum is lse, but kept apart they lose nothing where all of a row is far from 0
NOTHING, GRADIENT, STATISTICS = 0, 1, 2


def along_classes(v: Tensor, x: Tensor) -> Tensor:
    """(C) as (1, C) or (1, C, 1), to meet x."""
    return v.view(1, -1, *[1] * (x.dim() - 2))


def classes_and_weights(
    target: Tensor, weight: Tensor | None, ignore_index: int, classes: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The class of each row, 0 where it is none, and its weight w_t: 0 where ignored, NaN where it
    is out of range."""
    inside = (target >= 0) & (target < classes)
    index = torch.where(inside & (target != ignore_index), target, 0)
    w = torch.ones_like(target, dtype=dtype) if weight is None else weight.to(dtype)[index]
    return index, torch.where(target == ignore_index, 0, torch.where(inside, w, torch.nan))


def reduced(rows: Tensor, total: Tensor | int, reduction: int) -> Tensor:
    """The loss of all rows."""
    if reduction == NONE:
        return rows
    return rows.sum() / total if reduction == MEAN else rows.sum()


def of_rows(dy: Tensor, target: Tensor, w: Tensor, reduction: int, ignore_index: int) -> Tensor:
    """dy_r, 0 where the row is ignored."""
    rows = dy.to(w.dtype) / w.sum() if reduction == MEAN else dy.to(w.dtype)
    return (
        rows.expand_as(w)
        if target.is_floating_point()
        else torch.where(target == ignore_index, 0, rows)
    )


def nll_forward(
    x: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """The loss, and Σ_r w_t."""
    wide = widen(x)
    index, w = classes_and_weights(target, weight, ignore_index, x.shape[1], wide.dtype)
    rows = torch.where(
        target == ignore_index, 0, -w * wide.gather(1, index.unsqueeze(1)).squeeze(1)
    )
    return reduced(rows, w.sum(), reduction).to(x.dtype), w.sum().to(x.dtype)


def nll_backward(
    dy: Tensor,
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    total: Tensor,
    reduction: int,
    ignore_index: int,
) -> Tensor:
    """dx_rc = -w_t dy_r [c = t]. No value of x is read; ``total`` is derived again."""
    index, w = classes_and_weights(target, weight, ignore_index, x.shape[1], widen(x).dtype)
    hard = (-w * of_rows(dy, target, w, reduction, ignore_index)).unsqueeze(1)
    return constant_in(torch.where(_onehot(index, x), hard, 0).to(x.dtype), x)


def _onehot(index: Tensor, x: Tensor) -> Tensor:
    """[c = t], of the shape of x."""
    return along_classes(numbers(x, x.shape[1]), x) == index.unsqueeze(1)


def _parts(
    x: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, smoothing: float
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """(u, t, w): the soft part or None, the classes of the hard part or None, and the weight of
    each row in the mean."""
    class_weight = along_classes(
        x.new_ones(x.shape[1]) if weight is None else weight.to(x.dtype), x
    )
    if target.is_floating_point():
        u = class_weight * ((1 - smoothing) * target.to(x.dtype) + smoothing / x.shape[1])
        return u, None, torch.ones_like(x.select(1, 0))
    index, w = classes_and_weights(target, weight, ignore_index, x.shape[1], x.dtype)
    if smoothing == 0:
        return None, index, w
    counted = (target != ignore_index).unsqueeze(1)
    return torch.where(counted, class_weight * (smoothing / x.shape[1]), 0), index, w


def forward(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    smoothing: float,
    keep: int,
) -> tuple[Tensor, Tensor]:
    """The loss, and what ``keep`` says."""
    wide = widen(x)
    log_p = torch.log_softmax(wide, 1)
    u, index, w = _parts(wide, target, weight, ignore_index, smoothing)
    rows = torch.zeros_like(w)
    if index is not None:
        rows = rows - (1 - smoothing) * w * log_p.gather(1, index.unsqueeze(1)).squeeze(1)
    if u is not None:
        rows = rows - (u * log_p).sum(1)
    if index is not None:
        rows = torch.where(target == ignore_index, 0, rows)
    loss = reduced(rows, w.sum(), reduction).to(x.dtype)
    if keep == GRADIENT:
        return loss, backward(
            torch.ones_like(loss),
            x,
            target,
            weight,
            loss,
            reduction,
            ignore_index,
            smoothing,
            True,
            False,
        )[0]
    if keep == NOTHING:
        return loss, x.new_empty(0)
    largest = wide.amax(1)
    return loss, torch.stack([largest, (wide - largest.unsqueeze(1)).logsumexp(1)])


def backward(
    dy: Tensor,
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    statistics: Tensor,
    reduction: int,
    ignore_index: int,
    smoothing: float,
    need_x: bool,
    need_target: bool,
) -> tuple[Tensor, Tensor]:
    """dx, and the gradient of class probabilities; an empty tensor for one that is not needed. The
    statistics are derived again."""
    wide = widen(x)
    log_p = torch.log_softmax(wide, 1)
    u, index, w = _parts(wide, target, weight, ignore_index, smoothing)
    rows = of_rows(dy, target, w, reduction, ignore_index).unsqueeze(1)
    dx = dtarget = x.new_empty(0)
    if need_x:
        q = torch.zeros_like(wide) if u is None else u
        if index is not None:
            q = torch.where(_onehot(index, x), q + (1 - smoothing) * w.unsqueeze(1), q)
        dx = (rows * (log_p.exp() * q.sum(1, keepdim=True) - q)).to(x.dtype)
    if need_target:
        class_weight = 1 if weight is None else along_classes(weight.to(wide.dtype), x)
        dtarget = (-rows * (1 - smoothing) * class_weight * log_p).to(target.dtype)
    return dx, dtarget


def jvp(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    smoothing: float,
    tx: Tensor | None,
    tt: Tensor | None,
) -> Tensor:
    """tL = Σ_r dy_r (Σ_c dL_r/dx_rc tx_rc + Σ_c dL_r/dq_rc tq_rc), with dy_r of a dy = 1."""
    one = torch.ones_like(x.select(1, 0) if reduction == NONE else x.sum())
    dx, dtarget = backward(
        one,
        x,
        target,
        weight,
        one,
        reduction,
        ignore_index,
        smoothing,
        tx is not None,
        tt is not None,
    )
    terms = torch.stack(
        [(d * t).sum(1) for d, t in ((dx, tx), (dtarget, tt)) if t is not None]
    ).sum(0)
    return terms if reduction == NONE else terms.sum()

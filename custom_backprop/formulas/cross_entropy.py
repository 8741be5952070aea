"""Cross-entropy. x is (N, C) or (N, C, D), where D stands for any number of dimensions. A row r is
one of its N·D vectors of C numbers, one per class.

With lse_r = log Σ_c e^(x_rc), the log-probabilities are log p_rc = x_rc - lse_r,
and for any target distribution q

    L_r = -Σ_c q_rc log p_rc = Σ_c q_rc (lse_r - x_rc).

Since dlse_r/dx_rc = e^(x_rc) / Σ_k e^(x_rk) = p_rc, and q does not depend on x,

    dx_rc = dy_r (p_rc Q_r - q_rc),  Q_r = Σ_c q_rc.

Every case has its q, the sum of a soft part u for all classes and of a hard part h_r for the class
t alone. With s = label_smoothing:

    class indices                    u = 0                          h = w_t
    class indices, label smoothing   u_c = w_c s/C                  h = (1 - s) w_t
    class probabilities y            u_c = w_c ((1 - s) y_c + s/C)  h = 0
    target = ignore_index            u = 0                          h = 0

For the first, Q = h and dx = dy h (p - [c = t]). Probabilities y have a gradient, too:
dy_rc = dL_r w_c (1 - s) (lse_r - x_rc).

Where p_t is nearly 1, p_t - 1 and log p_t cancel: in float32 no digit is left once x_t leads by 17,
and the row stops learning ("softmax collapse", Prieto et al., arXiv 2501.04697). Nothing
cancels in the sum of the other probabilities,

    o_r = Σ_{c != t} p_rc,  p_t - 1 = -o_r,  log p_t = log(1 - o_r):

the hard part of dx is dy h p_c for c != t and -dy h o for c = t, and its loss is -h log1p(-o) where
o < 1/2. From x, o = S / (S + e^(x_t - m)) with S = Σ_{c != t} e^(x_c - m); if m = x_t, the loss is
h log1p(S).

Reductions are those of :mod:`custom_backprop.formulas.nll`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .loss import NONE
from .nll import along_classes, classes_and_weights, of_rows, onehot, reduced
from .precision import widen

#: what forward computes for backward: nothing; dx for dy = 1; or for each row its largest x, m, and
#: log Σ e^(x - m). Their sum is lse; two values lose no accuracy if a whole row is far from 0
NOTHING, GRADIENT, STATISTICS = 0, 1, 2


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


def _others(p: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """([c = t], o): which is the class of each row, and the sum of the others' p, (N, 1) or (N, 1,
    D)."""
    hit = onehot(index, p)
    return hit, torch.where(hit, 0, p).sum(1, keepdim=True)


def _surprise(log_p: Tensor, index: Tensor) -> Tensor:
    """-log p_t of each row."""
    others = _others(log_p.exp(), index)[1].squeeze(1)
    likely = others < 0.5
    exact = -torch.log1p(-torch.where(likely, others, 0))
    return torch.where(likely, exact, -log_p.gather(1, index.unsqueeze(1)).squeeze(1))


def forward(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    smoothing: float,
    makes: int,
) -> tuple[Tensor, Tensor]:
    """The loss, and what ``makes`` says for backward."""
    wide = widen(x)
    log_p = torch.log_softmax(wide, 1)
    u, index, w = _parts(wide, target, weight, ignore_index, smoothing)
    rows = torch.zeros_like(w)
    if index is not None:
        rows = rows + (1 - smoothing) * w * _surprise(log_p, index)
    if u is not None:
        rows = rows - (u * log_p).sum(1)
    if index is not None:
        rows = torch.where(target == ignore_index, 0, rows)
    loss = reduced(rows, w.sum(), reduction).to(x.dtype)
    if makes == GRADIENT:
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
    if makes == NOTHING:
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
    """dx, and the gradient of class probabilities; an empty tensor for one that is not needed. This
    computes the statistics again."""
    wide = widen(x)
    log_p = torch.log_softmax(wide, 1)
    u, index, w = _parts(wide, target, weight, ignore_index, smoothing)
    rows = of_rows(dy, target, w, reduction, ignore_index).unsqueeze(1)
    dx = dtarget = x.new_empty(0)
    if need_x:
        p = log_p.exp()
        d = torch.zeros_like(p) if u is None else p * u.sum(1, keepdim=True) - u
        if index is not None:
            hit, others = _others(p, index)
            d = d + (1 - smoothing) * w.unsqueeze(1) * torch.where(hit, -others, p)
        dx = (rows * d).to(x.dtype)
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
    """tL = Σ_r dy_r (Σ_c dL_r/dx_rc tx_rc + Σ_c dL_r/dq_rc tq_rc), with dy_r for dy = 1."""
    one = x.new_ones(())
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

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

Where one p_m is nearly 1, p_m Q - q_m and log p_m cancel: in float32 no digit is left once x_m
leads by 17, and a row that is right stops learning ("softmax collapse", Prieto et al., arXiv
2501.04697). Nothing cancels in the sums over the other classes,

    o_r = Σ_{c != m} p_rc = 1 - p_rm,  T_r = Σ_{c != m} q_rc = Q_r - q_rm,

    p_m Q - q_m = Q - o Q - q_m = T - o Q,  log p_m = log1p(-o).

So dx_m and log p_m are computed where p_m > 1/2, as it can be of one class of a row alone. If that
is the class of a hard target, T is 0 and dx_m = -dy h o. From x, o = S / (1 + S) and -log p_m =
log1p(S) with S = Σ_{c != m} e^(x_c - x_m), so that L = Q log1p(S) + Σ_c q_c (x_m - x_c).

Reductions are those of :mod:`custom_backprop.formulas.nll`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .loss import NONE
from .nll import along_classes, classes_and_weights, of_rows, onehot, reduced
from .precision import widen

#: what forward computes for backward: nothing; dx for dy = 1; or for each row its largest x, m, and
#: log Σ e^(x - m), and for class probabilities Q and T. The first two add up to lse, but lose no
#: accuracy if a whole row is far from 0
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


def _whole(
    u: Tensor | None, index: Tensor | None, w: Tensor, smoothing: float, x: Tensor
) -> Tensor:
    """q, from its :func:`_parts`."""
    q = torch.zeros_like(x) if u is None else u
    if index is None:
        return q
    return q + torch.where(onehot(index, x), (1 - smoothing) * w.unsqueeze(1), 0)


def of_certain(x: Tensor, dim: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(log p, p, [p_c > 1/2], o), where o is 1 if no class of the row is so certain."""
    log_p = torch.log_softmax(x, dim)
    p = log_p.exp()
    certain = p > 0.5
    others = torch.where(certain, 0, p).sum(dim, keepdim=True)
    certain = certain & (others < 0.5)
    exact = torch.log1p(-torch.where(others < 0.5, others, 0))
    return torch.where(certain, exact, log_p), p, certain, others


def _sums(q: Tensor, certain: Tensor) -> tuple[Tensor, Tensor]:
    """Q and T."""
    return q.sum(1, keepdim=True), torch.where(certain, 0, q).sum(1, keepdim=True)


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
    log_p, _, certain, _ = of_certain(wide)
    u, index, w = _parts(wide, target, weight, ignore_index, smoothing)
    rows = torch.zeros_like(w)
    if index is not None:
        rows = rows - (1 - smoothing) * w * log_p.gather(1, index.unsqueeze(1)).squeeze(1)
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
    statistics = [wide.amax(1), -log_p.amax(1)]
    if u is not None and index is None:
        statistics += [each.squeeze(1) for each in _sums(u, certain)]
    return loss, torch.stack(statistics)


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
    log_p, p, certain, others = of_certain(wide)
    u, index, w = _parts(wide, target, weight, ignore_index, smoothing)
    rows = of_rows(dy, target, w, reduction, ignore_index).unsqueeze(1)
    dx = dtarget = x.new_empty(0)
    if need_x:
        q = _whole(u, index, w, smoothing, wide)
        total, rest = _sums(q, certain)
        d = torch.where(certain, rest - others * total, p * total - q)
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

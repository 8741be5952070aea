"""Primitives of nll_loss and cross_entropy, on x (N, C) or (N, C, D).

On a CPU cross_entropy walks in chunks of rows that stay in cache: one softmax, written where the
gradient will stand, gives the loss and the gradient both. Memory sees one reading of x and one
writing of dx, and no log-probabilities.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..formulas import cross_entropy as formula
from ..formulas.cross_entropy import GRADIENT, NOTHING, STATISTICS, along_classes
from ..formulas.loss import MEAN, NONE, SUM
from ..formulas.precision import HALF, wide, widen
from .library import builtin, launcher, primitive

aten = torch.ops.aten
_nll_forward, _nll_backward = builtin(aten.nll_loss_forward), builtin(aten.nll_loss_backward)

#: elements of a chunk: 2 MiB of float32
CHUNK = 2**19

#: up to so many elements a call costs more than a pass, and the fewest calls are stock's own four
SMALL = 2**16


def is_small(x: Tensor, target: Tensor, smoothing: float) -> bool:
    """Whether log_softmax and nll_loss, one after the other, are the quickest way there and
    back."""
    return (
        x.numel() <= SMALL
        and x.dim() == 2
        and smoothing == 0
        and x.dtype not in HALF
        and not target.is_floating_point()
    )


def nll_forward_aten(
    x: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int
) -> tuple[Tensor, Tensor]:
    if x.dim() == 2:
        return _nll_forward(x, target, weight, reduction, ignore_index)
    loss, total = aten.nll_loss2d_forward.default(
        x.unsqueeze(3), target.unsqueeze(2), weight, reduction, ignore_index
    )
    return loss.squeeze(2) if reduction == NONE else loss, total


def nll_backward_aten(
    dy: Tensor,
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    total: Tensor,
    reduction: int,
    ignore_index: int,
) -> Tensor:
    if x.dim() == 2:
        return _nll_backward(dy, x, target, weight, reduction, ignore_index, total)
    dy, x = dy.unsqueeze(2) if reduction == NONE else dy, x.contiguous().unsqueeze(3)
    return aten.nll_loss2d_backward.default(
        dy, x, target.unsqueeze(2), weight, reduction, ignore_index, total
    ).squeeze(3)


class _Target:
    """The distribution q of each row: ``hard`` on the class ``index``, and ``soft`` over all (see
    the formula). (N, 1) or (N, 1, D)."""

    def __init__(
        self,
        x: Tensor,
        target: Tensor,
        weight: Tensor | None,
        reduction: int,
        ignore_index: int,
        smoothing: float,
    ) -> None:
        dtype = wide(x.dtype)
        self.target, self.smoothing, self.reduction, self.classes = (
            target,
            smoothing,
            reduction,
            x.shape[1],
        )
        self.weight = None if weight is None else along_classes(weight.to(dtype), x)
        self.probabilities = target.is_floating_point()
        self.is_soft = self.probabilities or smoothing > 0
        self.total: Tensor | int = x.shape[0] * x.shape[2:].numel()
        if self.probabilities:
            return
        self.counted = (target != ignore_index).unsqueeze(1)
        self.index = torch.where(self.counted, target.unsqueeze(1), 0)
        _check(self.index, x)
        w = (
            self.counted.to(dtype)
            if weight is None
            else torch.where(self.counted, weight.to(dtype)[self.index], 0)
        )
        self.hard = (1 - smoothing) * w if smoothing > 0 else w
        self.uniform: Any = (
            self.counted.to(dtype) * (smoothing / x.shape[1]) if smoothing > 0 else None
        )
        self.total = w.sum() if reduction == MEAN else 1

    def shares(self, dy: Tensor) -> Tensor:
        """dy_r, to be broadcast over the classes."""
        dy = widen(dy.unsqueeze(1) if self.reduction == NONE else dy)
        dy = dy / self.total if self.reduction == MEAN else dy
        return dy if self.probabilities else torch.where(self.counted, dy, 0)

    def soft(self, rows: slice) -> Tensor:
        """u of some rows, to be broadcast over the classes."""
        if self.probabilities:
            u = widen(self.target[rows])
            if self.smoothing > 0:
                u = u * (1 - self.smoothing) + self.smoothing / self.classes
        else:
            u = self.uniform[rows]
        return u if self.weight is None else u * self.weight


def _check(index: Tensor, x: Tensor) -> None:
    """Raises IndexError on a CPU, as stock does. On a GPU that would wait for it."""
    if index.device.type == "cpu" and index.numel():
        for bound in torch.aminmax(index):
            t = bound.item()
            if not 0 <= t < x.shape[1]:
                raise IndexError(f"Target {t} is out of bounds for {x.shape[1]} classes.")


def _step(x: Tensor) -> int:
    """How many of the N make a chunk."""
    return max(1, CHUNK // max(1, x.shape[1:].numel()))


def _walk(
    x: Tensor,
    q: _Target,
    dy: Tensor | None,
    losses: Tensor | None,
    statistics: Tensor | None,
    dx: Tensor | None,
    dtarget: Tensor | None,
) -> None:
    """Fills what is not None: of each row its loss, m and log Σ e^(x - m), dx and the gradient of
    class probabilities."""
    dtype = wide(x.dtype)
    step = _step(x)
    scratch = torch.empty_like(x[:step], dtype=dtype) if dx is None or dx.dtype != dtype else None
    rowwise = dy is not None and dy.dim() > 0 and dy.shape[0] > 1
    by_logarithm = q.is_soft or dtarget is not None
    softmax = aten._log_softmax.out if by_logarithm else aten._softmax.out
    for start in range(0, x.shape[0], step):
        rows = slice(start, start + step)
        z = widen(x[rows])
        p = softmax(z, 1, False, out=dx[rows] if scratch is None else scratch[: len(z)])  # type: ignore[index]
        u = q.soft(rows).expand_as(z) if q.is_soft else None
        hard: Any
        index: Any
        hard, index = (None, None) if q.probabilities else (q.hard[rows], q.index[rows])
        if losses is not None:
            # the largest probability of a row is e^0 / Σ e^(x - m): its logarithm is exact where
            # that of a small p_t is not
            m, top = z.amax(1, True), p.amax(1, True)
            log_sum = top.neg_() if by_logarithm else top.log_().neg_()
            if hard is not None:
                torch.mul(hard, log_sum - (z.gather(1, index) - m), out=losses[rows])
            if u is not None:
                losses[rows] -= (u * p).sum(1, keepdim=True)
            if statistics is not None:
                statistics[0, rows], statistics[1, rows] = m.squeeze(1), log_sum.squeeze(1)
        k: Any = dy[rows] if rowwise else dy  # type: ignore[index]
        if dtarget is not None:
            torch.mul(
                p,
                k * (q.smoothing - 1) if q.weight is None else k * (q.smoothing - 1) * q.weight,
                out=dtarget[rows],
            )
        if dx is None:
            continue
        if by_logarithm:
            p.exp_()
        k_hard = None if hard is None else k * hard
        if u is None:
            p.mul_(k_hard)
        else:
            total = k * u.sum(1, keepdim=True)
            p.mul_(total if k_hard is None else total + k_hard).sub_(u * k)
        if k_hard is not None:
            p.scatter_add_(1, index, -k_hard)
        if scratch is not None:
            dx[rows] = p


def _classes(
    x: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int
) -> Tensor:
    """The loss alone, without label smoothing: by stock's two operators, chunk by chunk."""
    if not x.numel() or (x.dtype not in HALF and x.numel() <= 2 * CHUNK):
        return torch._C._nn.cross_entropy_loss(x, target, weight, reduction, ignore_index)  # type: ignore[arg-type]
    step = _step(x)
    scratch = torch.empty_like(x[:step], dtype=wide(x.dtype))
    parts = []
    for rows in (slice(i, i + step) for i in range(0, x.shape[0], step)):
        z = widen(x[rows])
        log_p = aten._log_softmax.out(z, 1, False, out=scratch[: z.shape[0]])
        parts.append(
            nll_forward_aten(
                log_p, target[rows], widen(weight), NONE if reduction == NONE else SUM, ignore_index
            )
        )
    losses, totals = zip(*parts, strict=True)
    if reduction == NONE:
        return torch.cat(losses).to(x.dtype)
    loss = torch.stack(losses).sum()
    return (loss / torch.stack(totals).sum() if reduction == MEAN else loss).to(x.dtype)


def forward_aten(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    smoothing: float,
    keep: int,
) -> tuple[Tensor, Tensor]:
    if keep == NOTHING and smoothing == 0 and not target.is_floating_point():
        return _classes(x.contiguous(), target, weight, reduction, ignore_index), x.new_empty(0)
    dense = x.contiguous()
    q = _Target(dense, target, weight, reduction, ignore_index, smoothing)
    kept = _kept(dense, keep)
    losses = dense.new_zeros((x.shape[0], 1, *x.shape[2:]), dtype=wide(x.dtype))
    gradient, statistics = (kept if keep == which else None for which in (GRADIENT, STATISTICS))
    dy = q.shares(x.new_ones(())) if keep == GRADIENT else None
    _walk(dense, q, dy, losses, statistics, gradient, None)
    if not q.probabilities:
        losses = torch.where(q.counted, losses, 0)
    loss = formula.reduced(losses.squeeze(1), q.total, reduction).to(x.dtype)
    return loss, like(kept, x) if keep == GRADIENT else kept


def _backward(
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
    """By the same walk: a softmax of a chunk costs no more than an exponential of it, so the
    statistics are not needed."""
    dense = x.contiguous()
    q = _Target(dense, target, weight, reduction, ignore_index, smoothing)
    dx = torch.empty_like(dense) if need_x else None
    dtarget = torch.empty_like(dense, dtype=target.dtype) if need_target else None
    _walk(dense, q, q.shares(dy), None, None, dx, dtarget)
    return x.new_empty(0) if dx is None else like(dx, x), x.new_empty(
        0
    ) if dtarget is None else like(dtarget, target)


def like(t: Tensor, layout: Tensor) -> Tensor:
    """A contiguous ``t`` as ``torch.empty_like(layout)`` lays it out."""
    return t if layout.is_contiguous() else torch.empty_like(layout, dtype=t.dtype).copy_(t)


def _kept(x: Tensor, keep: int) -> Tensor:
    """Room for what forward keeps."""
    if keep == GRADIENT:
        return torch.empty_like(x)
    dtype = wide(x.dtype)
    return (
        x.new_empty((2, x.shape[0], *x.shape[2:]), dtype=dtype)
        if keep == STATISTICS
        else x.new_empty(0)
    )


def _fake_forward(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    smoothing: float,
    keep: int,
) -> tuple[Tensor, Tensor]:
    return x.new_empty((x.shape[0], *x.shape[2:]) if reduction == NONE else ()), _kept(x, keep)


def _fake_backward(dy: Tensor, x: Tensor, target: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    *_, need_x, need_target = rest
    return torch.empty_like(x) if need_x else x.new_empty(0), torch.empty_like(
        target
    ) if need_target else x.new_empty(0)


_TARGET = "Tensor target, Tensor? weight"


def _formula_forward(*args: Any) -> tuple[Tensor, Tensor]:
    x, keep = args[0], args[-1]
    loss, kept = formula.forward(*args)
    return loss, like(kept.contiguous(), x) if keep == GRADIENT else kept


def _formula_backward(*args: Any) -> tuple[Tensor, Tensor]:
    _, x, target, *_, need_x, need_target = args
    dx, dtarget = formula.backward(*args)
    return like(dx.contiguous(), x) if need_x else dx, like(
        dtarget.contiguous(), target
    ) if need_target else dtarget


nll_forward = primitive(
    f"nll_loss_forward(Tensor x, {_TARGET}, int reduction, int ignore_index) -> (Tensor loss, Tensor total)",
    formula=formula.nll_forward,
    aten=nll_forward_aten,
    triton=launcher("cross_entropy", "nll_forward"),
    fake=lambda x, target, weight, reduction, ignore_index: (
        x.new_empty(target.shape if reduction == NONE else ()),
        x.new_empty(()),
    ),
)
nll_backward = primitive(
    f"nll_loss_backward(Tensor dy, Tensor x, {_TARGET}, Tensor total, int reduction, int ignore_index) -> Tensor",
    formula=formula.nll_backward,
    aten=nll_backward_aten,
    triton=launcher("cross_entropy", "nll_backward"),
    fake=lambda dy, x, target, weight, total, reduction, ignore_index: x.new_empty(x.shape),
)
forward = primitive(
    f"cross_entropy_forward(Tensor x, {_TARGET}, int reduction, int ignore_index, float smoothing, int keep) -> (Tensor loss, Tensor kept)",
    formula=_formula_forward,
    aten=forward_aten,
    triton=launcher("cross_entropy", "forward"),
    fake=_fake_forward,
)
backward = primitive(
    f"cross_entropy_backward(Tensor dy, Tensor x, {_TARGET}, Tensor statistics, int reduction, int ignore_index, float smoothing, "
    "bool need_x, bool need_target) -> (Tensor dx, Tensor dtarget)",
    formula=_formula_backward,
    aten=_backward,
    triton=launcher("cross_entropy", "backward"),
    fake=_fake_backward,
)

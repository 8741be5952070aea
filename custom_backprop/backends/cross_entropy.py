"""Primitives of cross_entropy, on x (N, C) or (N, C, D).

On a CPU it walks in chunks of rows, up to 4M elements in one: one softmax, written where the
gradient will stand, gives the loss and the gradient both. Memory sees no log-probabilities.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..formulas import cross_entropy as formula
from ..formulas.cross_entropy import GRADIENT, NOTHING, STATISTICS
from ..formulas.loss import MEAN, NONE, SUM
from ..formulas.nll import along_classes, reduced
from ..formulas.precision import HALF, wide, widen
from . import nll, tasks
from .library import P, R, empty_if, launcher, primitive, slices
from .tasks import chunk_of

aten = torch.ops.aten

#: up to so many elements a call costs more than a pass
SMALL = 2**16

#: up to so many stock's log-probabilities stay in cache
WHOLE = 2**20


class _Target:
    """The distribution q of each row: ``hard`` on the class ``index``, and ``soft`` over all (see
    the formula). (N, 1) or (N, 1, D)."""

    def __init__(self, x, target, weight, reduction, ignore_index, smoothing):
        dtype = wide(x.dtype)
        self.target, self.smoothing = target, smoothing
        self.reduction, self.classes = reduction, x.shape[1]
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
        self.hard = w
        if smoothing > 0:
            self.hard = (1 - smoothing) * w
            self.uniform = self.counted.to(dtype) * (smoothing / x.shape[1])
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


def _chunks(x):
    return slices(len(x), x.shape[1:].numel(), chunk_of(x))


def without_(p: Tensor, index: Tensor, dim: int = 1) -> Tensor:
    """1 - p_t, which would cancel: the sum of p, in which p_t is set to 0."""
    return p.scatter_(dim, index, 0).sum(dim, True)


def minus_log(top: Tensor, others: Tensor) -> Tensor:
    """log Σ e^(x - m) of each row, from its largest probability e^0 / Σ e^(x - m), whose logarithm
    is exact where that of a small p_t is not; where it is nearly 1, from the sum of the others."""
    return torch.where(others < 0.5, torch.log1p(-others), top.log()).neg_()


def _walk(x, q, dy, losses, statistics, dx, dtarget):
    """Fills what is not None: of each row its loss and statistics, dx and the gradient of class
    probabilities. dx may be x: a chunk's softmax is written over it when nothing else of x is
    wanted."""
    over_dx = dx is not None and dx.dtype == wide(x.dtype)
    count = (0 if over_dx else 1) + ((2 if dtarget is None else 3) if q.is_soft else 0)
    fill = _fill_soft if q.is_soft else _fill_hard

    def work(rows, memory):
        z = widen(x[rows])
        k = dy[rows] if dy is not None and dy.dim() else dy
        room = tasks.scratch(memory, z, count)
        p, *room = room if not over_dx else (dx[rows], *room)
        fill(z, p, room, q, rows, k, losses, statistics, dx, dtarget)
        if dx is not None and not over_dx:
            dx[rows] = p

    tasks.each(x.device, work, _chunks(x))


def _fill_hard(z, p, _, q, rows, k, losses, statistics, dx, __):
    """Where each row has one class t: log p_t = x_t - m - log Σ; dx = k w p, dx_t = -k w (1 - p_t).
    dx is left in p."""
    hard, index = q.hard[rows], q.index[rows]
    if losses is not None:
        m = z.amax(1, True)
        lead = z.gather(1, index) - m
    aten._softmax.out(z, 1, False, out=p)
    top = p if losses is None else p.amax(1, True)
    others = without_(p, index)
    if losses is not None:
        log_sum = minus_log(top, others)
        torch.mul(hard, log_sum - lead, out=losses[rows])
        _fill_statistics(statistics, rows, m, log_sum)
    if dx is not None:
        k_hard = k * hard
        p.mul_(k_hard).scatter_(1, index, others.mul_(k_hard).neg_())


def _fill_soft(z, p, room, q, rows, k, losses, statistics, dx, dtarget):
    """Where each row has a distribution u over all classes, and perhaps one class beside it: see
    the formula. New memory costs more than what is done in it, so it is done in ``room``."""
    u = q.soft(rows).expand_as(z)
    hard, index = (None, p) if q.probabilities else (q.hard[rows], q.index[rows])
    wants_logs = losses is not None or dtarget is not None
    if wants_logs:
        m = z.amax(1, True)
        lead = None if hard is None else z.gather(1, index) - m
        below = torch.sub(z, m, out=room[-1])
        if losses is not None:
            losses[rows] = torch.mul(u, below, out=room[0]).sum(1, True).neg_()
    aten._softmax.out(z, 1, False, out=p)
    top = p.amax(1, True) if wants_logs else p
    certain = torch.gt(p, 0.5, out=room[0])  # in p's dtype: it multiplies
    others = p.addcmul_(p, certain, value=-1).sum(1, True)
    of_others = torch.addcmul(u, u, certain, value=-1, out=room[1])
    total, rest = u.sum(1, True), of_others.sum(1, True)
    if hard is not None:
        apart = hard * (1 - certain.gather(1, index))
        total, rest = total + hard, rest + apart
    if wants_logs:
        log_sum = minus_log(top, others)
    if losses is not None:
        losses[rows] += log_sum * total
        if hard is not None:
            losses[rows] -= hard * lead
        _fill_statistics(statistics, rows, m, log_sum, *((total, rest) if hard is None else ()))
    if dtarget is not None:
        slope = k * (q.smoothing - 1)
        slope = slope if q.weight is None else slope * q.weight
        torch.mul(below.sub_(log_sum), slope, out=dtarget[rows])
    if dx is not None:
        p.mul_(k * total).sub_(of_others.mul_(k))
        if hard is not None:
            p.scatter_add_(1, index, -k * apart)
        p.addcmul_(certain, k * (rest - others * total))


def _fill_statistics(statistics, rows, *found):
    if statistics is not None:
        for into, each in zip(statistics, found, strict=True):
            into[rows] = each.squeeze(1)


def _classes(x, target, weight, reduction, ignore_index):
    """The loss alone, without label smoothing: by stock's two operators, chunk by chunk."""
    if not x.numel() or (x.dtype not in HALF and x.numel() <= WHOLE):
        stock: Any = torch._C._nn.cross_entropy_loss  # its stub takes reduction for a string
        return stock(x, target, weight, reduction, ignore_index)
    weight, of_part = widen(weight), NONE if reduction == NONE else SUM

    def work(rows, memory):
        z = widen(x[rows])
        (log_p,) = tasks.scratch(memory, z)
        aten._log_softmax.out(z, 1, False, out=log_p)
        return nll.forward_aten(log_p, target[rows], weight, of_part, ignore_index)

    losses, totals = zip(*tasks.each(x.device, work, _chunks(x)), strict=True)
    if reduction == NONE:
        return torch.cat(losses).to(x.dtype)
    loss = torch.stack(losses).sum()
    return (loss / torch.stack(totals).sum() if reduction == MEAN else loss).to(x.dtype)


def _small(x, target, weight, reduction, ignore_index):
    """The loss and its gradient for dy = 1, in few calls; None where the logarithm of a p_t has
    lost its digits."""
    p = torch._softmax(x, 1, False)
    index = target.clamp(0, x.shape[1] - 1).unsqueeze(1)  # ignored rows too, and weigh 0 below
    p_t = p.gather(1, index)
    if p_t.min() < torch.finfo(x.dtype).tiny:
        return None
    others = without_(p, index)
    log_p_t = torch.where(others < 0.5, torch.log1p(-others), p_t.log())
    p.scatter_(1, index, log_p_t)
    loss, total = nll.forward_aten(p, target, weight, reduction, ignore_index)
    one = torch.ones_like(loss)
    d = nll.backward_aten(one, p, target, weight, total, reduction, ignore_index)
    return loss, p.scatter_(1, index, others.neg_()).mul_(d.gather(1, index).neg_())


def _forward(x, target, weight, reduction, ignore_index, smoothing, makes, dx=None):
    """``dx`` is memory for the gradient, and may be a contiguous x."""
    dense = x.contiguous()
    if smoothing == 0 and not target.is_floating_point():
        if makes == NOTHING:
            return _classes(dense, target, weight, reduction, ignore_index), None
        small = x.is_cpu and x.dim() == 2 and 0 < x.numel() <= SMALL and x.dtype not in HALF
        if makes == GRADIENT and small:
            found = _small(dense, target, weight, reduction, ignore_index)
            if found is not None:
                return found[0], _like(found[1], x)
    q = _Target(dense, target, weight, reduction, ignore_index, smoothing)
    made = _made(dense, target, makes) if dx is None else dx
    rows = dense.new_zeros((x.shape[0], *x.shape[2:]), dtype=wide(x.dtype))
    dx, statistics = (made if makes == which else None for which in (GRADIENT, STATISTICS))
    ones = x.new_ones(rows.shape if reduction == NONE else ())
    dy = q.shares(ones) if makes == GRADIENT else None
    _walk(dense, q, dy, rows.unsqueeze(1), statistics, dx, None)
    if not q.probabilities:
        rows.masked_fill_(target == ignore_index, 0)
    loss = reduced(rows, q.total, reduction).to(x.dtype)
    return loss, made if dx is None else _like(dx, x)


def _backward(
    dy, x, target, weight, statistics, reduction, ignore_index, smoothing, need_x, need_target
):
    """By the same walk: a softmax of a chunk costs no more than an exponential of it, so the
    statistics are not needed."""
    dense = x.contiguous()
    q = _Target(dense, target, weight, reduction, ignore_index, smoothing)
    dx = empty_if(need_x, dense)
    dtarget = torch.empty_like(dense, dtype=target.dtype) if need_target else None
    _walk(dense, q, q.shares(dy), None, None, dx, dtarget)
    return _like(dx, x), _like(dtarget, target)


def _like(t: Tensor | None, layout: Tensor) -> Tensor | None:
    """A contiguous ``t`` as ``torch.empty_like(layout)`` lays it out."""
    if t is None or layout.is_contiguous():
        return t
    return torch.empty_like(layout, dtype=t.dtype).copy_(t)


def _made(x: Tensor, target: Tensor, makes: int) -> Tensor | None:
    """Memory for what forward makes beside the loss."""
    if makes == STATISTICS:
        count = 4 if target.is_floating_point() else 2
        return x.new_empty((count, x.shape[0], *x.shape[2:]), dtype=wide(x.dtype))
    return empty_if(makes == GRADIENT, x)


def _formula_forward(*args):
    x, makes = args[0], args[-1]
    loss, made = formula.forward(*args)
    return loss, _like(made.contiguous(), x) if makes == GRADIENT else made


def _formula_backward(*args):
    found = zip(formula.backward(*args), args[1:3], args[-2:], strict=True)
    return tuple(_like(grad.contiguous(), t) if need else None for grad, t, need in found)


def _fake_forward(x, target, weight, reduction, *rest):
    shape = (x.shape[0], *x.shape[2:]) if reduction == NONE else ()
    return x.new_empty(shape), _made(x, target, rest[-1])


def _sharding(x, target, weight, reduction, *rest):
    for i, t, row in nll.shards(x, target, reduction):
        made = {GRADIENT: i, STATISTICS: row + 1}.get(rest[-1], R)
        yield [row if reduction == NONE else P, made], [i, t, R]


def _backward_sharding(dy, x, target, weight, statistics, *rest):
    reduction, *_, need_x, need_target = rest
    for i, t, row in nll.shards(x, target, reduction):
        outputs = [i if need_x else R, t if need_target else R]
        yield outputs, [row if reduction == NONE else R, i, t, R, row + 1]


_TARGET = "Tensor target, Tensor? weight"
_OPTIONS = "int reduction, int ignore_index, float smoothing"

forward = primitive(
    f"cross_entropy_forward(Tensor x, {_TARGET}, {_OPTIONS}, int makes) "
    "-> (Tensor loss, Tensor made)",
    formula=_formula_forward,
    aten=_forward,
    triton=launcher("cross_entropy", "forward"),
    fake=_fake_forward,
    traced="kernel",
    sharding=_sharding,
)
backward = primitive(
    f"cross_entropy_backward(Tensor dy, Tensor x, {_TARGET}, Tensor statistics, {_OPTIONS}, "
    "bool need_x, bool need_target) -> (Tensor dx, Tensor dtarget)",
    formula=_formula_backward,
    aten=_backward,
    triton=launcher("cross_entropy", "backward"),
    fake=lambda dy, x, target, *rest: (empty_if(rest[-2], x), empty_if(rest[-1], target)),
    traced="kernel",
    sharding=_backward_sharding,
)

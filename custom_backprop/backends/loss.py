"""Primitives of the pointwise losses: ``<name>_forward`` and ``<name>_backward``, the methods of a
``Loss``.

On a CPU they walk through the tensors in chunks that stay in cache. The formula is a dozen passes,
but only over a chunk: memory is read once and written once, which no chain of operators over whole
tensors does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..formulas.loss import LOG_0, LOSSES, NONE, SUM, Loss, divisor_of, weighted
from ..formulas.precision import HALF, wide, widen
from . import tasks
from .library import P, Primitive, R, builtin, empty_if, launcher, primitive
from .selection import functorch_active, is_traced
from .tasks import CHUNK, chunk_of

aten = torch.ops.aten
_squares = builtin(aten.mse_loss, "out")

#: elements of a chunk of a loss of few passes, whose calls all threads share
ONE = 2**20


def _l1_loss(x, t, v, k, y, g):
    d = torch.sub(x, t, out=y if g is None else g)
    if y is not None:
        torch.abs(d, out=y)
    if g is not None:
        torch.sign(d, out=g).mul_(k)


def _binary_cross_entropy(x, t, v, k, y, g):
    if y is not None:
        aten.binary_cross_entropy.out(x, t, None, NONE, out=y)
    if g is not None:
        aten.binary_cross_entropy_backward.grad_input(k, x, t, None, NONE, grad_input=g)


def _fused(value, gradient, x, t, v, k, y, g, *parameters):
    if y is not None:
        value(x, t, NONE, *parameters, out=y)
    if g is not None:
        gradient(k, x, t, NONE, *parameters, grad_input=g)


def _binary_cross_entropy_with_logits(x, t, v, k, y, g):
    p = _smaller(x)
    if y is not None:  # (1 - t) x - min(x, 0) bears an infinite x, as max(x, 0) - t x does not
        torch.sub(1, t, out=y).mul_(x).sub_(x.clamp_max(0)).sub_(torch.neg(p).log1p_())
    if g is not None:
        _binary_cross_entropy_with_logits_dx(p, x, t, k, g)


def _smaller(x):
    """p = σ(-|x|), the smaller of σ(x) and σ(-x): all digits of both, and of log(1 + e^-|x|) =
    -log(1 - p), for one exponential, in ATen's quickest pass that has one. Below the smallest
    normal number it may be 0."""
    return torch.abs(x).neg_().sigmoid_()


def _binary_cross_entropy_with_logits_dx(p, x, t, k, g):
    """k ((1 - t) σ(x) - t σ(-x)) into g, which is k (1 - t - p) where x >= 0, else k (0 - t + p).
    Writes over p."""
    torch.ge(x, 0, out=g)
    p.addcmul_(g, p, value=-2)
    g.sub_(t).add_(p).mul_(k)


def _kl_div(x, t, v, k, y, g, log_target):
    p = torch.exp(t, out=g) if log_target else t
    if y is not None:
        log_p = t if log_target else torch.log(t, out=y).clamp_min_(LOG_0)
        torch.sub(log_p, x, out=y).mul_(p)
    if g is not None:
        torch.mul(p, -k, out=g)


def _gaussian_nll_loss(x, t, v, k, y, g, full, eps):
    v = v.clamp_min(eps)
    d = x - t
    q = torch.div(d, v, out=g)
    if y is not None:
        torch.log(v, out=y).addcmul_(d, q).add_(math.log(2 * math.pi) if full else 0).mul_(0.5)
    if g is not None:
        g.mul_(k)


def _poisson_nll_loss(x, t, v, k, y, g, log_input, full, eps):
    e = torch.exp(x, out=y if g is None else g)
    if y is not None:
        torch.addcmul(e, t, x, value=-1, out=y)
    if g is not None:
        g.sub_(t).mul_(k)


#: name -> writes l into y and k l_x into g (None: not wanted) in fewer passes than the formula
FILL: dict[str, Callable[..., None]] = {
    "mse_loss": partial(_fused, aten.mse_loss.out, aten.mse_loss_backward.grad_input),
    "l1_loss": _l1_loss,
    "smooth_l1_loss": partial(
        _fused, aten.smooth_l1_loss.out, aten.smooth_l1_loss_backward.grad_input
    ),
    "huber_loss": partial(_fused, aten.huber_loss.out, aten.huber_loss_backward.out),
    "binary_cross_entropy": _binary_cross_entropy,
    "binary_cross_entropy_with_logits": _binary_cross_entropy_with_logits,
    "kl_div": _kl_div,
    "gaussian_nll_loss": _gaussian_nll_loss,
    "poisson_nll_loss": _poisson_nll_loss,
}


#: the elements of a row of :func:`_mse_loss_total`, and the fewest of a tensor that is worth
#: cutting into rows
ROW, ROWS = 2**7, 2**15


def _mse_loss(x, t, v, k, y, g):
    """Where 2 d may overflow and 2 k d does not."""
    if y is not None:
        _squares(x, t, NONE, out=y)
    if g is not None:
        torch.sub(x, t, out=g).mul_(2 * k)


def _mse_loss_total(x, t, v, k, g):
    """Reads x and t once: Σ l is the squared norm of the gradient 2 k d that was made of them, over
    4 k², row by row.

    The norm of the whole would be the same pass with long sums in few registers, which in float32
    are off by 2e-5 at 2²⁰ elements; rows of 4096 still by 4e-6 if these are all alike; rows of 128
    by 4e-8, as ``sum`` is. Where squares are too large for the dtype, or so small that what is lost
    of them might be seen in the sum, the losses themselves are added.
    """
    n = g.numel()
    if n < ROWS or n % ROW or not g.is_contiguous():
        return _one_by_one(_mse_loss, x, t, v, k, g)
    dy = x.new_full((), k)
    FILL["mse_loss"](x, t, v, dy, None, g)
    norms = torch.linalg.vector_norm(g.view(-1, ROW), dim=1)
    squares, limits = norms.mul_(norms).sum().item(), torch.finfo(g.dtype)
    if not 2 * n * limits.tiny / limits.eps < squares < math.inf:
        return _one_by_one(_mse_loss, x, t, v, k, g)
    return squares / (2 * dy.item()) ** 2  # the k that g was multiplied by


def _one_by_one(fill, x, t, v, k, g, *parameters):
    """l stands for a moment where l_x will, and no other memory is touched."""
    dy = x.new_full((), k)
    fill(x, t, v, dy, g, None, *parameters)
    total = g.sum().item()
    fill(x, t, v, dy, None, g, *parameters)
    return total


def _binary_cross_entropy_with_logits_total(x, t, v, k, g):
    """Σ log(1 + e^-|x|) and Σ (max(x, 0) - t x), neither of which has a negative term, each where
    l_x will stand."""
    p = _smaller(x)
    total = -torch.neg(p, out=g).log1p_().sum().item()
    total += torch.clamp_min(x, 0, out=g).addcmul_(t, x, value=-1).sum().item()
    if math.isnan(total):
        return _one_by_one(FILL["binary_cross_entropy_with_logits"], x, t, v, k, g)
    _binary_cross_entropy_with_logits_dx(p, x, t, k, g)
    return total


#: name -> (writes k l_x into g and returns Σ l, with no memory of the size of g beside it; elements
#: of a chunk)
TOTAL: dict[str, tuple[Callable[..., float], int]] = {
    "mse_loss": (_mse_loss_total, ONE),
    "binary_cross_entropy_with_logits": (_binary_cross_entropy_with_logits_total, CHUNK),
} | {
    name: (partial(_one_by_one, FILL[name]), ONE)
    for name in ("smooth_l1_loss", "huber_loss", "binary_cross_entropy")
}

#: name -> PyTorch's own operator, which is as quick while its temporary fits in cache, where no
#: gradient is made
WHOLE: dict[str, Callable[..., Tensor]] = {
    "mse_loss": aten.mse_loss.default,
    "l1_loss": aten.l1_loss.default,
    "smooth_l1_loss": aten.smooth_l1_loss.default,
    "huber_loss": aten.huber_loss.default,
    "binary_cross_entropy": lambda x, t, reduction: aten.binary_cross_entropy.default(
        x, t, None, reduction
    ),
}


def _filler(loss, x, v, w, parameters):
    """Writes w l into y and k w l_x into g: in fewer passes for the plain loss in full precision,
    else by the formula."""
    if _plain(loss, x, v, w, parameters):
        short = FILL[loss.name]
        return lambda x, t, v, w, *rest: short(x, t, v, *rest)

    value = _checked(loss, loss.value)  # PyTorch's own operator looks by itself

    def fill(x, t, v, w, k, y, g, *parameters):
        x, t, v, w = map(widen, (x, t, v, w))
        if y is not None:
            y.copy_(weighted(value(x, t, v, *parameters), w))
        if g is not None:
            torch.mul(weighted(loss.dx(x, t, v, *parameters), w), k, out=g)

    return fill


def _plain(loss, x, v, w, parameters):
    if w is not None or x.dtype in HALF:
        return False
    if loss.name == "binary_cross_entropy_with_logits":
        return v is None
    return loss.name != "poisson_nll_loss" or parameters[:2] == (True, False)


def _forward(loss, x, t, v, w, reduction, make_dx, *parameters):
    if x.device.type != "cpu":
        return loss.forward(x, t, v, w, reduction, make_dx, *parameters)
    n = x.numel()
    plain = _plain(loss, x, v, w, parameters)
    if not make_dx and n <= ONE and plain and loss.name in WHOLE:
        return WHOLE[loss.name](x, t, reduction, *parameters), None
    dx = torch.empty_like(x) if make_dx else None
    scale = 1 / (divisor_of(x, reduction) or 1)
    if make_dx and reduction != NONE and plain and loss.name in TOTAL:
        total_of, size = TOTAL[loss.name]

        def add(chunk, _):
            xs, ts, vs, gs = chunk
            return total_of(xs, ts, vs, scale, gs, *parameters)

        totals = tasks.each(x.device, add, tasks.cut(max(size, chunk_of(x)), x, t, v, dx))
        return _reduced(x, sum(totals), reduction), dx
    dtype = wide(x.dtype)
    k = x.new_full((), scale, dtype=dtype)
    y = torch.empty_like(x) if reduction == NONE else None
    fill = _filler(loss, x, v, w, parameters)

    def work(chunk, memory):
        xs, ts, vs, ws, ys, gs = chunk
        if ys is None:
            (ys,) = tasks.scratch(memory, xs, dtype=dtype)
        fill(xs, ts, vs, ws, k, ys, gs, *parameters)
        return ys.sum().item() if y is None else None

    totals = tasks.each(x.device, work, tasks.cut(chunk_of(x), x, t, v, w, y, dx))
    return _reduced(x, sum(totals), reduction) if y is None else y, dx


def _reduced(x: Tensor, total: float, reduction: int) -> Tensor:
    divisor = divisor_of(x, reduction)
    if divisor is not None:
        total = total / divisor if divisor else math.nan
    try:
        return x.new_full((), total)
    except RuntimeError:  # beyond the range of the dtype
        return x.new_full((), math.copysign(math.inf, total))


def _backward(loss, dy, x, t, v, w, reduction, needs, *parameters):
    if x.device.type != "cpu":
        return loss.backward(dy, x, t, v, w, reduction, needs, *parameters)
    need_x, need_t, *others = needs
    divisor = divisor_of(x, reduction)
    k = widen(dy) if divisor is None else widen(dy) / divisor
    dx, dt, *_ = grads = _gradients(x, needs)
    negated = need_t and loss.dt is None
    filled: Any = dx if need_x else dt if negated else None
    rest = (False, need_t and not negated, *others)
    outs = [g if r else None for g, r in zip(grads, rest, strict=True)]
    fill = _filler(loss, x, v, w, parameters)

    def work(chunk, _):
        xs, ts, vs, ws, ks, gs, *gs_rest = chunk
        if gs is not None:
            fill(xs, ts, vs, ws, ks, None, gs, *parameters)
        if any(rest):
            made = loss.backward(ks, xs, ts, vs, ws, SUM, rest, *parameters)
            for out, grad in zip(gs_rest, made, strict=True):
                if out is not None:
                    out.copy_(grad)

    tasks.each(x.device, work, tasks.cut(chunk_of(x), x, t, v, w, k, filled, *outs))
    if negated:
        torch.neg(filled, out=dt)
    return grads


def _gradients(x, needs):
    """Memory for dx, dt, dv and dw, where they are needed."""
    return tuple(empty_if(need, x) for need in needs)


def _checked(loss: Loss, run: Callable[..., Any]) -> Callable[..., Any]:
    """A forward that looks at its inputs first, if the loss is one of probabilities: on a CPU it
    raises RuntimeError, as stock's operator does, for a number outside [0, 1]. On a GPU that would
    wait for it."""
    if loss.name != "binary_cross_entropy":
        return run

    def checked(x, t, *rest):
        for name, p in (("input", x), ("target", t)):
            known = p.is_cpu and not (is_traced() or functorch_active())
            if known and not bool(((p >= 0) & (p <= 1)).all()):
                raise RuntimeError(f"all elements of {name} should be between 0 and 1")
        return run(x, t, *rest)

    return checked


def _shards(x, others, reduction):
    """The dimensions of x, and how it and the others lie if it is sharded there: as x, if they are
    as large. None for a mean, which divides by the count of all shards, which no shard knows."""
    if divisor_of(x, reduction) is None:
        for i in range(x.dim()):
            yield i, [i if t is not None and t.shape == x.shape else R for t in (x, *others)]


def _sharding(x, *rest):
    *others, reduction, make_dx = rest[:5]
    for i, inputs in _shards(x, others, reduction):
        yield [i if reduction == NONE else P, i if make_dx else R], inputs


def _backward_sharding(dy, x, *rest):
    *others, reduction, needs = rest[:5]
    for i, inputs in _shards(x, others, reduction):
        grads = zip(inputs, needs, strict=True)
        outputs = [R if not need else P if lies == R else lies for lies, need in grads]
        yield outputs, [i if reduction == NONE else R, *inputs]


def _fake(x, t, v, w, reduction, make_dx, *_):
    return torch.empty_like(x) if reduction == NONE else x.new_empty(()), empty_if(make_dx, x)


def _define(loss: Loss) -> tuple[Primitive, Primitive]:
    tensors = "Tensor x, Tensor t, Tensor? v, Tensor? w, int reduction"
    parameters = "".join(f", {p}" for p in loss.parameters)
    forward = primitive(
        f"{loss.name}_forward({tensors}, bool make_dx{parameters}) -> (Tensor loss, Tensor dx)",
        formula=_checked(loss, loss.forward),
        aten=partial(_forward, loss),
        triton=_checked(loss, launcher("loss", "forward", loss.name)),
        fake=_fake,
        sharding=_sharding,
    )
    backward = primitive(
        f"{loss.name}_backward(Tensor dy, {tensors}, bool[] needs{parameters}) "
        "-> (Tensor dx, Tensor dt, Tensor dv, Tensor dw)",
        formula=loss.backward,
        aten=partial(_backward, loss),
        triton=launcher("loss", "backward", loss.name),
        fake=lambda dy, x, t, v, w, reduction, needs, *parameters: _gradients(x, needs),
        sharding=_backward_sharding,
    )
    return forward, backward


#: name -> (forward, backward)
primitives = {loss.name: _define(loss) for loss in LOSSES.values()}

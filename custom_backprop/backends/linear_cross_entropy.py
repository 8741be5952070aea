"""Primitives of linear_cross_entropy, on x (N, H), a layer's weight (C, H) or (C, D, H), and a
target.

All rows' logits are the one tensor that is too large, so memory sees those of a chunk of rows. The
matrix products are the vendor's. What happens on a chunk between them is cross_entropy's own
primitive, which also gives the gradient of the logits for a gradient of 1 of each row's loss.
"""

from __future__ import annotations

from functools import partial
from math import prod

import torch

from ..formulas import linear_cross_entropy as formula
from ..formulas.cross_entropy import GRADIENT, NOTHING
from ..formulas.loss import NONE
from ..formulas.nll import along_classes, reduced
from ..formulas.precision import HALF, wide, widen
from . import cross_entropy
from .library import empty_if, primitive, slices


def rows_of_chunk(rows: int, itemsize: int, device: torch.device) -> int:
    """How many rows to take at once, of ``rows``.

    A chunk of n rows reads the weight W for the logits and again for dx, and reads and writes dW.
    These are the bytes that a whole product would move once. With W of C·H numbers, in bfloat16 and
    with dW in float32, a chunk moves 12 C·H bytes for 6 n C·H operations. An H100 does 266
    operations while memory moves a byte (798 TFLOP/s, 3.0 TB/s), so below n = 12 / 6 · 266 = 530
    rows the products wait for memory. Eight times that hides all but an eighth of the traffic: 4096
    rows of half precision, 2048 of float32. Neither C nor H counts.

    A CPU of a few cores does some 10 operations a byte, so that far fewer rows do: measured at
    C = 32000 and H = 512, from 128 rows on the time is that of one product.
    """
    most = 128 if device.type == "cpu" else max(8192 // itemsize, 1)
    chunks = -(-rows // most)
    return max(-(-rows // max(chunks, 1)), 1)


class _Gradients:
    """dx, dW and db, in which each chunk leaves its share.

    A row's factor k multiplies x and dx, not the much wider gradient of its logits. dW and db are
    summed in float32, also from products of half precision: there k is taken relative to the
    largest, whose multiplication follows at the end, so that rounding it costs nothing.
    """

    def __init__(self, x, product, weight, k, makes):
        of_x, of_weight, of_bias = makes
        dtype = wide(x.dtype)
        self.k, self.scale = k, None
        if weight.dtype in HALF and any(makes):
            self.scale = torch.where(k == 0, 1, k).abs().amax()
        self.x, self.product, self.weight = x, product, weight
        self.dx = x.new_empty(x.shape) if of_x else None
        self.dw = weight.new_zeros(weight.shape, dtype=dtype) if of_weight else None
        self.db = weight.new_zeros((len(weight), 1), dtype=dtype) if of_bias else None

    def add(self, rows, d):
        """``d`` is the gradient of a chunk's logits for k = 1."""
        k = self.k[rows]
        if k.dim() > 1:
            d, k = d.mul_(k.unsqueeze(1)).flatten(1), k.new_ones(len(k))
        k = k.unsqueeze(1)
        if self.dx is not None:
            self.dx[rows] = _product(d, self.weight).mul_(k)
        relative = k if self.scale is None else k / self.scale
        if self.dw is not None:
            _add_product(self.dw, d.t(), (self.x[rows].to(self.product) * relative).to(d.dtype))
        if self.db is not None:
            _add_product(self.db, d.t(), relative.to(d.dtype))

    def made(self, weight, bias):
        """Each in the dtype and shape of its tensor."""
        for t in (self.dw, self.db):
            if t is not None and self.scale is not None:
                t.mul_(self.scale)
        dw = None if self.dw is None else self.dw.view(weight.shape).to(weight.dtype)
        return self.dx, dw, None if self.db is None else self.db.view(bias.shape).to(bias.dtype)


def _product(a, b):
    """a b in float32 or wider."""
    if a.dtype in HALF:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b)


def _add_product(total, a, b):
    """total += a b, which may be of half precision."""
    if a.dtype == total.dtype:
        return total.addmm_(a, b)
    return torch.addmm(total, a, b, out_dtype=total.dtype, out=total)


def _logits(x, weight, bias, softcap, widths):
    l = torch.mm(x, weight.t()) if bias is None else torch.addmm(bias, x, weight.t())
    if softcap:
        l.div_(softcap).tanh_().mul_(softcap)
    return l.view(len(x), *widths)


def _walk(run, tensors, options, k, of_z, of_log_p, needs, losses, lse, log_p):
    """Fills what is not None: of each row the cross-entropy, lse and log p_rt. Returns the
    gradients that are needed, where ``k`` multiplies those of a row's loss. If the other two differ
    from it, the logits' gradient is put together of three."""
    x, linear_weight, target, bias, weight, _ = tensors
    ignore_index, smoothing, softcap, z_loss, chunk, product = options
    need_x, need_weight, need_target, need_bias = needs
    makes = need_x, need_weight, need_bias
    flat = linear_weight.flatten(0, -2).to(product)
    flat_bias = None if bias is None else bias.flatten().to(product)
    if x.is_cpu:  # whose products of half precision are slow, and round
        flat, flat_bias, weight = widen(flat), widen(flat_bias), widen(weight)
    apart = of_z is not k or of_log_p is not None
    gradients = _Gradients(x, product, flat, torch.ones_like(k) if apart else k, makes)
    dtarget = empty_if(need_target, target)
    for rows in slices(len(x), 1, chunk or rows_of_chunk(len(x), x.element_size(), x.device)):
        t = target[rows]
        l = _logits(
            x[rows].to(product).to(flat.dtype), flat, flat_bias, softcap, linear_weight.shape[:-1]
        )
        given = l, t, weight, NONE, ignore_index, smoothing
        row_losses, d = run(*given, GRADIENT if any(makes) else NOTHING)
        if losses is not None:
            losses[rows] = row_losses
        if log_p is not None:
            log_p[rows] = -run(l, t, None, NONE, ignore_index, 0.0, NOTHING)[0]
        if z_loss or need_target:
            e = widen(l)
            sums = e.logsumexp(1)
            if lse is not None:
                lse[rows] = sums
            e = e - sums.unsqueeze(1)
        if dtarget is not None:
            slope = (k[rows] * (smoothing - 1)).unsqueeze(1) * e
            dtarget[rows] = slope if weight is None else slope * along_classes(weight, l)
        if not any(makes):
            continue
        if apart:
            d.mul_(k[rows].unsqueeze(1))
        if z_loss:
            sums = sums * (2 * z_loss) if not apart else sums * (2 * z_loss) * of_z[rows]
            d.add_(e.exp_().mul_(sums.unsqueeze(1)))
        if of_log_p is not None:
            plain = run(l, t, None, NONE, ignore_index, 0.0, GRADIENT)[1]
            d.sub_(plain.mul_(of_log_p[rows].unsqueeze(1)))
        if softcap:
            d.mul_(l.div_(softcap).square_().neg_().add_(1))
        gradients.add(rows, d)
    dx, dw, db = gradients.made(linear_weight, bias)
    return dx, dw, dtarget, db


def _shares(x, linear_weight, target, weight, token_weight, reduction, ignore_index):
    """ω_r, what a mean divides by, and their quotient: 0 for ignored rows, whatever the sum."""
    of_rows, total = formula.weights_of_rows(
        target, weight, token_weight, reduction, ignore_index, len(linear_weight), wide(x.dtype)
    )
    return of_rows, total, torch.where(of_rows == 0, 0, of_rows / total)


def _forward(backend, *args):
    *tensors, reduction, ignore_index, smoothing, softcap, z_loss, chunk, product = args[:-3]
    log_probs, dtype, makes = args[-3:]
    x, linear_weight, target, _, weight, token_weight = tensors
    of_rows, total, share = _shares(
        x, linear_weight, target, weight, token_weight, reduction, ignore_index
    )
    losses = torch.empty_like(share)
    lse = torch.empty_like(share) if z_loss else None
    log_p = torch.empty_like(share) if log_probs else None
    dx, dw, _, db = _walk(
        getattr(cross_entropy.forward, backend), tensors,
        (ignore_index, smoothing, softcap, z_loss, chunk, product), share, share, None,
        (*makes[:2], False, makes[2]), losses, lse, log_p,
    )  # fmt: skip
    z = torch.zeros_like(losses) if lse is None else lse.square_().mul_(z_loss)
    loss, z = (
        reduced(torch.where(of_rows == 0, 0, of_rows * each), total, reduction).to(dtype)
        for each in (losses + z, z)
    )
    return loss, z, None if log_p is None else log_p.to(dtype), dx, dw, db


def _backward(backend, *args):
    (
        *tensors,
        dy,
        dz,
        dlog_p,
        reduction,
        ignore_index,
        smoothing,
        softcap,
        z_loss,
        chunk,
        product,
    ) = args[:-1]
    x, linear_weight, target, _, weight, token_weight = tensors
    *_, share = _shares(x, linear_weight, target, weight, token_weight, reduction, ignore_index)
    k = _times(share, dy)
    of_log_p = None if dlog_p is None else _times((target != ignore_index).to(k.dtype), dlog_p)
    return _walk(
        getattr(cross_entropy.forward, backend), tensors,
        (ignore_index, smoothing, softcap, z_loss, chunk, product), k,
        k if dz is None else k + _times(share, dz), of_log_p, args[-1], None, None, None,
    )  # fmt: skip


def _times(share, g):
    """The gradient of each row's part. 0 where it has none, even if g is NaN."""
    return torch.zeros_like(share) if g is None else torch.where(share == 0, 0, share * g)


def _made(x, linear_weight, bias, need_x, need_weight, need_bias):
    needed = (x, need_x), (linear_weight, need_weight), (bias, need_bias)
    return tuple(t.new_empty(t.shape) if need else None for t, need in needed)


def _fake_forward(x, linear_weight, target, bias, weight, token_weight, reduction, *rest):
    *_, log_probs, dtype, makes = rest
    rows = (len(x), *linear_weight.shape[1:-1])
    loss, z = (x.new_empty(rows if reduction == NONE else (), dtype=dtype) for _ in range(2))
    log_p = x.new_empty(rows, dtype=dtype) if log_probs else None
    return loss, z, log_p, *_made(x, linear_weight, bias, *makes)


def _fake_backward(x, linear_weight, target, bias, *rest):
    need_x, need_weight, need_target, need_bias = rest[-1]
    dx, dw, db = _made(x, linear_weight, bias, need_x, need_weight, need_bias)
    return dx, dw, torch.empty_like(target) if need_target else None, db


def _contiguous(run):
    """The formula, whose results have the strides that the others give them."""
    return lambda *args: tuple(t.contiguous() for t in run(*args))


def _flops(x, linear_weight, *rest):
    """The logits, and once more for each of dx and dW."""
    return 2 * prod(x) * prod(linear_weight[:-1]) * (1 + sum(rest[-1][:2]))


_TENSORS = (
    "Tensor x, Tensor linear_weight, Tensor target, Tensor? bias, Tensor? weight, "
    "Tensor? token_weight"
)
_OPTIONS = (
    "int reduction, int ignore_index, float smoothing, float softcap, float z_loss, int chunk, "
    "ScalarType product"
)

forward = primitive(
    f"linear_cross_entropy_forward({_TENSORS}, {_OPTIONS}, bool log_probs, ScalarType dtype, "
    "bool[3] makes) -> (Tensor loss, Tensor z, Tensor log_p, Tensor dx, Tensor dlinear_weight, "
    "Tensor dbias)",
    formula=_contiguous(formula.forward),
    aten=partial(_forward, "aten"),
    triton=partial(_forward, "triton"),
    fake=_fake_forward,
    traced="kernel",
    flops=_flops,
)
backward = primitive(
    f"linear_cross_entropy_backward({_TENSORS}, Tensor? dy, Tensor? dz, Tensor? dlog_p, "
    f"{_OPTIONS}, bool[4] needs) -> (Tensor dx, Tensor dlinear_weight, Tensor dtarget, "
    "Tensor dbias)",
    formula=_contiguous(formula.backward),
    aten=partial(_backward, "aten"),
    triton=partial(_backward, "triton"),
    fake=_fake_backward,
    traced="kernel",
    flops=_flops,
)

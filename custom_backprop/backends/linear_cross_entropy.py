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
from torch.nn.functional import linear

from ..formulas import linear_cross_entropy as formula
from ..formulas.cross_entropy import GRADIENT, NOTHING, of_certain
from ..formulas.loss import MEAN, NONE
from ..formulas.nll import along_classes, reduced
from ..formulas.precision import HALF, wide, widen
from . import cross_entropy
from .library import P, R, empty_if, launcher, primitive, slices


def rows_of_chunk(
    rows: int, width: int, itemsize: int, device: torch.device, of_weight: bool
) -> int:
    """How many of ``rows`` to take at once, with ``width`` logits each, of ``itemsize`` bytes;
    ``of_weight``: dW is wanted.

    A chunk of n rows reads the layer's weight for the logits and again for dx, and reads and writes
    dW: of H·width numbers, in bfloat16 and dW in float32, 12 H·width bytes for 6 n H·width
    operations. An H100 does 266 operations in the time of a byte (798 TFLOP/s, 3.0 TB/s), so below
    n = 12 · 266 / 6 = 530 rows the products wait for memory. With eight times as many, an eighth
    of their time is left: 4096 rows of half precision, 2048 of float32. Without dW it is 4 bytes
    for 4 n operations, and half as many rows do.

    What memory sees at its peak, in GB, of 8192 rows in bfloat16 with H = 4096 and a width of
    128256, where stock sees 6.30 (log p and two gradients of all logits):

        2.10   dW in float32, the sum over the chunks
        1.05   dW in bfloat16, the result; before it is made, as much of the logits of 4096 rows
        0.07   dx
        3.22   and 0.10 more while a chunk's dx is rounded: 53 %; of 32768 rows 14 %

    So with dW a shorter chunk saves nothing, and the result alone is 17 %. Without it 2048 rows of
    logits, 0.53, and dx are left: 10 %; of 16384 rows 5.5 %.

    A core of a CPU does some 20 operations in the time of a byte. Measured there at H = 512 and a
    width of 32000, against one product of 1024 rows: 512 rows take as long, 256 rows 2 % longer,
    128 rows 8 %.

    Where rows are short, as many fit in the memory that those numbers take at a width of 32000.
    Then the cost of the calls does not show.
    """
    on_gpu = (8192 if of_weight else 4096) // itemsize
    least, numbers = (256, 2**23) if device.type == "cpu" else (on_gpu, 2**27)
    chunks = max(-(-rows // max(least, numbers // max(width, 1))), 1)
    return max(-(-rows // chunks), 1)


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
        new = weight.new_empty if len(x) else weight.new_zeros
        self.dw = new(weight.shape, dtype=dtype) if of_weight else None
        self.db = new((len(weight), 1), dtype=dtype) if of_bias else None

    def add(self, rows, d):
        """``d`` is the gradient of a chunk's logits for k = 1."""
        k = self.k[rows]
        if k.dim() > 1:
            d, k = d.mul_(k.unsqueeze(1)).flatten(1), k.new_ones(len(k))
        k = k.unsqueeze(1)
        if self.dx is not None:
            _set_product(self.dx[rows], d, self.weight, k)
        relative, first = k if self.scale is None else k / self.scale, rows.start == 0
        if self.dw is not None:
            x = self.x[rows].to(self.product) * relative
            _add_product(self.dw, d.t(), x.to(d.dtype), first)
        if self.db is not None:
            _add_product(self.db, d.t(), relative.to(d.dtype), first)

    def made(self, weight, bias):
        """Each in the dtype and shape of its tensor."""
        for t in (self.dw, self.db):
            if t is not None and self.scale is not None:
                t.mul_(self.scale)
        dw = None if self.dw is None else self.dw.view(weight.shape).to(weight.dtype)
        return self.dx, dw, None if self.db is None else self.db.view(bias.shape).to(bias.dtype)


def _set_product(out, a, b, k):
    """out = k (a b), rounded once."""
    if out.dtype == a.dtype and a.dtype not in HALF:
        torch.mm(a, b, out=out).mul_(k)
    else:
        found = torch.mm(a, b, torch.float32) if a.dtype in HALF else torch.mm(a, b)
        out.copy_(found.mul_(k))


def _add_product(total, a, b, first):
    """total += a b, which may be of half precision. The first one is not added to what is there."""
    of_total = {"beta": 0 if first else 1, "out": total}
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, **of_total)
    else:
        torch.addmm(total, a, b, total.dtype, **of_total)


class _Aten:
    """What happens on a chunk of logits between the products, by PyTorch's operators, in float32
    or wider."""

    widen = staticmethod(widen)

    @staticmethod
    def softcap_(z, softcap):
        z.div_(softcap).tanh_().mul_(softcap)

    @staticmethod
    def losses(logits, target, weight, ignore_index, smoothing, loss, makes, spare):
        """Each row's cross-entropy in ``loss``; and its gradient, over ``logits`` if they are
        ``spare``."""
        args = logits, target, weight, NONE, ignore_index, smoothing, makes
        over = logits if spare and makes == GRADIENT else None
        found, d = cross_entropy.forward.aten(*args, over)
        if loss is not None:
            loss.copy_(found)
        return d

    @staticmethod
    def finish(logits, d, lse, k, z_loss, softcap):
        """lse of each row; and the slope (d + 2 ζ k lse p) s' over d."""
        if z_loss:
            torch.logsumexp(logits, 1, out=lse)
            if d is not None:
                of_p = lse * (2 * z_loss) if k is None else lse * (2 * z_loss) * k
                d.addcmul_((logits - lse.unsqueeze(1)).exp_(), of_p.unsqueeze(1))
        if softcap and d is not None:
            d.mul_(logits.div_(softcap).square_().neg_().add_(1))


class _Triton:
    """The same by kernels."""

    widen = staticmethod(lambda t: widen(t) if t is not None and t.is_cpu else t)
    softcap_ = launcher("linear_cross_entropy", "softcap_")
    losses = launcher("linear_cross_entropy", "losses")
    finish = launcher("linear_cross_entropy", "finish")


def _walk(by, tensors, options, k, of_z, of_log_p, needs, losses, lse, log_p):
    """Fills what is not None: of each row the cross-entropy, lse and log p_rt. Returns the
    gradients that are needed, where ``k`` multiplies those of a row's loss. If the other two differ
    from it, the logits' gradient is put together of three."""
    x, linear_weight, target, bias, weight, _ = tensors
    ignore_index, smoothing, softcap, z_loss, chunk, product = options
    need_x, need_weight, need_target, need_bias = needs
    makes = need_x, need_weight, need_bias
    flat = by.widen(linear_weight.flatten(0, -2).to(product))
    flat_bias = None if bias is None else by.widen(bias.flatten().to(product))
    weight = by.widen(weight)
    apart = of_z is not k or of_log_p is not None
    gradients = _Gradients(x, product, flat, torch.ones_like(k) if apart else k, makes)
    dtarget = empty_if(need_target, target)
    wanted = GRADIENT if any(makes) else NOTHING
    spare = not (softcap or z_loss or need_target or of_log_p is not None)
    of_chunk = len(flat), flat.element_size(), x.device, need_weight
    chunk = chunk or rows_of_chunk(len(x), *of_chunk)
    for rows in slices(len(x), 1, chunk):
        t = target[rows]
        part = by.widen(x[rows].to(product))
        z = linear(part, flat, flat_bias)
        if softcap:
            by.softcap_(z, softcap)
        l = z.view(len(part), *linear_weight.shape[:-1])
        plain = l, t, None, ignore_index, 0.0
        if log_p is not None:
            by.losses(*plain, log_p[rows], NOTHING, False)
        out = None if losses is None else losses[rows]
        d = by.losses(l, t, weight, ignore_index, smoothing, out, wanted, spare)
        if dtarget is not None:
            slope = of_certain(widen(l))[0]
            slope.mul_((k[rows] * (smoothing - 1)).unsqueeze(1))
            dtarget[rows] = slope if weight is None else slope.mul_(along_classes(weight, l))
        if any(makes) and apart:
            d.mul_(k[rows].unsqueeze(1))
        if any(makes) and of_log_p is not None:
            d.addcmul_(by.losses(*plain, None, GRADIENT, False), -of_log_p[rows].unsqueeze(1))
        if z_loss or (softcap and any(makes)):
            sums = k.new_empty(t.shape[:1] + l.shape[2:]) if lse is None else lse[rows]
            of_p = of_z[rows] if apart else None
            by.finish(l, d if any(makes) else None, sums, of_p, z_loss, softcap)
        if any(makes):
            gradients.add(rows, d)
        del z, l, d, plain  # the next chunk takes their memory
    if log_p is not None:
        log_p.neg_()
    dx, dw, db = gradients.made(linear_weight, bias)
    return dx, dw, dtarget, db


def _shares(tensors, reduction, ignore_index):
    """ω_r, what a mean divides by, and their quotient: 0 for ignored rows, whatever the sum."""
    x, linear_weight, target, _, weight, token_weight = tensors
    of_rows, total = formula.weights_of_rows(
        target, weight, token_weight, reduction, ignore_index, len(linear_weight), wide(x.dtype)
    )
    return of_rows, total, torch.where(of_rows == 0, 0, of_rows / total)


def _forward(by, *args):
    tensors, reduction, options, (log_probs, dtype, makes) = (
        args[:6],
        args[6],
        args[7:-3],
        args[-3:],
    )
    of_rows, total, share = _shares(tensors, reduction, options[0])
    z_loss = options[3]
    losses = share.new_empty(share.shape)
    lse = share.new_empty(share.shape) if z_loss else None
    log_p = share.new_empty(share.shape) if log_probs else None
    needs = *makes[:2], False, makes[2]
    dx, dw, _, db = _walk(by, tensors, options, share, share, None, needs, losses, lse, log_p)
    if lse is not None:
        losses += lse.square_().mul_(z_loss)
    loss = reduced(_times(of_rows, losses), total, reduction).to(dtype)
    z = torch.zeros_like(loss)
    if lse is not None:
        z = reduced(_times(of_rows, lse), total, reduction).to(dtype)
    return loss, z, None if log_p is None else log_p.to(dtype), dx, dw, db


def _backward(by, *args):
    tensors, (dy, dz, dlog_p), reduction, options = args[:6], args[6:9], args[9], args[10:-1]
    *_, share = _shares(tensors, reduction, options[0])
    k = _times(share, dy)
    of_z = k if dz is None else k + _times(share, dz)
    if dlog_p is not None:
        dlog_p = _times((tensors[2] != options[0]).to(k.dtype), dlog_p)
    return _walk(by, tensors, options, k, of_z, dlog_p, args[-1], None, None, None)


def _times(share, g):
    """``share`` of each row's g. 0 where a row has none, even if g is infinite or NaN."""
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


def _formula_forward(*args):
    loss, z, log_p, *made = formula.forward(*args)
    return loss, z, log_p if args[-3] else None, *_needed(made, args[-1])


def _needed(grads, needs):
    return tuple(g.contiguous() if need else None for g, need in zip(grads, needs, strict=True))


def _sharding(*args):
    """By rows. A mean divides by a weight that no shard knows."""
    if (reduction := args[6]) != MEAN:
        row = 0 if reduction == NONE else P
        dx, dw, db = (at if made else R for at, made in zip((0, P, P), args[-1], strict=True))
        yield [row, row, 0 if args[-3] else R, dx, dw, db], [0, R, 0, R, R, 0]


def _backward_sharding(*args):
    if (reduction := args[9]) != MEAN:
        dy = 0 if reduction == NONE else R
        grads = [at if need else R for at, need in zip((0, P, 0, P), args[-1], strict=True)]
        yield grads, [0, R, 0, R, R, 0, dy, dy, 0]


def _flops(x, linear_weight, *rest):
    """The logits, once more for each of dx and dW, and db, a product with a vector."""
    need_x, need_weight, *_, need_bias = rest[-1]
    return 2 * x[0] * prod(linear_weight[:-1]) * (x[1] * (1 + need_x + need_weight) + need_bias)


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
    formula=_formula_forward,
    aten=partial(_forward, _Aten),
    triton=partial(_forward, _Triton),
    fake=_fake_forward,
    traced="operator",  # a compiler would make all logits
    sharding=_sharding,
    flops=_flops,
)
backward = primitive(
    f"linear_cross_entropy_backward({_TENSORS}, Tensor? dy, Tensor? dz, Tensor? dlog_p, "
    f"{_OPTIONS}, bool[4] needs) -> (Tensor dx, Tensor dlinear_weight, Tensor dtarget, "
    "Tensor dbias)",
    formula=lambda *args: _needed(formula.backward(*args), args[-1]),
    aten=partial(_backward, _Aten),
    triton=partial(_backward, _Triton),
    fake=_fake_backward,
    traced="operator",
    sharding=_backward_sharding,
    flops=_flops,
)

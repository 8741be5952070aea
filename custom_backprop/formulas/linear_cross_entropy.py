"""Cross-entropy of a linear layer's logits. x is (N, H), the layer's weight W (C, H) and its bias b
(C); or W is (C, D, H) and b (C, D), for D predictions from each x_n. A row r is one prediction.

The logits are l = s(z), z = x Wᵀ + b, where s is the identity or a soft cap, s(z) = c tanh(z/c)
(Gemma 2, arXiv 2408.00118). With lse_r = log Σ_c e^(l_rc) and the target q of
:mod:`custom_backprop.formulas.cross_entropy`, the loss of a row is

    L_r = ω_r (Σ_c q_rc (lse_r - l_rc) + ζ lse_r²).

ω_r weighs a row (1 by default). ζ lse², the z-loss (PaLM, arXiv 2204.02311), draws the
normaliser to 1. It is 0 where the target is ``ignore_index``, and is not weighted by class.

Both terms depend on l through differences to lse, and dlse_r/dl_rc = p_rc, so with dy_r = dL/dL_r

    dl_rc = dy_r ω_r (p_rc Q_r - q_rc + 2 ζ lse_r p_rc),  Q_r = Σ_c q_rc
    dz = dl s'(z),  s'(z) = 1 - tanh²(z/c) = 1 - (l/c)²
    dx = dz W,  dW = dzᵀ x,  db = Σ_rows dz.

The last line is that of :mod:`custom_backprop.formulas.linear`. All are sums of one row's part
each, and only (N, C) tensors are large. So rows may be taken chunk by chunk: a chunk's l becomes
its dz, and leaves its share in dx, dW and db.

Reductions: "sum" is Σ_r L_r, and "mean" is (Σ_r L_r) / (Σ_r ω_r w_t) for the classes t, with w the
weights of classes; for probabilities (Σ_r L_r) / (Σ_r ω_r).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import cross_entropy
from .cross_entropy import NOTHING
from .linear import linear, linear_backward, linear_jvp, rows
from .loss import MEAN, NONE
from .nll import classes_and_weights, reduced
from .precision import widen


def softcapped(z: Tensor, softcap: float) -> Tensor:
    """s(z). A ``softcap`` of 0 stands for none."""
    return softcap * torch.tanh(z / softcap) if softcap else z


def softcap_slope(logits: Tensor, softcap: float) -> Tensor:
    """s'(z), from l = s(z)."""
    return 1 - (logits / softcap).square()


def operands(product: torch.dtype, *tensors: Tensor | None) -> tuple[Any, ...]:
    """The operands of the product, rounded to ``product`` as autocast does, in float32 or wider."""
    return tuple(None if t is None else widen(t.to(product)) for t in tensors)


def logits_of(x: Tensor, linear_weight: Tensor, bias: Tensor | None, softcap: float) -> Tensor:
    """l, (N, C) or (N, C, D)."""
    z = linear(x, rows(linear_weight), None if bias is None else bias.reshape(-1))
    return softcapped(z.reshape(len(x), *linear_weight.shape[:-1]), softcap)


def weights_of_rows(
    target: Tensor,
    weight: Tensor | None,
    token_weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    classes: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """ω_r, 0 where the row is ignored, and what a mean divides by."""
    if target.is_floating_point():
        w = counted = torch.ones_like(target.select(1, 0), dtype=dtype)
    else:
        w = counted = (target != ignore_index).to(dtype)
        if weight is not None:
            w = classes_and_weights(target, weight, ignore_index, classes, dtype)[1]
    if token_weight is not None:
        given = token_weight.to(dtype)
        w, counted = (torch.where(counted == 0, 0, each * given) for each in (w, counted))
    return counted, w.sum() if reduction == MEAN else w.new_ones(())


def forward(
    x: Tensor, linear_weight: Tensor, target: Tensor, bias: Tensor | None, weight: Tensor | None,
    token_weight: Tensor | None, reduction: int, ignore_index: int, smoothing: float,
    softcap: float, z_loss: float, chunk: int, product: torch.dtype, log_probs: bool,
    dtype: torch.dtype, makes: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    """The loss in ``dtype``; the z-loss in it; log p_rt of each row, if ``log_probs``; and of x,
    the layer's weight and bias the gradients that it ``makes`` for a dy of 1."""
    wide, wide_weight, wide_bias = operands(product, x, linear_weight, bias)
    logits = logits_of(wide, wide_weight, wide_bias, softcap)
    of_rows, total = weights_of_rows(
        target, weight, token_weight, reduction, ignore_index, logits.shape[1], logits.dtype
    )
    losses = cross_entropy.forward(
        logits, target, weight, NONE, ignore_index, smoothing, NOTHING
    )[0]  # fmt: skip
    z = z_loss * logits.logsumexp(1).square() if z_loss else torch.zeros_like(losses)
    loss, z = (
        reduced(torch.where(of_rows == 0, 0, of_rows * each), total, reduction).to(dtype)
        for each in (losses + z, z)
    )
    log_p = x.new_empty(0, dtype=dtype)
    if log_probs:
        plain = cross_entropy.forward(logits, target, None, NONE, ignore_index, 0.0, NOTHING)[0]
        log_p = -plain.to(dtype)
    tensors = x, linear_weight, target, bias, weight, token_weight, torch.ones_like(loss)
    options = reduction, ignore_index, smoothing, softcap, z_loss, chunk, product
    args: Any = (*tensors, None, None, *options, [*makes[:2], False, makes[2]])
    dx, dw, _, db = backward(*args)
    return loss, z, log_p, dx, dw, db


def backward(
    x: Tensor, linear_weight: Tensor, target: Tensor, bias: Tensor | None, weight: Tensor | None,
    token_weight: Tensor | None, dy: Tensor | None, dz: Tensor | None, dlog_p: Tensor | None,
    reduction: int, ignore_index: int, smoothing: float, softcap: float, z_loss: float,
    chunk: int, product: torch.dtype, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, dW, the gradient of class probabilities and db, from the gradients of what forward
    returns; an empty tensor for each that is not needed."""
    nothing = x.new_empty(0)
    if not any(needs):
        return nothing, nothing, nothing, nothing
    need_x, need_weight, need_target, need_bias = needs
    wide, wide_weight, wide_bias = operands(product, x, linear_weight, bias)
    logits = logits_of(wide, wide_weight, wide_bias, softcap)
    of_rows, total = weights_of_rows(
        target, weight, token_weight, reduction, ignore_index, logits.shape[1], logits.dtype
    )
    share = torch.where(of_rows == 0, 0, of_rows / total)
    d, dtarget = torch.zeros_like(logits), nothing
    if dy is not None:
        k = torch.where(share == 0, 0, dy * share)
        d, dtarget = cross_entropy.backward(
            k, logits, target, weight, k, NONE, ignore_index, smoothing, True, need_target
        )
    if z_loss:
        of_z = sum(g for g in (dy, dz) if g is not None) * share * (2 * z_loss)
        lse = logits.logsumexp(1)
        d = d + (of_z * lse).unsqueeze(1) * torch.softmax(logits, 1)
    if dlog_p is not None:
        k = -dlog_p.to(wide.dtype)
        d = d + cross_entropy.backward(
            k, logits, target, None, k, NONE, ignore_index, 0.0, True, False
        )[0]  # fmt: skip
    d = d * softcap_slope(logits, softcap) if softcap else d
    d = d.reshape(len(x), linear_weight.shape[:-1].numel())
    dx, dw, db = linear_backward(d, wide, rows(wide_weight), need_x, need_weight, need_bias)
    return (
        dx.to(x.dtype),
        dw.reshape(linear_weight.shape).to(linear_weight.dtype) if need_weight else nothing,
        dtarget,
        db.reshape(bias.shape).to(bias.dtype) if bias is not None and need_bias else nothing,
    )


def jvp(
    tangents: Sequence[Tensor | None], tensors: Sequence[Any], log_probs: bool, reduction: int,
    ignore_index: int, smoothing: float, softcap: float, z_loss: float, chunk: int,
    product: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """The tangents of the loss, of the z-loss in it and of log p_rt, from those of x, W, the class
    probabilities and b."""
    tx, tw, ttarget, tb = tangents
    tx, tw, tb = operands(product, tx, tw, tb)
    x, linear_weight, target, bias, weight, token_weight = tensors
    x, linear_weight, bias = operands(product, x, linear_weight, bias)
    tw = None if tw is None else rows(tw)
    tl = linear_jvp(x, rows(linear_weight), tx, tw, None if tb is None else tb.reshape(-1))
    logits = logits_of(x, linear_weight, bias, softcap)
    tl = torch.zeros_like(logits) if tl is None else tl.reshape(logits.shape)
    tl = tl * softcap_slope(logits, softcap) if softcap else tl
    of_rows, total = weights_of_rows(
        target, weight, token_weight, reduction, ignore_index, logits.shape[1], logits.dtype
    )
    options = NONE, ignore_index
    of_loss = cross_entropy.jvp(logits, target, weight, *options, smoothing, tl, ttarget)
    of_z = (torch.softmax(logits, 1) * tl).sum(1) * (2 * z_loss) * logits.logsumexp(1)
    of_loss, of_z = (
        reduced(torch.where(of_rows == 0, 0, of_rows * each), total, reduction)
        for each in (of_loss + of_z, of_z)
    )
    if not log_probs:
        return of_loss, of_z, None
    return of_loss, of_z, -cross_entropy.jvp(logits, target, None, *options, 0.0, tl, None)

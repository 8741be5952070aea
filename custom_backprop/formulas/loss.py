"""Pointwise losses: L = l(x, t) for each element, then their mean, their sum, or no reduction.

With L = c Σ_i w_i l(x_i, t_i), where c is 1/n for a mean and 1 for a sum, L depends on each element
only through its own term:

    dL/dx_i = c w_i l_x(x_i, t_i)      dL/dt_i = c w_i l_t(x_i, t_i)      dL/dw_i = c l(x_i, t_i)

and backward multiplies by the gradient of L (without a reduction: that of the element). So a loss
is given by l and its partial derivatives. If l depends only on the difference d = x - t, l_t =
-l_x. At a kink the derivative is torch's. v is the third tensor of a loss, if it has one.

Throughout σ(x) = 1 / (1 + e^-x), softplus(x) = log(1 + e^x), and [c] is 1 where c is true, else 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .elementary import sigmoid, softplus
from .precision import widen

#: torch's own values of ``reduction``, and the sum over the first dimension's length
NONE, MEAN, SUM, BATCHMEAN = 0, 1, 2, 3

#: replaces log 0 in t log t, which is 0 at t = 0: finite, and below the logarithm of every positive
#: number
LOG_0 = -1000.0

Partial = Callable[..., Tensor]


@dataclass(frozen=True)
class Loss:
    """One loss. Its functions take (x, t, v, *parameters), with tensors of the same shape.

    Attributes:
        formula: l and its derivatives in one line, as ``check`` prints it.
        value: l.
        dx, dt, dv: its partial derivatives. If dt is None, it is -dx. If dv is None, l has no third
            tensor, or torch does not differentiate with respect to it.
        parameters: those of l, as declared in a schema.
        scaled_dx: k l_x as a function of (k, x, t, v), if l_x alone may overflow.
    """

    name: str
    formula: str
    value: Partial
    dx: Partial
    dt: Partial | None = None
    dv: Partial | None = None
    parameters: tuple[str, ...] = ()
    scaled_dx: Partial | None = None

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        v: Tensor | None,
        w: Tensor | None,
        reduction: int,
        make_dx: bool,
        *parameters: Any,
    ) -> tuple[Tensor, Tensor]:
        """The loss, and with ``make_dx`` also dL/dx for a gradient of 1 (else an empty tensor)."""
        loss = weighted(self.value(*map(widen, (x, t, v)), *parameters), widen(w))
        dx = (
            self.backward(
                x.new_ones(()), x, t, v, w, reduction, (True, False, False, False), *parameters
            )[0]
            if make_dx
            else x.new_empty(0)
        )
        return reduced(loss, reduction).to(x.dtype), dx

    def backward(
        self,
        dy: Tensor,
        x: Tensor,
        t: Tensor,
        v: Tensor | None,
        w: Tensor | None,
        reduction: int,
        needs: Any,
        *parameters: Any,
    ) -> tuple[Tensor, ...]:
        """dx, dt, dv and dw; an empty tensor for each that is not in ``needs``."""
        divisor = divisor_of(x, reduction)
        scale = widen(dy) if divisor is None else widen(dy) / divisor
        args = (*map(widen, (x, t, v)), *parameters)
        k = weighted(scale, widen(w))

        need_x, need_t, need_v, need_w = needs
        dx = dt = dv = dw = None
        if need_x or (need_t and self.dt is None):
            dx = self.scaled_dx(k, *args) if self.scaled_dx else k * self.dx(*args)
        if need_t:
            dt = k * self.dt(*args) if self.dt else -dx  # type: ignore[operator]
        if need_v and self.dv:
            dv = k * self.dv(*args)
        if need_w:
            dw = scale * self.value(*args)
        found = (dx if need_x else None, dt, dv, dw)
        return tuple(x.new_empty(0) if g is None else g.to(x.dtype) for g in found)

    def jvp(
        self,
        tangents: tuple[Tensor | None, ...],
        x: Tensor,
        t: Tensor,
        v: Tensor | None,
        w: Tensor | None,
        reduction: int,
        *parameters: Any,
    ) -> Tensor:
        """The change of the loss along ``tangents`` of (x, t, v, w): Σ w (l_x ẋ + l_t ṫ + l_v v̇) +
        l ẇ, reduced."""
        args = (*map(widen, (x, t, v)), *parameters)
        terms = (self.dx, self.dt or self._minus_dx, self.dv, self.value)
        weights = (w, w, w, None)
        parts = [
            weighted(term(*args) * widen(tangent), widen(weight))
            for term, weight, tangent in zip(terms, weights, tangents, strict=True)
            if term and tangent is not None
        ]
        return reduced(sum(parts[1:], parts[0]), reduction).to(x.dtype)

    def _minus_dx(self, *args: Any) -> Tensor:
        return -self.dx(*args)


def weighted(loss: Tensor, w: Tensor | None) -> Tensor:
    """w l, or l without a weight."""
    return loss if w is None else loss * w


def divisor_of(x: Tensor, reduction: int) -> int | None:
    """What the sum of the losses is divided by."""
    return x.numel() if reduction == MEAN else x.shape[0] if reduction == BATCHMEAN else None


def reduced(loss: Tensor, reduction: int) -> Tensor:
    """The elements themselves, their mean or their sum. The mean of no elements is NaN."""
    if reduction in (NONE, MEAN):
        return loss.mean() if reduction == MEAN else loss
    divisor = divisor_of(loss, reduction)
    return loss.sum() if divisor is None else loss.sum() / divisor


def mse_loss(x: Tensor, t: Tensor, v: None) -> Tensor:
    """l = d²."""
    return (x - t).square()


def mse_loss_dx(x: Tensor, t: Tensor, v: None) -> Tensor:
    """l_x = 2 d."""
    return 2 * (x - t)


def mse_loss_scaled_dx(k: Tensor, x: Tensor, t: Tensor, v: None) -> Tensor:
    """k l_x = 2 k d. For the mean k is 1/n, and 2 d may overflow where 2 d/n does not."""
    return 2 * k * (x - t)


def l1_loss(x: Tensor, t: Tensor, v: None) -> Tensor:
    """l = |d|."""
    return (x - t).abs()


def l1_loss_dx(x: Tensor, t: Tensor, v: None) -> Tensor:
    """l_x = sign d."""
    return torch.sign(x - t)


def smooth_l1_loss(x: Tensor, t: Tensor, v: None, beta: float) -> Tensor:
    """l = d² / 2β where |d| < β, else |d| - β/2 (Girshick, 2015)."""
    d = x - t
    return torch.where(d.abs() < beta, 0.5 * d * d / beta, d.abs() - 0.5 * beta)


def smooth_l1_loss_dx(x: Tensor, t: Tensor, v: None, beta: float) -> Tensor:
    """l_x = d/β clipped to [-1, 1]."""
    return ((x - t) / beta).clamp(-1, 1)


def huber_loss(x: Tensor, t: Tensor, v: None, delta: float) -> Tensor:
    """l = d²/2 where |d| <= δ, else δ (|d| - δ/2) (Huber, 1964)."""
    d = x - t
    return torch.where(d.abs() <= delta, 0.5 * d * d, delta * (d.abs() - 0.5 * delta))


def huber_loss_dx(x: Tensor, t: Tensor, v: None, delta: float) -> Tensor:
    """l_x = d clipped to [-δ, δ]."""
    return (x - t).clamp(-delta, delta)


def binary_cross_entropy(x: Tensor, t: Tensor, v: None) -> Tensor:
    """l = -t log x - (1 - t) log(1 - x), with each logarithm at least -100, so that a certain but
    wrong prediction costs 100 and not infinity."""
    return (t - 1) * torch.log1p(-x).clamp_min(-100) - t * torch.log(x).clamp_min(-100)


def binary_cross_entropy_dx(x: Tensor, t: Tensor, v: None) -> Tensor:
    """l_x = (1 - t) / (1 - x) - t/x = (x - t) / (x (1 - x)), with a denominator of at least
    1e-12."""
    return (x - t) / ((1 - x) * x).clamp_min(1e-12)


def binary_cross_entropy_dt(x: Tensor, t: Tensor, v: None) -> Tensor:
    """l_t = log(1 - x) - log x."""
    return torch.log1p(-x) - torch.log(x)


def binary_cross_entropy_with_logits(x: Tensor, t: Tensor, p: Tensor | None) -> Tensor:
    """l = -p t log σ(x) - (1 - t) log(1 - σ(x)) = p t softplus(-x) + (1 - t) softplus(x). No term
    is negative, so nothing cancels where the loss is near 0. Without a weight p for the positives,
    p = 1."""
    return (t if p is None else p * t) * softplus(-x) + (1 - t) * softplus(x)


def binary_cross_entropy_with_logits_dx(x: Tensor, t: Tensor, p: Tensor | None) -> Tensor:
    """l_x = (1 - t) σ(x) - p t σ(-x), since softplus' = σ. The usual form for p = 1 is the same,
    σ(x) - t, but where t = 1 and σ(x) is nearly 1 it has no digits left: in float32 it is 0 from x
    = 17 on."""
    return (1 - t) * sigmoid(x) - (t if p is None else p * t) * sigmoid(-x)


def binary_cross_entropy_with_logits_dt(x: Tensor, t: Tensor, p: Tensor | None) -> Tensor:
    """l_t = -x + (p - 1) softplus(-x)."""
    return -x if p is None else (p - 1) * softplus(-x) - x


def kl_div(x: Tensor, t: Tensor, v: None, log_target: bool) -> Tensor:
    """l = t (log t - x), where x is the logarithm of a probability. With ``log_target`` t is one,
    too, and l = e^t (t - x)."""
    return torch.exp(t) * (t - x) if log_target else t * (torch.log(t).clamp_min(LOG_0) - x)


def kl_div_dx(x: Tensor, t: Tensor, v: None, log_target: bool) -> Tensor:
    """l_x = -t, or -e^t."""
    return -torch.exp(t) if log_target else -t


def kl_div_dt(x: Tensor, t: Tensor, v: None, log_target: bool) -> Tensor:
    """l_t = log t - x + 1, or e^t (t - x + 1). At t = 0 the first is -∞, the derivative of t log t
    (stock gives NaN)."""
    return torch.exp(t) * (t - x + 1) if log_target else torch.log(t) - x + 1


def _variance(v: Tensor, eps: float) -> Tensor:
    """max(v, ε) with the derivative 1 everywhere: the clamp is for stability, and is not
    differentiated."""
    return torch.where(v < eps, v - v.detach() + eps, v)


def gaussian_nll_loss(x: Tensor, t: Tensor, v: Tensor, full: bool, eps: float) -> Tensor:
    """l = (log v + d²/v) / 2, plus log(2π)/2 with ``full``, for t from N(x, v) (Nix and Weigend,
    1994)."""
    v = _variance(v, eps)
    return 0.5 * (torch.log(v) + (x - t).square() / v + (math.log(2 * math.pi) if full else 0))


def gaussian_nll_loss_dx(x: Tensor, t: Tensor, v: Tensor, full: bool, eps: float) -> Tensor:
    """l_x = d/v."""
    return (x - t) / _variance(v, eps)


def gaussian_nll_loss_dv(x: Tensor, t: Tensor, v: Tensor, full: bool, eps: float) -> Tensor:
    """l_v = (1 - d²/v) / 2v."""
    v = _variance(v, eps)
    return 0.5 * (1 - (x - t).square() / v) / v


def poisson_nll_loss(
    x: Tensor, t: Tensor, v: None, log_input: bool, full: bool, eps: float
) -> Tensor:
    """l = e^x - t x, or x - t log(x + ε) if x is the rate itself. ``full`` adds Stirling's log t! ≈
    t log t - t + log(2πt)/2 where t > 1."""
    loss = torch.exp(x) - t * x if log_input else x - t * torch.log(x + eps)
    if full:
        many = torch.where(t > 1, t, 1.0)
        loss = loss + torch.where(
            t <= 1, 0.0, many * torch.log(many) - t + 0.5 * torch.log(2 * math.pi * many)
        )
    return loss


def poisson_nll_loss_dx(
    x: Tensor, t: Tensor, v: None, log_input: bool, full: bool, eps: float
) -> Tensor:
    """l_x = e^x - t, or 1 - t / (x + ε)."""
    return torch.exp(x) - t if log_input else 1 - t / (x + eps)


def poisson_nll_loss_dt(
    x: Tensor, t: Tensor, v: None, log_input: bool, full: bool, eps: float
) -> Tensor:
    """l_t = -x, or -log(x + ε); with ``full`` plus [t > 1] (log t + 1/2t)."""
    dt = -x if log_input else -torch.log(x + eps)
    if full:
        many = torch.where(t > 1, t, 1.0)
        dt = dt + torch.where(t <= 1, 0.0, torch.log(many) + 0.5 / many)
    return dt


LOSSES = {
    loss.name: loss
    for loss in (
        Loss(
            "mse_loss",
            "l = (x - t)²;  dx = 2 dy (x - t), dt = -dx",
            mse_loss,
            mse_loss_dx,
            scaled_dx=mse_loss_scaled_dx,
        ),
        Loss("l1_loss", "l = |x - t|;  dx = dy sign(x - t), dt = -dx", l1_loss, l1_loss_dx),
        Loss(
            "smooth_l1_loss",
            "l = d²/2β or |d| - β/2, d = x - t;  dx = dy min(max(d/β, -1), 1), dt = -dx",
            smooth_l1_loss,
            smooth_l1_loss_dx,
            parameters=("float beta",),
        ),
        Loss(
            "huber_loss",
            "l = d²/2 or δ(|d| - δ/2), d = x - t;  dx = dy min(max(d, -δ), δ), dt = -dx",
            huber_loss,
            huber_loss_dx,
            parameters=("float delta",),
        ),
        Loss(
            "binary_cross_entropy",
            "l = -t log x - (1 - t) log(1 - x);  dx = dy (x - t) / (x (1 - x)), "
            "dt = dy (log(1 - x) - log x)",
            binary_cross_entropy,
            binary_cross_entropy_dx,
            binary_cross_entropy_dt,
        ),
        Loss(
            "binary_cross_entropy_with_logits",
            "l = p t softplus(-x) + (1 - t) softplus(x);  dx = dy ((1 - t) σ(x) - p t σ(-x)), "
            "dt = dy ((p - 1) softplus(-x) - x)",
            binary_cross_entropy_with_logits,
            binary_cross_entropy_with_logits_dx,
            binary_cross_entropy_with_logits_dt,
        ),
        Loss(
            "kl_div",
            "l = t (log t - x);  dx = -dy t, dt = dy (log t - x + 1)",
            kl_div,
            kl_div_dx,
            kl_div_dt,
            parameters=("bool log_target",),
        ),
        Loss(
            "gaussian_nll_loss",
            "l = (log v + d²/v) / 2, d = x - t;  dx = dy d/v, dt = -dx, dv = dy (1 - d²/v) / 2v",
            gaussian_nll_loss,
            gaussian_nll_loss_dx,
            dv=gaussian_nll_loss_dv,
            parameters=("bool full", "float eps"),
        ),
        Loss(
            "poisson_nll_loss",
            "l = e^x - t x;  dx = dy (e^x - t), dt = -dy x",
            poisson_nll_loss,
            poisson_nll_loss_dx,
            poisson_nll_loss_dt,
            parameters=("bool log_input", "bool full", "float eps"),
        ),
    )
}

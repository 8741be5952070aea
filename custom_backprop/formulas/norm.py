"""Layer normalization and RMS normalization of rows x of n numbers.

layer_norm (Ba, Kiros and Hinton, 2016): with μ = Σ x_j / n and r = 1 / √(Σ (x_j - μ)² / n + ε),

    x̂ = r (x - μ),   y = w x̂ + b.

Each x_i meets the loss through its own x̂_i, and through μ and r through all of them. From
∂μ/∂x_i = 1/n and ∂r/∂x_i = -r³ (x_i - μ) / n = -r² x̂_i / n comes ∂x̂_j/∂x_i = r ([i = j] - 1/n -
x̂_i x̂_j / n), which is symmetric in i and j. So with g = w dy,

    dx = r (g - Σ g_j / n - x̂ Σ g_j x̂_j / n),   dw = Σ_rows dy x̂,   db = Σ_rows dy.

What points along the constants or along x is taken out: y does not see a shift or a scale of x.

rms_norm (Zhang and Sennrich, 2019) is the same without μ: r = 1 / √(Σ x_j² / n + ε), x̂ = r x, and
dx = r (g - x̂ Σ g_j x̂_j / n). In half precision models differ in where they round.
The kinds:

    "layer"   takes out μ; y = w x̂ + b in float32, rounded once
    "torch"   y = w x̂ in float32, rounded once
    "llama"   x̂ is rounded to the dtype of x, then multiplied by w; y has the dtype of the product
    "gemma"   y = (1 + w) x̂ in float32, rounded once

add_layer_norm and add_rms_norm normalise h = x + a, rounded to their dtype, and return h too. With
dh its gradient, dx = da = the dx above + dh.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .linear import rows
from .precision import widen

#: the kinds of rms_norm
CASTINGS = ("torch", "llama", "gemma")

Maybe = Tensor | None


def norm(
    x: Tensor, weight: Maybe, bias: Maybe, eps: float, kind: str
) -> tuple[Tensor, Maybe, Tensor]:
    """y, and of each row μ (None but for "layer") and r."""
    mean, rstd = statistics(x, eps, kind)
    y = unit(x, mean, rstd)
    y = widen(y.to(x.dtype)) if kind == "llama" else y
    y = y if weight is None else y * factor(weight, kind)
    y = y if bias is None else y + widen(bias)
    return y.to(dtype_of(x, weight, kind)).contiguous(), mean, rstd


def dtype_of(x: Tensor, weight: Maybe, kind: str) -> torch.dtype:
    """That of y."""
    if weight is None or kind != "llama":
        return x.dtype
    return torch.promote_types(x.dtype, weight.dtype)


def statistics(x: Tensor, eps: float, kind: str) -> tuple[Maybe, Tensor]:
    """μ and r. The mean first, then the squares of what is left: nothing cancels."""
    mean = widen(x).mean(-1, keepdim=True) if kind == "layer" else None
    d = widen(x) if mean is None else widen(x) - mean
    return mean, (d.square().mean(-1, keepdim=True) + eps).rsqrt()


def unit(x: Tensor, mean: Maybe, rstd: Tensor) -> Tensor:
    """x̂."""
    return (widen(x) if mean is None else widen(x) - mean) * rstd


def factor(weight: Tensor, kind: str) -> Tensor:
    """What x̂ is multiplied by."""
    return 1 + widen(weight) if kind == "gemma" else widen(weight)


def jacobian(t: Tensor, unit: Tensor, rstd: Tensor, kind: str) -> Tensor:
    """∂x̂/∂x, which is symmetric, times t."""
    t = t - t.mean(-1, keepdim=True) if kind == "layer" else t
    return (t - unit * (t * unit).mean(-1, keepdim=True)) * rstd


def norm_backward(
    dy: Tensor, x: Tensor, weight: Maybe, mean: Maybe, rstd: Tensor, kind: str,
    need_x: bool, need_weight: bool, need_bias: bool, dh: Maybe = None,
) -> tuple[Maybe, Maybe, Maybe]:  # fmt: skip
    """dx (plus ``dh``), dw and db; None for each that is not needed. What is rounded counts as
    unrounded."""
    x_hat, wide = unit(x, mean if kind == "layer" else None, rstd), widen(dy)
    like = x if weight is None else weight
    dx = dw = db = None
    if need_x:
        g = wide if weight is None else wide * factor(weight, kind)
        dx = jacobian(g, x_hat, rstd, kind)
        dx = (dx if dh is None else dx + widen(dh)).to(x.dtype).contiguous()
    if need_weight:
        dw = rows(wide * x_hat).sum(0).to(like.dtype)
    if need_bias:
        db = rows(wide).sum(0).to(like.dtype)
    return dx, dw, db


def norm_jvp(
    tx: Maybe, tw: Maybe, tb: Maybe, x: Tensor, weight: Maybe, eps: float, kind: str
) -> Tensor:
    """ty = w ∂x̂/∂x tx + x̂ tw + tb."""
    mean, rstd = statistics(x, eps, kind)
    x_hat = unit(x, mean, rstd)
    ty = torch.zeros_like(x_hat) if tx is None else jacobian(tx, x_hat, rstd, kind)
    ty = ty if weight is None else ty * factor(weight, kind)
    ty = ty if tw is None else ty + x_hat * tw
    return ty if tb is None else ty + tb


def add_norm(
    x: Tensor, residual: Tensor, weight: Maybe, bias: Maybe, eps: float, kind: str
) -> tuple[Tensor, Tensor, Maybe, Tensor]:
    """y, h, and of each row μ (None but for "layer") and r."""
    h = (x + residual).contiguous()
    y, mean, rstd = norm(h, weight, bias, eps, kind)
    return y, h, mean, rstd


def add_norm_backward(
    dy: Tensor, dh: Maybe, h: Tensor, weight: Maybe, mean: Maybe, rstd: Tensor, kind: str,
    need_x: bool, need_weight: bool, need_bias: bool,
) -> tuple[Maybe, Maybe, Maybe]:  # fmt: skip
    """dx, which is da too, dw and db; None for each that is not needed."""
    needs = need_x, need_weight, need_bias
    return norm_backward(dy, h, weight, mean, rstd, kind, *needs, dh)

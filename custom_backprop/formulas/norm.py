"""Layer normalization and RMS normalization of rows x of n numbers.

layer_norm (Ba, Kiros and Hinton, 2016): with μ = Σ x_j / n and r = 1 / √(Σ (x_j - μ)² / n + ε),

    x̂ = r (x - μ),   y = w x̂ + b.

Each x_i meets the loss through its own x̂_i, and through μ and r through all of them. From
∂μ/∂x_i = 1/n and ∂r/∂x_i = -r³ (x_i - μ) / n = -r² x̂_i / n comes ∂x̂_j/∂x_i = r ([i = j] - 1/n -
x̂_i x̂_j / n), which is symmetric in i and j. So with g = w dy,

    dx = r (g - Σ g_j / n - x̂ Σ g_j x̂_j / n),   dw = Σ_rows dy x̂,   db = Σ_rows dy.

What points along the constants or along x is taken out: y does not see a shift or a scale of x.

rms_norm (Zhang and Sennrich, 2019) is the same without μ: r = 1 / √(Σ x_j² / n + ε), x̂ = r x, and
dx = r (g - x̂ Σ g_j x̂_j / n). In half precision models differ in where they round:

    "torch"   y = w x̂ in float32, rounded once
    "llama"   x̂ is rounded to the dtype of x, then multiplied by w
    "gemma"   y = (1 + w) x̂ in float32, rounded once
"""

from __future__ import annotations

from torch import Tensor

from .linear import rows
from .precision import widen

CASTINGS = ("torch", "llama", "gemma")


def layer_norm_statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """μ and r of each row. The mean first, then the squares of what is left: nothing cancels."""
    mean = widen(x).mean(-1)
    return mean, ((widen(x) - mean.unsqueeze(-1)).square().mean(-1) + eps).rsqrt()


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """y, μ and r."""
    mean, rstd = layer_norm_statistics(x, eps)
    y = (widen(x) - mean.unsqueeze(-1)) * rstd.unsqueeze(-1)
    y = y if weight is None else y * weight
    y = y if bias is None else y + bias
    return y.to(x.dtype).contiguous(), mean, rstd


def layer_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, *needs: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx, dw and db; None for each that is not needed."""
    need_x, need_weight, need_bias = needs
    unit, dy = (widen(x) - mean.unsqueeze(-1)) * rstd.unsqueeze(-1), widen(dy)
    dx = layer_norm_project(dy if weight is None else dy * weight, unit, rstd) if need_x else None
    dw = rows(dy * unit).sum(0).to(weight.dtype) if need_weight and weight is not None else None
    db = rows(dy).sum(0) if need_bias else None
    return None if dx is None else dx.to(x.dtype).contiguous(), dw, db


def layer_norm_project(t: Tensor, unit: Tensor, rstd: Tensor) -> Tensor:
    """The symmetric Jacobian ∂x̂/∂x on t."""
    t = t - t.mean(-1, keepdim=True)
    return rms_norm_project(t, unit, rstd)


def rms_norm_statistics(x: Tensor, eps: float) -> Tensor:
    """r of each row."""
    return (widen(x).square().mean(-1) + eps).rsqrt()


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, casting: str) -> tuple[Tensor, Tensor]:
    """y and r."""
    rstd = rms_norm_statistics(x, eps)
    y, w = widen(x) * rstd.unsqueeze(-1), factor(weight, casting)
    if casting == "llama":
        y = y.to(x.dtype)
        return (y if weight is None else y * weight).contiguous(), rstd
    return (y if w is None else y * w).to(x.dtype).contiguous(), rstd


def rms_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    casting: str,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """dx and dw; None for each that is not needed. What is rounded counts as unrounded."""
    unit, dy, w = widen(x) * rstd.unsqueeze(-1), widen(dy), factor(weight, casting)
    dx = rms_norm_project(dy if w is None else dy * w, unit, rstd) if need_x else None
    dw = rows(dy * unit).sum(0).to(weight.dtype) if need_weight and weight is not None else None
    return None if dx is None else dx.to(x.dtype).contiguous(), dw


def rms_norm_project(t: Tensor, unit: Tensor, rstd: Tensor) -> Tensor:
    """The symmetric Jacobian ∂x̂/∂x on t."""
    return (t - unit * (t * unit).mean(-1, keepdim=True)) * rstd.unsqueeze(-1)


def factor(weight: Tensor | None, casting: str) -> Tensor | None:
    """What x̂ is multiplied by, in float32 or wider."""
    return weight if weight is None else 1 + widen(weight) if casting == "gemma" else widen(weight)

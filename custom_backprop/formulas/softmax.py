"""Softmax, log-softmax and softmin along one dimension, and their derivatives.

Backward needs only the output. Sums are over ``dim``, and m = max x: e^m cancels in every result,
and e^(x-m) <= 1 cannot overflow.

If the maximum of a row is not finite (all -inf, a +inf, a NaN), the whole row is NaN, as in torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .precision import widen


def _shifted(x: Tensor, dim: int) -> Tensor:
    """x - m."""
    return x - x.amax(dim, keepdim=True) if x.shape[dim] else x


def softmax(x: Tensor, dim: int) -> Tensor:
    """y_i = e^(x_i) / Σ_j e^(x_j)."""
    e = torch.exp(_shifted(x, dim))
    return e / e.sum(dim, keepdim=True)


def _of_largest(y: Tensor, dim: int) -> Tensor:
    """Which y are the largest of their row."""
    return y == y.amax(dim, keepdim=True)


def _relative(v: Tensor, y: Tensor, dim: int) -> Tensor:
    """v less the v of the largest y."""
    if not y.shape[dim]:
        return v
    of_largest = _of_largest(y, dim)
    theirs = torch.where(of_largest, v, 0).sum(dim, keepdim=True)
    return v - theirs / of_largest.sum(dim, keepdim=True)


def softmax_backward(dy: Tensor, y: Tensor, dim: int) -> Tensor:
    """dx = y (dy - Σ_j y_j dy_j).

    The quotient rule gives ∂y_j/∂x_i = y_j ([i = j] - y_i), so dx_i = Σ_j dy_j y_j ([i = j] - y_i)
    = y_i dy_i - y_i Σ_j y_j dy_j.
    The y_i sum to one, hence the dx_i to zero: a shift of the input does not change a softmax. For
    the same reason a shift of dy does not change dx. If the largest y_k is nearly 1, dy_k and the
    sum are nearly the same and their difference has no digits left; with dy relative to dy_k, dx_k
    = -y_k Σ_j y_j (dy_j - dy_k), in which dy_k has no part.
    """
    e = _relative(dy, y, dim)
    return y * (e - (y * e).sum(dim, keepdim=True))


def softmax_jvp(tx: Tensor, y: Tensor, dim: int) -> Tensor:
    """ty = y (tx - Σ_j y_j tx_j): the Jacobian diag(y) - y yᵀ is symmetric."""
    return softmax_backward(tx, y, dim)


def softmin(x: Tensor, dim: int) -> Tensor:
    """y = softmax(-x)."""
    return softmax(-x, dim)


def softmin_backward(dy: Tensor, y: Tensor, dim: int) -> Tensor:
    """dx = -y (dy - Σ_j y_j dy_j), by the chain rule through -x."""
    return -softmax_backward(dy, y, dim)


def softmin_jvp(tx: Tensor, y: Tensor, dim: int) -> Tensor:
    """ty = -y (tx - Σ_j y_j tx_j)."""
    return softmin_backward(tx, y, dim)


def log_softmax(x: Tensor, dim: int) -> Tensor:
    """y_i = x_i - log Σ_j e^(x_j), which is finite where the logarithm of a softmax would be log
    0."""
    s = _shifted(x, dim)
    return s - s.exp().sum(dim, keepdim=True).log()


def log_softmax_backward(dy: Tensor, y: Tensor, dim: int) -> Tensor:
    """dx = dy - e^y Σ_j dy_j.

    ∂y_j/∂x_i = [i = j] - e^(x_i) / Σ_k e^(x_k) = [i = j] - e^(y_i), so dx_i = dy_i - e^(y_i) Σ_j
    dy_j. If the largest p_k = e^(y_k) is nearly 1, 1 - p_k is rather the sum r of the others: dx_k
    = dy_k r - (1 - r) Σ_{j != k} dy_j.
    """
    p = y.exp()
    dx = dy - p * dy.sum(dim, keepdim=True)
    if not y.shape[dim]:
        return dx
    certain = _of_largest(y, dim) & (p > 0.5)
    others, rest = (torch.where(certain, 0, v).sum(dim, keepdim=True) for v in (dy, p))
    return torch.where(certain, dy * rest - (1 - rest) * others, dx)


def log_softmax_jvp(tx: Tensor, y: Tensor, dim: int) -> Tensor:
    """ty = tx - Σ_j e^(y_j) tx_j, of a tx relative to that of the largest y, which changes no
    difference."""
    e = _relative(tx, y, dim)
    return e - (y.exp() * e).sum(dim, keepdim=True)


@dataclass(frozen=True)
class Softmax:
    """One of the three.

    Attributes:
        formula: y and dx in one line, as ``check`` prints it.
        value: y, as ``value(x, dim)``.
        gradient: dx, as ``gradient(dy, y, dim)``.
        jvp: the directional derivative, as ``jvp(tx, y, dim)``.
    """

    name: str
    formula: str
    value: Callable[[Tensor, int], Tensor]
    gradient: Callable[[Tensor, Tensor, int], Tensor]
    jvp: Callable[[Tensor, Tensor, int], Tensor]

    def forward(self, x: Tensor, dim: int, dtype: torch.dtype | None) -> Tensor:
        """y for x cast to ``dtype``, rounded once."""
        dtype = dtype or x.dtype
        return self.value(widen(x.to(dtype)), dim).to(dtype)

    def backward(self, dy: Tensor, y: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
        """dx in ``dtype``, which is that of x, rounded once."""
        return self.gradient(widen(dy), widen(y), dim).to(dtype)


SOFTMAXES = {
    s.name: s
    for s in (
        Softmax(
            "softmax",
            "y = e^x / Σ e^x;  dx = y (dy - Σ y dy)",
            softmax,
            softmax_backward,
            softmax_jvp,
        ),
        Softmax(
            "softmin",
            "y = e^-x / Σ e^-x;  dx = -y (dy - Σ y dy)",
            softmin,
            softmin_backward,
            softmin_jvp,
        ),
        Softmax(
            "log_softmax",
            "y = x - log Σ e^x;  dx = dy - e^y Σ dy",
            log_softmax,
            log_softmax_backward,
            log_softmax_jvp,
        ),
    )
}

"""The division of a vector by its norm."""

from __future__ import annotations

import torch
from torch import Tensor

from .precision import widen


def normalize(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y = x / r with r = max(‖x‖, ε), along the last dimension; and r."""
    wide = widen(x)
    square = wide.square().sum(-1, keepdim=True)
    long = square > eps * eps
    r = torch.where(long, torch.where(long, square, 1).sqrt(), eps)
    return (wide / r).to(x.dtype), r.squeeze(-1)


def normalize_backward(dy: Tensor, y: Tensor, r: Tensor, eps: float) -> Tensor:
    """dx = (dy - y Σ y dy) / r, and dy / ε where ‖x‖ <= ε.

    ∂y_j/∂x_i = [i = j] / r - x_j x_i / r³ = ([i = j] - y_j y_i) / r: what points along x would only
    change its length, and is taken out.
    """
    wide, y, r = widen(dy), widen(y), r.unsqueeze(-1)
    along = torch.where(r > eps, (wide * y).sum(-1, keepdim=True), 0)
    return ((wide - y * along) / r).to(dy.dtype)

"""The division of a vector by its norm."""

from __future__ import annotations

import torch
from torch import Tensor

from .precision import widen


def norm(x: Tensor, eps: float) -> Tensor:
    """r = max(‖x‖, ε), along the last dimension."""
    square = widen(x).square().sum(-1)
    short = square <= eps * eps
    return torch.where(short, eps, torch.where(short, 1, square).sqrt())


def normalize(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y = x / r, and r."""
    r = norm(x, eps)
    return (widen(x) / r.unsqueeze(-1)).to(x.dtype).contiguous(), r


def normalize_backward(dy: Tensor, x: Tensor, r: Tensor, eps: float) -> Tensor:
    """dx = (dy - y Σ y dy) / r, and dy / ε where ‖x‖ <= ε.

    ∂y_j/∂x_i = [i = j] / r - x_j x_i / r³ = ([i = j] - y_j y_i) / r: what points along x would only
    change its length, and is taken out.
    """
    wide, r = widen(dy), r.unsqueeze(-1)
    y = widen(x) / r
    along = torch.where(r > eps, (wide * y).sum(-1, keepdim=True), 0)
    return ((wide - y * along) / r).to(x.dtype).contiguous()

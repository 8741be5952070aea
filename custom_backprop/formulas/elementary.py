"""Functions that keep their digits to the end of the dtype's range, as do their derivatives by
autograd."""

from __future__ import annotations

import torch
from torch import Tensor


def exp_minus_abs(x: Tensor) -> Tensor:
    """e^-|x|, which cannot overflow. Here |x| is x at 0. With torch's abs, whose derivative is 0
    there, the functions below would not be smooth."""
    return torch.exp(torch.where(x < 0, x, -x))


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x) = max(x, 0) + log(1 + e^-|x|)."""
    return torch.where(x < 0, 0.0, x) + torch.log1p(exp_minus_abs(x))


def sigmoid(x: Tensor) -> Tensor:
    """σ(x) = 1 / (1 + e^-x). torch's own is 0 where e^-x overflows, although σ(x) = e^x is not 0
    there yet, and its derivative is 0 where 1 - σ(x) is rounded to 0."""
    e = exp_minus_abs(x)
    return torch.where(x < 0, e, 1.0) / (1 + e)

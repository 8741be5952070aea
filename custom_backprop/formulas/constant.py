"""Constant tensors, made from the tensors that they are combined with."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dtensor import is_dtensor


def with_zero_slope(result: Tensor, t: Tensor) -> Tensor:
    """``result`` unchanged, but for autograd a function of ``t`` (of the same shape and dtype)
    whose derivative is 0.

    If a derivative does not depend on ``t``, its formula has no ``t``. Autograd would find no path
    from one to the other, and raise for the second derivative, which should be 0.
    """
    return t.where(t.new_zeros((), dtype=torch.bool), result)


def indices(t: Tensor, n: int) -> Tensor:
    """0, 1, ..., n - 1; a DTensor if ``t`` is one, which ``torch.arange`` does not make."""
    if type(t) is Tensor or not is_dtensor(t):
        return torch.arange(n, device=t.device)
    return t.new_ones(n, dtype=torch.int64).cumsum(0) - 1

"""Tensors that are constants, made from the tensors that they meet."""

from __future__ import annotations

import torch
from torch import Tensor


def with_zero_slope(result: Tensor, t: Tensor) -> Tensor:
    """``result`` unchanged, for autograd a function of ``t`` (of its shape and dtype) whose
    derivative is 0.

    A derivative that does not depend on ``t`` has a formula without ``t``. Autograd would then find
    no path from the one to the other, and to ask for the second derivative would be an error where
    it is 0.
    """
    return t.where(t.new_zeros((), dtype=torch.bool), result)


def indices(t: Tensor, n: int) -> Tensor:
    """0, 1, ..., n - 1. They are made from ``t``: where that is a DTensor, so are they
    (``torch.arange`` would not be)."""
    return t.new_ones(n, dtype=torch.int64).cumsum(0) - 1

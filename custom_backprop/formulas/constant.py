"""Constants that are tensors like those they meet."""

from __future__ import annotations

import torch
from torch import Tensor


def constant_in(result: Tensor, t: Tensor) -> Tensor:
    """``result`` as it is, for autograd a function of ``t`` (of its shape and dtype) whose
    derivative is 0.

    Where a derivative does not change with ``t``, its formula does not contain ``t``, and to ask
    for the second derivative, which is 0,
    would be an error: autograd finds no way.
    """
    return t.where(t.new_zeros((), dtype=torch.bool), result)


def numbers(t: Tensor, n: int) -> Tensor:
    """0, 1, ..., n - 1. They are made from ``t``: where that is a DTensor, so are they
    (``torch.arange`` would not be)."""
    return t.new_ones(n, dtype=torch.int64).cumsum(0) - 1

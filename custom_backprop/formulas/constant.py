"""Derivatives of 0 that autograd can find."""

from __future__ import annotations

import torch
from torch import Tensor


def constant_in(result: Tensor, t: Tensor) -> Tensor:
    """``result`` as it is, for autograd a function of ``t`` (of its shape and dtype) whose derivative is 0.

    Where a derivative does not change with ``t``, its formula does not contain ``t``, and to ask for the second derivative, which is 0,
    would be an error: autograd finds no way.
    """
    return t.where(t.new_zeros((), dtype=torch.bool), result)

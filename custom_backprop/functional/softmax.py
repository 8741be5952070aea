"""Softmaxes, with the names and signatures of ``torch.nn.functional``.

Each takes a tensor of any shape and strides and returns a contiguous one of the same shape.

Args:
    input: floating-point numbers, or with ``dtype`` any real ones.
    dim: the dimension that is normalised. None chooses 0 or 1 by the number of dimensions, and
    warns, as stock does.
    dtype: computed and returned in it; the gradient comes back in the input's own. Default: the
    input's.

Raises:
    IndexError: ``dim`` is out of range.
    TypeError: ``dim`` is no integer.
    NotImplementedError: integer or complex input without ``dtype``.

Derivations: :mod:`custom_backprop.formulas.softmax`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import _get_softmax_dim  # type: ignore[attr-defined]

from ..ops.softmax import apply

__all__ = ["log_softmax", "softmax", "softmin"]


def softmax(
    input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Tensor:
    """y = e^x / Σ e^x;  dx = y (dy - Σ y dy)."""
    return apply(
        "softmax",
        input,
        _get_softmax_dim("softmax", input.dim(), _stacklevel) if dim is None else dim,
        dtype,
    )


def softmin(
    input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Tensor:
    """y = e^-x / Σ e^-x;  dx = -y (dy - Σ y dy)."""
    return apply(
        "softmin",
        input,
        _get_softmax_dim("softmin", input.dim(), _stacklevel) if dim is None else dim,
        dtype,
    )


def log_softmax(
    input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Tensor:
    """y = x - log Σ e^x;  dx = dy - e^y Σ dy."""
    return apply(
        "log_softmax",
        input,
        _get_softmax_dim("log_softmax", input.dim(), _stacklevel) if dim is None else dim,
        dtype,
    )

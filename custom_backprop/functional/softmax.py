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
    TypeError: ``dim`` is not an integer, or ``dtype`` not a torch.dtype.
    NotImplementedError: integer or complex input without ``dtype``.

Derivations: :mod:`custom_backprop.formulas.softmax`.
"""

from __future__ import annotations

from operator import index

import torch
from torch import Tensor
from torch.nn.functional import _get_softmax_dim  # type: ignore[attr-defined]

from ..backends.softmax import stock_of
from ..ops.route import overridable
from ..ops.softmax import softmaxes

__all__ = ["log_softmax", "softmax", "softmin"]


@overridable
def softmax(
    input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Tensor:
    """y = e^x / Σ e^x;  dx = y (dy - Σ y dy)."""
    return _along("softmax", input, dim, _stacklevel, dtype)


@overridable
def softmin(
    input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Tensor:
    """y = e^-x / Σ e^-x;  dx = -y (dy - Σ y dy)."""
    return _along("softmin", input, dim, _stacklevel, dtype)


@overridable
def log_softmax(
    input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Tensor:
    """y = x - log Σ e^x;  dx = dy - e^y Σ dy."""
    return _along("log_softmax", input, dim, _stacklevel, dtype)


def _along(name: str, x: Tensor, dim: int | None, level: int, dtype: torch.dtype | None) -> Tensor:
    """The cast to ``dtype`` is the kernel's own: no cast tensor is written."""
    count = x.dim() or 1
    if dim is None:
        dim = _get_softmax_dim(name, x.dim(), level + 2)
    elif not isinstance(dim, int):
        try:
            dim = index(dim)
        except TypeError:
            raise TypeError(f"{name}: dim must be an int, not {type(dim).__name__}") from None
    if not -count <= dim < count:
        raise IndexError(
            f"Dimension out of range (expected to be in range of [{-count}, {count - 1}], but got "
            f"{dim}): {name} of shape {tuple(x.shape)}"
        )
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name}: dtype must be a torch.dtype, not {type(dtype).__name__}")
    if x.is_nested or not (x.is_floating_point() and (dtype is None or dtype.is_floating_point)):
        return stock_of(name)(x, dim, dtype)  # has no gradient: stock's result, or stock's error
    if dtype is None and x.is_cuda and torch.is_autocast_enabled("cuda"):
        dtype = None if x.dtype == torch.float64 else torch.float32  # as torch's own
    if not x.dim():
        return softmaxes[name](x.reshape(1), 0, dtype).reshape(())
    return softmaxes[name](x, dim % count, dtype)

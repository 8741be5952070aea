"""What functions of several families ask of their arguments."""

from __future__ import annotations

import functools
from numbers import Number
from typing import Any

import torch
from torch import Tensor
from torch.nn import _reduction as _Reduction


def number(name: str, p: Any) -> float:
    """A parameter of the function ``name`` as a float.

    Raises:
        TypeError, RuntimeError: it is no number, or a complex one.
    """
    if isinstance(p, complex):
        raise RuntimeError(f"{name}: a parameter must be real, got {p}")
    if not isinstance(p, (Number, Tensor)) or (isinstance(p, Tensor) and p.requires_grad):
        raise TypeError(f"{name}: a parameter must be a Number, not {type(p).__name__}")
    return float(p)  # type: ignore[arg-type]


def reduction_of(size_average: bool | None, reduce: bool | None, reduction: str) -> str:
    """``reduction``, or what its deprecated forms say."""
    if size_average is None and reduce is None:
        return reduction
    return _Reduction.legacy_get_string(
        size_average, reduce, emit_warning=not torch.compiler.is_compiling()
    )


def common_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype of torch's type promotion: 0-D tensors have no say beside others."""
    given = [t for t in tensors if t is not None]
    if all(t.dtype == given[0].dtype for t in given):
        return given[0].dtype
    return functools.reduce(
        torch.promote_types, [t.dtype for t in given if t.dim()] or [t.dtype for t in given]
    )


def same_dtype(*tensors: Any) -> Any:
    """The tensors (or None) in their common dtype."""
    dtype = common_dtype(*tensors)
    return tuple(t if t is None or t.dtype == dtype else t.to(dtype) for t in tensors)


def together(*tensors: Any) -> Any:
    """The tensors (or None) in one dtype and shape. Autograd sums the gradient of one that was
    expanded."""
    first = tensors[0]
    for t in tensors:
        if t is not None and (t.dtype != first.dtype or t.shape != first.shape):
            cast = same_dtype(*tensors)
            shapes = torch.broadcast_shapes(*[t.shape for t in cast if t is not None])
            return tuple([t if t is None else t.expand(shapes) for t in cast])
    return tensors

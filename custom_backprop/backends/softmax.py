"""Primitives of the softmaxes: ``<name>_forward(x, dim, dtype)`` and ``<name>_backward(dy, y, dim,
dtype)``, with ``dim`` >= 0.

Forward computes in ``dtype`` (None: that of x), backward returns dx in ``dtype``, that of x.
Results are contiguous, as PyTorch's own are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..formulas.softmax import SOFTMAXES, Softmax
from .library import Primitive, fold_batch, launcher, primitive


def _softmin(x, dim, dtype):
    return torch.softmax(-x, dim, dtype=dtype)


def _softmax_backward(dy, y, dim, dtype):
    return torch._softmax_backward_data(dy, y, dim, y.dtype).to(dtype)


def _softmin_backward(dy, y, dim, dtype):
    return _softmax_backward(dy, y, dim, dtype).neg_()


def _log_softmax_backward(dy, y, dim, dtype):
    return torch._log_softmax_backward_data(dy, y, dim, y.dtype).to(dtype)


#: name -> (forward, backward) by PyTorch's operators
ATEN: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "softmax": (torch.softmax, _softmax_backward),
    "softmin": (_softmin, _softmin_backward),
    "log_softmax": (torch.log_softmax, _log_softmax_backward),
}


def stock_of(name: str) -> Callable[..., Tensor]:
    """PyTorch's own function, with our arguments."""
    function = getattr(torch.nn.functional, name)
    return lambda x, dim, dtype: function(x, dim, dtype=dtype)


def _other_dimensions(tensors):
    """Sharded along any dimension but that of the sum."""

    def sharding(x, *rest):
        dim = rest[tensors - 1]
        return (([i], [i] * tensors) for i in range(x.dim()) if i != dim)

    return sharding


def _define(s: Softmax) -> tuple[Primitive, Primitive]:
    by_aten = ATEN[s.name]

    def vmap_forward(info, in_dims, x, dim, dtype):
        return forward(x.movedim(in_dims[0], 0), dim + 1, dtype), 0

    def vmap_backward(info, in_dims, dy, y, dim, dtype):
        return backward(*fold_batch((dy, y), in_dims[:2], info.batch_size), dim + 1, dtype), 0

    forward = primitive(
        f"{s.name}_forward(Tensor x, int dim, ScalarType? dtype) -> Tensor",
        formula=lambda *args: s.forward(*args).contiguous(),
        aten=by_aten[0],
        triton=launcher("softmax", "forward", s.name),
        fake=lambda x, dim, dtype: x.new_empty(x.shape, dtype=dtype),
        vmap=vmap_forward,
        sharding=_other_dimensions(1),
    )
    backward = primitive(
        f"{s.name}_backward(Tensor dy, Tensor y, int dim, ScalarType dtype) -> Tensor",
        formula=lambda *args: s.backward(*args).contiguous(),
        aten=by_aten[1],
        triton=launcher("softmax", "backward", s.name),
        fake=lambda dy, y, dim, dtype: y.new_empty(y.shape, dtype=dtype),
        vmap=vmap_backward,
        sharding=_other_dimensions(2),
    )
    return forward, backward


#: name -> (forward, backward)
primitives = {s.name: _define(s) for s in SOFTMAXES.values()}

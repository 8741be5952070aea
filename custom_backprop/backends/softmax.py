"""Primitives of the softmaxes: ``<name>_forward(x, dim, dtype)`` and ``<name>_backward(dy, y, dim,
dtype)``, with ``dim`` >= 0.

Forward computes in ``dtype`` (None: that of x), backward returns dx in ``dtype``, that of x.
Results are contiguous, as PyTorch's own are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..formulas.softmax import SOFTMAXES, Softmax
from .kernels import kernels
from .library import builtin, fold_batch, primitive

_softmax_backward_into = builtin(torch.ops.aten._softmax_backward_data, "out")
_log_softmax_backward_into = builtin(torch.ops.aten._log_softmax_backward_data, "out")


def _softmin(x: Tensor, dim: int, dtype: torch.dtype | None) -> Tensor:
    return torch.softmax(-x, dim, dtype=dtype)


def _softmax_backward(dy: Tensor, y: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    return torch._softmax_backward_data(dy, y, dim, y.dtype).to(dtype)


def _softmin_backward(dy: Tensor, y: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    return _softmax_backward(dy, y, dim, dtype).neg_()


def _log_softmax_backward(dy: Tensor, y: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    return torch._log_softmax_backward_data(dy, y, dim, y.dtype).to(dtype)


#: name -> (forward, backward) by PyTorch's operators
ATEN: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "softmax": (torch.softmax, _softmax_backward),
    "softmin": (_softmin, _softmin_backward),
    "log_softmax": (torch.log_softmax, _log_softmax_backward),
}


def _softmax_into(dx: Tensor, dy: Tensor, y: Tensor, dim: int) -> Tensor:
    return _softmax_backward_into(dy, y, dim, y.dtype, grad_input=dx)


#: name -> the backward of one dtype that writes into a dx that is dy or y itself: a row is read
#: whole before it is written
ATEN_INTO: dict[str, Callable[..., Tensor]] = {
    "softmax": _softmax_into,
    "softmin": lambda dx, dy, y, dim: _softmax_into(dx, dy, y, dim).neg_(),
    "log_softmax": lambda dx, dy, y, dim: _log_softmax_backward_into(dy, y, dim, y.dtype, out=dx),
}


def _define(s: Softmax) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    forward_aten, backward_aten = ATEN[s.name]

    def vmap_forward(
        info: Any, in_dims: Any, x: Tensor, dim: int, dtype: torch.dtype | None
    ) -> tuple[Tensor, int]:
        return forward(x.movedim(in_dims[0], 0), dim + 1, dtype), 0

    def vmap_backward(
        info: Any, in_dims: Any, dy: Tensor, y: Tensor, dim: int, dtype: torch.dtype
    ) -> tuple[Tensor, int]:
        return backward(*fold_batch((dy, y), in_dims[:2], info.batch_size), dim + 1, dtype), 0

    forward = primitive(
        f"{s.name}_forward(Tensor x, int dim, ScalarType? dtype) -> Tensor",
        formula=lambda *args: s.forward(*args).contiguous(),
        aten=forward_aten,
        triton=lambda *args: kernels("softmax").forward(s.name, *args),
        fake=lambda x, dim, dtype: x.new_empty(x.shape, dtype=dtype),
        vmap=vmap_forward,
    )
    backward = primitive(
        f"{s.name}_backward(Tensor dy, Tensor y, int dim, ScalarType dtype) -> Tensor",
        formula=lambda *args: s.backward(*args).contiguous(),
        aten=backward_aten,
        triton=lambda *args: kernels("softmax").backward(s.name, *args),
        fake=lambda dy, y, dim, dtype: y.new_empty(y.shape, dtype=dtype),
        vmap=vmap_backward,
    )
    return forward, backward


#: name -> (forward, backward)
primitives = {s.name: _define(s) for s in SOFTMAXES.values()}

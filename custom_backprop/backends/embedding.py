"""Primitives of embedding. ``padding_idx`` is -1 where there is none."""

from __future__ import annotations

import torch

from ..formulas import embedding as formula
from ..formulas.precision import HALF
from .library import P, R, builtin, launcher, primitive

_embedding = builtin(torch.ops.aten.embedding)
_dense_backward = builtin(torch.ops.aten.embedding_dense_backward)


def _forward(weight, index, padding_idx, scale_grad_by_freq, sparse):
    return _embedding(weight, index)


def _backward(dy, index, rows, padding_idx, scale_grad_by_freq):
    if dy.dtype not in HALF:
        return _dense_backward(dy, index, rows, padding_idx, scale_grad_by_freq)
    # in float32, and only as many rows as are looked up
    found, of = index.reshape(-1).unique(return_inverse=True)
    padding = (found == padding_idx).nonzero().squeeze(1) if padding_idx >= 0 else found[:0]
    sums = formula.embedding_backward(dy.float(), of, found.shape[0], -1, scale_grad_by_freq)
    sums.index_fill_(0, padding, 0)
    return dy.new_zeros(rows, dy.shape[-1]).index_copy_(0, found.long(), sums.to(dy.dtype))


def _sharding(weight, index, *options):
    yield [index.dim()], [1, R]
    yield from (([i], [R, i]) for i in range(index.dim()))


def _backward_sharding(dy, index, rows, padding_idx, scale_grad_by_freq):
    yield [1], [index.dim(), R]
    if not scale_grad_by_freq:
        yield from (([P], [i, i]) for i in range(index.dim()))


forward = primitive(
    "embedding_forward(Tensor weight, Tensor index, int padding_idx, bool scale_grad_by_freq, "
    "bool sparse) -> Tensor",
    formula=formula.embedding,
    aten=_forward,
    triton=launcher("embedding", "forward"),
    sharding=_sharding,
)
backward = primitive(
    "embedding_backward(Tensor dy, Tensor index, SymInt rows, int padding_idx, "
    "bool scale_grad_by_freq) -> Tensor",
    formula=formula.embedding_backward,
    aten=_backward,
    triton=launcher("embedding", "backward"),
    traced="kernel",  # a compiler would sum by atomics
    sharding=_backward_sharding,
)

"""Look-up of rows: y_r = W_t for the index t = t_r of row r.

The loss depends on W_v through every row whose index is v:

    dW_v = Σ_r [t_r = v] dy_r.

Two rules of torch change that gradient on purpose, and are no derivative of anything. The row
``padding_idx`` gets none. With ``scale_grad_by_freq`` dW_v is divided by the number of rows whose
index is v.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .precision import widen


def embedding(
    weight: Tensor, index: Tensor, padding_idx: int, scale_grad_by_freq: bool, sparse: bool
) -> Tensor:
    """y. Autograd follows torch's rules for padding and frequencies. A sparse gradient is of no use
    to who differentiates this: it is dense."""
    return torch.embedding(weight, index, padding_idx, scale_grad_by_freq, False)


def embedding_backward(
    dy: Tensor, index: Tensor, rows: int, padding_idx: int, scale_grad_by_freq: bool
) -> Tensor:
    """dW, of ``rows`` rows; summed in float32 and rounded once."""
    flat = index.reshape(-1)
    dy_r = widen(dy).reshape(flat.shape[0], dy.shape[-1])
    if padding_idx >= 0:
        dy_r = torch.where((flat == padding_idx).unsqueeze(1), 0, dy_r)
    if scale_grad_by_freq:
        dy_r = dy_r / frequencies(flat, rows)[flat].unsqueeze(1)
    return dy_r.new_zeros(rows, dy.shape[-1]).index_add(0, flat, dy_r).to(dy.dtype)


def frequencies(index: Tensor, rows: int) -> Tensor:
    """How often each row is looked up."""
    return index.new_zeros(rows).index_add(0, index, torch.ones_like(index))


def sparse_gradient(dy: Tensor, index: Tensor, rows: int, padding_idx: int) -> Tensor:
    """dW as torch's sparse tensor, not coalesced: dy_r at t_r, and no entry for the padding."""
    flat = index.reshape(-1)
    dy_r = dy.reshape(flat.shape[0], dy.shape[-1])
    if padding_idx >= 0:
        there = (flat != padding_idx).nonzero().squeeze(1)
        flat, dy_r = flat[there], dy_r[there]
    return torch.sparse_coo_tensor(
        flat.long().unsqueeze(0), dy_r, (rows, dy.shape[-1]), check_invariants=False
    )

"""Negative log likelihood of log-probabilities x, (N, C) or (N, C, D), where D stands for any
number of dimensions. A row r is one of its N·D vectors of C numbers, one per class.

L_r = -w_t x_rt for the class t = t_r of the row. The loss depends only on that x_rt:

    dx_rc = -w_t dy_r [c = t].

Reductions. "sum" is Σ_r L_r: the gradient of each row's loss is dy_r = dy. "mean" divides by the
sum of the rows' weights, not by their number: (Σ_r L_r) / (Σ_r w_t), so dy_r = dy / Σ_r w_t. If all
rows are ignored, that is 0/0: the loss is NaN. dx is 0, because dy_r counts as 0 for ignored rows.
A class outside [0, C) has the weight NaN, and the loss NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .constant import indices, with_zero_slope
from .loss import MEAN, NONE
from .precision import widen


def along_classes(v: Tensor, x: Tensor) -> Tensor:
    """(C) as (1, C) or (1, C, 1), which broadcasts with x."""
    return v.view(1, -1, *[1] * (x.dim() - 2))


def classes_and_weights(
    target: Tensor, weight: Tensor | None, ignore_index: int, classes: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The class of each row, 0 if it is not valid, and its weight w_t: 0 if it is ignored, NaN if
    it is out of range."""
    inside = (target >= 0) & (target < classes)
    index = torch.where(inside & (target != ignore_index), target, 0)
    w = torch.ones_like(target, dtype=dtype) if weight is None else weight.to(dtype)[index]
    return index, torch.where(target == ignore_index, 0, torch.where(inside, w, torch.nan))


def onehot(index: Tensor, x: Tensor) -> Tensor:
    """[c = t], of the shape of x."""
    return along_classes(indices(x, x.shape[1]), x) == index.unsqueeze(1)


def reduced(rows: Tensor, total: Tensor | int, reduction: int) -> Tensor:
    """The loss of all rows."""
    if reduction == NONE:
        return rows
    return rows.sum() / total if reduction == MEAN else rows.sum()


def of_rows(dy: Tensor, target: Tensor, w: Tensor, reduction: int, ignore_index: int) -> Tensor:
    """dy_r; 0 if the row is ignored."""
    rows = dy.to(w.dtype) / w.sum() if reduction == MEAN else dy.to(w.dtype)
    return (
        rows.expand_as(w)
        if target.is_floating_point()
        else torch.where(target == ignore_index, 0, rows)
    )


def nll_forward(
    x: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """The loss, and Σ_r w_t."""
    wide = widen(x)
    index, w = classes_and_weights(target, weight, ignore_index, x.shape[1], wide.dtype)
    rows = torch.where(
        target == ignore_index, 0, -w * wide.gather(1, index.unsqueeze(1)).squeeze(1)
    )
    return reduced(rows, w.sum(), reduction).to(x.dtype), w.sum().to(x.dtype)


def nll_backward(
    dy: Tensor,
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    total: Tensor,
    reduction: int,
    ignore_index: int,
) -> Tensor:
    """dx_rc = -w_t dy_r [c = t]. It reads no value of x, and computes ``total`` again."""
    index, w = classes_and_weights(target, weight, ignore_index, x.shape[1], widen(x).dtype)
    hard = (-w * of_rows(dy, target, w, reduction, ignore_index)).unsqueeze(1)
    return with_zero_slope(torch.where(onehot(index, x), hard, 0).to(x.dtype), x)

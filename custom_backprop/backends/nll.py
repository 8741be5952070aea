"""Primitives of nll_loss, on x (N, C) or (N, C, D)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..formulas import nll as formula
from ..formulas.loss import MEAN, NONE
from .library import P, R, builtin, launcher, primitive

aten = torch.ops.aten
_forward, _backward = builtin(aten.nll_loss_forward), builtin(aten.nll_loss_backward)


def forward_aten(
    x: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """The loss, and Σ w_t."""
    if x.dim() == 2:
        return _forward(x, target, weight, reduction, ignore_index)
    loss, total = x.new_empty(target.shape if reduction == NONE else ()), x.new_empty(())
    aten.nll_loss2d_forward.output(
        x.unsqueeze(3),
        target.unsqueeze(2),
        weight,
        reduction,
        ignore_index,
        output=loss.unsqueeze(2) if reduction == NONE else loss,
        total_weight=total,
    )
    return loss, total


def backward_aten(
    dy: Tensor,
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    total: Tensor,
    reduction: int,
    ignore_index: int,
) -> Tensor:
    """dx."""
    if x.dim() == 2:
        return _backward(dy, x, target, weight, reduction, ignore_index, total)
    dy, x = dy.unsqueeze(2) if reduction == NONE else dy, x.contiguous().unsqueeze(3)
    return aten.nll_loss2d_backward.default(
        dy, x, target.unsqueeze(2), weight, reduction, ignore_index, total
    ).squeeze(3)


def of_row(i: int) -> int:
    """That of one number a row: dimension i of x without that of the classes."""
    return max(i - 1, 0)


def rows_of(x: Tensor, target: Tensor) -> Iterable[tuple[int, int]]:
    """The dimensions of x but that of the classes, and the target's placement. A mean divides by a
    weight that no shard knows."""
    same = target.dim() == x.dim()
    return ((i, i if same else of_row(i)) for i in range(x.dim()) if i != 1)


def _sharding(x, target, weight, reduction, *rest):
    if reduction != MEAN:
        for i, t in rows_of(x, target):
            yield [of_row(i) if reduction == NONE else P, P], [i, t, R]


def _backward_sharding(dy, x, target, weight, total, reduction, *rest):
    if reduction != MEAN:
        for i, t in rows_of(x, target):  # only a mean reads the total
            yield [i], [of_row(i) if reduction == NONE else R, i, t, R, None]


def _fake(x, target, weight, reduction, *rest):
    return x.new_empty(target.shape if reduction == NONE else ()), x.new_empty(())


_TARGET = "Tensor target, Tensor? weight"

forward = primitive(
    f"nll_loss_forward(Tensor x, {_TARGET}, int reduction, int ignore_index) "
    "-> (Tensor loss, Tensor total)",
    formula=formula.nll_forward,
    aten=forward_aten,
    triton=launcher("nll", "forward"),
    fake=_fake,
    sharding=_sharding,
)
backward = primitive(
    f"nll_loss_backward(Tensor dy, Tensor x, {_TARGET}, Tensor total, int reduction, "
    "int ignore_index) -> Tensor",
    formula=formula.nll_backward,
    aten=backward_aten,
    triton=launcher("nll", "backward"),
    fake=lambda dy, x, *rest: x.new_empty(x.shape),
    sharding=_backward_sharding,
)

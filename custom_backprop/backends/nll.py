"""Primitives of nll_loss, on x (N, C) or (N, C, D)."""

from __future__ import annotations

from collections.abc import Iterator

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


def shards(x: Tensor, target: Tensor, reduction: int) -> Iterator[tuple[int, int, int]]:
    """The dimensions along which rows may be sharded: of x any but that of the classes, with that
    of the target, and that of a tensor of one number a row. None for a mean, which divides by a
    weight that no shard knows."""
    for i in range(x.dim()):
        if i != 1 and reduction != MEAN:
            row = max(i - 1, 0)
            yield i, i if target.dim() == x.dim() else row, row


def _sharding(x, target, weight, reduction, *rest):
    for i, t, row in shards(x, target, reduction):
        yield [row if reduction == NONE else P, P], [i, t, R]


def _backward_sharding(dy, x, target, weight, total, reduction, *rest):
    for i, t, row in shards(x, target, reduction):  # only a mean reads the total
        yield [i], [row if reduction == NONE else R, i, t, R, None]


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

"""Batch normalization by the statistics of the batches of all ranks of a group.

With n_k, μ_k and M_k = Σ (x - μ_k)² of rank k, each of a channel,

    n = Σ n_k,   μ = Σ n_k μ_k / n,   M = Σ (M_k + n_k (μ_k - μ)²),   σ² = M / n,

and y and dx are those of ``formulas/channel_norm.py``, whose sums dw = Σ dy x̂ and db = Σ dy are of
all ranks in dx. So each rank gathers 2 C + 1 numbers of every other in forward, and adds up 2 C in
backward. The dw and db that it returns are its own: DDP adds those up, as of every parameter.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backends import channel_norm as primitives
from ..formulas import channel_norm as formula
from ..formulas.precision import widen
from ..functional.channel_norm import check, move


class _SyncBatchNorm(torch.autograd.Function):
    """y, and of each channel μ and the unbiased variance, these two without a gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        mean, variance = formula.moments(x, 0)
        own = mean.new_full((1,), formula.count(x, 0))
        mine = torch.cat([mean, variance, own])
        each = [torch.empty_like(mine) for _ in range(group.size())]
        dist.all_gather(each, mine, group=group)
        means, variances, n = torch.stack(each).split([len(mean), len(mean), 1], 1)
        total = n.sum().clamp(min=1)
        mean = (n * means).sum(0) / total
        squares = (n * (variances + (means - mean).square())).sum(0)
        variance = squares / total
        y = primitives.frozen_forward(x, weight, bias, mean, variance, eps)
        unbiased = squares / (total - 1).clamp(min=1)
        ctx.mark_non_differentiable(mean, unbiased)
        ctx.save_for_backward(x, weight, mean, variance, total)
        ctx.eps, ctx.group = eps, group
        return y, mean, unbiased

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> Any:
        x, weight, mean, variance, n = ctx.saved_tensors
        one = torch.ones_like(mean)  # the sums are of its dtype
        given = dy, x, one, mean, variance, ctx.eps
        _, dw, db = primitives.frozen_backward(*given, False, True, True)
        sums, dx, like = torch.stack([dw, db]), None, x if weight is None else weight
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        if need_x:
            dist.all_reduce(sums, group=ctx.group)
            along, total = sums / n if weight is None else sums / n * widen(weight)
            statistics = formula.constants(mean, variance, ctx.eps)
            dx = primitives.batch_input(dy, x, weight, *statistics, along, total)
        return (
            dx,
            dw.to(like.dtype) if need_weight else None,
            db.to(like.dtype) if need_bias else None,
            None,
            None,
        )


def sync_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
    group: Any,
) -> Tensor:
    """:func:`custom_backprop.functional.batch_norm` in training, of the batches of all ranks of
    ``group`` together. Every rank calls this, and backward; one may have no samples. There is no
    second derivative.

    Raises:
        RuntimeError, NotImplementedError, TypeError: as of that function.
    """
    check("sync_batch_norm", input, weight, bias, running_mean, running_var)
    y, *found = _SyncBatchNorm.apply(input, weight, bias, eps, group)
    if running_mean is not None:
        move((running_mean, running_var), found, momentum)
    return y

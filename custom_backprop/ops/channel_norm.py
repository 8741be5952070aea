"""Autograd of group_norm, instance_norm and batch_norm. Saved are x and statistics, not x̂."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..backends import channel_norm as primitives
from ..formulas import channel_norm as formula
from .route import op


class GroupNorm:
    """y = w x̂ + b, x̂ = r (x - μ);  dx = r (g - Σ g / n - x̂ Σ g x̂ / n), g = w dy, dw = Σ dy x̂,
    db = Σ dy."""

    forward_op, backward_op = primitives.forward, primitives.backward
    has_statistics = True
    autocast = {"cuda": "float32"}  # noqa: RUF012

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight, _, ctx.groups, ctx.eps = inputs
        ctx.save_for_backward(x, weight, *output[1:])

    @staticmethod
    def backward(run: Any, ctx: Any, dy: Tensor) -> Any:
        x, weight, *statistics = ctx.saved_tensors
        if ctx.is_differentiated:
            statistics = formula.statistics(x, ctx.groups, ctx.eps)
        return run(dy, x, weight, *statistics, ctx.groups, *ctx.needs_input_grad[:3])

    @staticmethod
    def jvp(ctx: Any, tx: Tensor | None, tw: Tensor | None, tb: Tensor | None, *_: None) -> Any:
        x, weight, *_ = ctx.saved_tensors
        statistics = formula.statistics(x, ctx.groups, ctx.eps)
        return formula.jvp(tx, tw, tb, x, weight, *statistics, ctx.groups)


class InstanceNorm(GroupNorm):
    """y = w x̂ + b, x̂ = r (x - μ);  dx = r (g - Σ g / n - x̂ Σ g x̂ / n), g = w dy.

    It is group_norm of a group a channel, which autocast does not cast."""

    autocast: dict[str, str] = {}  # noqa: RUF012


class BatchNorm:
    """y = w x̂ + b, x̂ = r (x - μ);  dx = w r (dy - db / n - x̂ dw / n), dw = Σ dy x̂, db = Σ dy.

    μ and the unbiased variance are outputs too, without a gradient."""

    forward_op, backward_op = primitives.batch_forward, primitives.batch_backward
    has_statistics, outputs = True, 3

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight, _, ctx.eps = inputs
        _, mean, _, rstd = output
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(x, weight, mean, rstd)

    @staticmethod
    def backward(run: Any, ctx: Any, dy: Tensor, *_: None) -> Any:
        x, weight, *statistics = ctx.saved_tensors
        if ctx.is_differentiated:
            statistics = formula.statistics(x, 0, ctx.eps)
        return run(dy, x, weight, *statistics, *ctx.needs_input_grad[:3])

    @staticmethod
    def jvp(ctx: Any, tx: Tensor | None, tw: Tensor | None, tb: Tensor | None, *_: None) -> Any:
        x, weight, *_ = ctx.saved_tensors
        ty = formula.jvp(tx, tw, tb, x, weight, *formula.statistics(x, 0, ctx.eps), 0)
        return ty, None, None


class FrozenNorm:
    """y = w x̂ + b, x̂ = r (x - μ) of constant μ and r;  dx = w r dy, dw = Σ dy x̂, db = Σ dy."""

    forward_op, backward_op = primitives.frozen_forward, primitives.frozen_backward

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, y: Tensor) -> None:
        x, weight, _, mean, variance, ctx.eps = inputs
        ctx.save_for_backward(x, weight, mean, variance)

    @staticmethod
    def backward(run: Any, ctx: Any, dy: Tensor) -> Any:
        return run(dy, *ctx.saved_tensors, ctx.eps, *ctx.needs_input_grad[:3])

    @staticmethod
    def jvp(ctx: Any, tx: Tensor | None, tw: Tensor | None, tb: Tensor | None, *_: None) -> Any:
        x, weight, mean, variance = ctx.saved_tensors
        statistics = formula.constants(mean, variance, ctx.eps)
        return formula.jvp(tx, tw, tb, x, weight, *statistics, 0, constant=True)


#: group_norm(x, weight, bias, groups, eps) of x (N, C, *)
group_norm = op(GroupNorm)
instance_norm = op(InstanceNorm)
#: batch_norm(x, weight, bias, eps): y, μ and the unbiased variance
batch_norm = op(BatchNorm)
#: frozen_norm(x, weight, bias, mean, variance, eps)
frozen_norm = op(FrozenNorm)

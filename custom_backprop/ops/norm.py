"""Autograd of layer_norm and rms_norm. Saved are x and a row's statistics, not x̂."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends import norm as primitives
from ..formulas import norm as formula
from .route import op


class Norm:
    """y = w x̂ + b, x̂ = r (x - μ);  dx = r (g - Σ g / n - x̂ Σ g x̂ / n), g = w dy, dw = Σ dy x̂,
    db = Σ dy; of rms_norm without μ and Σ g / n."""

    forward_op, backward_op = primitives.forward, primitives.backward
    has_statistics = True
    autocast = {"cuda": "float32"}  # noqa: RUF012

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight, _, ctx.eps, ctx.kind = inputs
        ctx.save_for_backward(x, weight, *output[1:])

    @staticmethod
    def backward(run: Any, ctx: Any, dy: Tensor) -> Any:
        x, weight, *statistics = ctx.saved_tensors
        if ctx.is_differentiated:
            statistics = formula.statistics(x, ctx.eps, ctx.kind)
        return run(dy, x, weight, *statistics, ctx.kind, *ctx.needs_input_grad[:3])

    @staticmethod
    def jvp(ctx: Any, tx: Tensor | None, tw: Tensor | None, tb: Tensor | None, *_: None) -> Any:
        """ty = w ∂x̂/∂x tx + x̂ tw + tb."""
        x, weight, *_ = ctx.saved_tensors
        mean, rstd = formula.statistics(x, ctx.eps, ctx.kind)
        unit = formula.unit(x, mean, rstd)
        ty = torch.zeros_like(unit) if tx is None else formula.jacobian(tx, unit, rstd, ctx.kind)
        ty = ty if weight is None else ty * formula.factor(weight, ctx.kind)
        ty = ty if tw is None else ty + unit * tw
        return ty if tb is None else ty + tb


#: norm(x, weight, bias, eps, kind) of x (..., n)
norm = op(Norm)

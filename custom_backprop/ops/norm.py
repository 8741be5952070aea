"""Autograd of layer_norm and rms_norm. Saved are x and a row's statistics, not x̂."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends import norm as primitives
from ..formulas import norm as formula
from .route import op


class LayerNorm:
    """y = w x̂ + b, x̂ = r (x - μ);  dx = r (g - Σ g / n - x̂ Σ g x̂ / n), g = w dy, dw = Σ dy x̂,
    db = Σ dy."""

    forward_op, backward_op = primitives.layer_norm, primitives.layer_norm_backward
    has_statistics = True
    autocast = {"cuda": "float32"}  # noqa: RUF012

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight, _, ctx.eps = inputs
        ctx.save_for_backward(x, weight, *output[1:])

    @staticmethod
    def backward(run: Any, ctx: Any, dy: Tensor) -> Any:
        x, weight, *statistics = ctx.saved_tensors
        if ctx.is_differentiated:
            statistics = formula.layer_norm_statistics(x, ctx.eps)
        return run(dy, x, weight, *statistics, *ctx.needs_input_grad[:3])

    @staticmethod
    def jvp(ctx: Any, tx: Tensor | None, tw: Tensor | None, tb: Tensor | None, _: None) -> Any:
        x, weight, *_ = ctx.saved_tensors
        mean, rstd = formula.layer_norm_statistics(x, ctx.eps)
        unit = (x - mean.unsqueeze(-1)) * rstd.unsqueeze(-1)
        ty = None if tx is None else formula.layer_norm_project(tx, unit, rstd)
        return _tangent(unit, ty, weight, tw, tb)


class RMSNorm:
    """y = w x̂, x̂ = r x;  dx = r (g - x̂ Σ g x̂ / n), g = w dy, dw = Σ dy x̂."""

    forward_op, backward_op = primitives.rms_norm, primitives.rms_norm_backward
    has_statistics = True
    autocast = {"cuda": "float32"}  # noqa: RUF012

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight, ctx.eps, ctx.casting = inputs
        ctx.save_for_backward(x, weight, output[1])

    @staticmethod
    def backward(run: Any, ctx: Any, dy: Tensor) -> Any:
        x, weight, rstd = ctx.saved_tensors
        if ctx.is_differentiated:
            rstd = formula.rms_norm_statistics(x, ctx.eps)
        return run(dy, x, weight, rstd, ctx.casting, *ctx.needs_input_grad[:2])

    @staticmethod
    def jvp(ctx: Any, tx: Tensor | None, tw: Tensor | None, *_: None) -> Any:
        x, weight, _ = ctx.saved_tensors
        rstd = formula.rms_norm_statistics(x, ctx.eps)
        unit = x * rstd.unsqueeze(-1)
        ty = None if tx is None else formula.rms_norm_project(tx, unit, rstd)
        return _tangent(unit, ty, formula.factor(weight, ctx.casting), tw, None)


def _tangent(unit: Tensor, *tangents: Tensor | None) -> Tensor:
    """ty = w tx̂ + x̂ tw + tb."""
    t_unit, weight, tw, tb = tangents
    ty = torch.zeros_like(unit) if t_unit is None else t_unit
    ty = ty if weight is None else ty * weight
    ty = ty if tw is None else ty + unit * tw
    return ty if tb is None else ty + tb


#: layer_norm(x, weight, bias, eps) and rms_norm(x, weight, eps, casting), of x (..., n)
layer_norm, rms_norm = op(LayerNorm), op(RMSNorm)

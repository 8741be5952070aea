"""Autograd of layer_norm and rms_norm, also of a sum. Saved are x and a row's statistics, not x̂."""

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
        x, weight, *_ = ctx.saved_tensors
        return formula.norm_jvp(tx, tw, tb, x, weight, ctx.eps, ctx.kind)


class AddNorm:
    """y = w ĥ + b, ĥ = r (h - μ), h = x + a;  dx = da = r (g - Σ g / n - ĥ Σ g ĥ / n) + dh, g = w
    dy, dw = Σ dy ĥ, db = Σ dy; of rms_norm without μ and Σ g / n.

    Saved is h."""

    forward_op, backward_op = primitives.add_forward, primitives.add_backward
    has_statistics, outputs = True, 2

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, _, weight, _, ctx.eps, ctx.kind = inputs
        ctx.save_for_backward(output[1], weight, *output[2:])

    @staticmethod
    def backward(run: Any, ctx: Any, dy: Tensor | None, dh: Tensor | None) -> Any:
        need_x, need_residual, *needs = ctx.needs_input_grad[:4]
        if dy is None:
            return dh, dh, None, None
        h, weight, *statistics = ctx.saved_tensors
        if ctx.is_differentiated:
            statistics = formula.statistics(h, ctx.eps, ctx.kind)
        needs = need_x or need_residual, *needs
        dx, dw, db = run(dy, dh, h, weight, *statistics, ctx.kind, *needs)
        return dx, dx, dw, db  # one tensor for both, as of torch's own sum

    @staticmethod
    def jvp(ctx: Any, tx: Any, ta: Any, tw: Any, tb: Any, *_: None) -> Any:
        h, weight, *_ = ctx.saved_tensors
        given = [t for t in (tx, ta) if t is not None]
        th = sum(given[1:], given[0]) if given else torch.zeros_like(h)
        return formula.norm_jvp(th, tw, tb, h, weight, ctx.eps, ctx.kind), th


#: norm(x, weight, bias, eps, kind) of x (..., n)
norm = op(Norm)
#: add_norm(x, residual, weight, bias, eps, kind): y and h
add_norm = op(AddNorm)

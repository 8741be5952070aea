"""Autograd of the triplet margin and of InfoNCE."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends import contrastive as primitives
from ..backends.selection import is_transformed
from ..formulas import contrastive as formula
from ..formulas.loss import NONE
from .route import FLOAT32, op


class Triplet:
    """L = max(0, m + d_ap - d_an);  da = dy (u_ap - u_an), dp = -dy u_ap, dn = dy u_an where L > 0,
    u = ∂d/∂x."""

    forward_op, backward_op = primitives.triplet_forward, primitives.triplet_backward
    has_statistics = True
    autocast = FLOAT32

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.options = inputs[3:]
        ctx.save_for_backward(*inputs[:3], output[1])

    @staticmethod
    def backward(run: Any, ctx: Any, dy: Tensor) -> Any:
        *tensors, d = ctx.saved_tensors
        if ctx.is_differentiated:
            d = formula.distances(*tensors, *ctx.options[1:4])
        return run(dy, *tensors, d, *ctx.options, ctx.needs_input_grad[:3])

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        *tensors, _ = ctx.saved_tensors
        return formula.triplet_jvp(tangents[:3], *tensors, *ctx.options)


class InfoNCE:
    """L_i = -log softmax(s_i)_t, s = q kᵀ / τ;  G = (softmax(s) - I) / τ, dq = dy G k, dk = Gᵀ (dy
    q)."""

    forward_op, backward_op = primitives.info_nce, primitives.info_nce_backward
    has_statistics = True
    autocast = FLOAT32

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, temperature, symmetric, reduction, makes_G = inputs
        ctx.options = temperature, symmetric, reduction
        ctx.save_for_backward(*tensors, output[1] if makes_G else None)

    @staticmethod
    def backward(run: Any, ctx: Any, dy: Tensor) -> Any:
        *tensors, G = ctx.saved_tensors
        reduction = ctx.options[2]
        if G is None or ctx.is_differentiated:
            G = formula.slope_of(*tensors, *ctx.options[:2])
        return run(dy, *tensors, G, reduction, ctx.needs_input_grad[:3])

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        *tensors, _ = ctx.saved_tensors
        return formula.info_nce_jvp(tangents[:3], *tensors, *ctx.options)


triplet = op(Triplet)
_info_nce = op(InfoNCE)


def info_nce(
    q: Tensor, k: Tensor, n: Tensor | None, temperature: float, symmetric: bool, reduction: int
) -> Tensor:
    """The loss of rows q (N, D) and k (N, D), with negatives n (M, D) or (N, M, D) or, for None,
    the other rows of k.

    G, one number per pair, is computed in forward and saved instead of the similarities.
    """
    if symmetric and reduction == NONE:  # G of the sum does not give those of each row
        both = (info_nce(*pair, n, temperature, False, NONE) for pair in ((q, k), (k, q)))
        return sum(both) / 2  # type: ignore[return-value]
    wanted = any(t is not None and t.requires_grad for t in (q, k, n))
    makes_G = torch.is_grad_enabled() and wanted and not is_transformed()
    return _info_nce(q, k, n, temperature, symmetric, reduction, makes_G)

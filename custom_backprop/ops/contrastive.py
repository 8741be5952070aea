"""Autograd of the triplet margin, of InfoNCE and of the division by the norm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..backends import contrastive as primitives
from ..formulas import contrastive as formula
from ..formulas.loss import NONE
from .function import differentiable, differentiated, wanted


class Triplet:
    """L = max(0, m + d_ap - d_an);  da = dy (u_ap - u_an), dp = -dy u_ap, dn = dy u_an where L > 0,
    u = ∂d/∂x."""

    @staticmethod
    def forward(
        a: Tensor,
        p: Tensor,
        n: Tensor,
        margin: float,
        order: float,
        eps: float,
        swap: bool,
        reduction: int,
    ) -> tuple[Tensor, Tensor]:
        return primitives.triplet_forward(a, p, n, margin, order, eps, swap, reduction)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.margin, ctx.order, ctx.eps, ctx.swap, ctx.reduction = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, output[1])
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> Any:
        if dy is None:
            return (None,) * 8
        a, p, n, d = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        options = ctx.margin, ctx.order, ctx.eps, ctx.swap, ctx.reduction
        if differentiated():
            d = formula.distances(a, p, n, ctx.order, ctx.eps, ctx.swap)
            grads = formula.triplet_backward(dy, a, p, n, d, *options, needs)
        else:
            grads = primitives.triplet_backward(dy, a, p, n, d, *options, needs)
        return *wanted(needs, grads), None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        a, p, n = ctx.saved_tensors[:3]
        return formula.triplet_jvp(
            tangents[:3], a, p, n, ctx.margin, ctx.order, ctx.eps, ctx.swap, ctx.reduction
        )


class InfoNCE:
    """L_i = -log softmax(s_i)_t, s = q kᵀ / τ;  G = (softmax(s) - I) / τ, dq = dy G k, dk = Gᵀ (dy
    q)."""

    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        n: Tensor | None,
        temperature: float,
        symmetric: bool,
        reduction: int,
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        return primitives.info_nce(q, k, n, temperature, symmetric, reduction, keep)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        q, k, n, *ctx.options, ctx.keep = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, n, output[1] if ctx.keep else None)
        ctx.save_for_forward(q, k, n)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> Any:
        if dy is None:
            return (None,) * 7
        q, k, n, G = ctx.saved_tensors
        temperature, symmetric, reduction = ctx.options
        if differentiated() or G is None:
            s = formula.logits(formula.widen(q), formula.widen(k), formula.widen(n), temperature)
            G = formula.slope(s, n is None, symmetric) / temperature
        return (
            *formula.info_nce_gradients(dy, q, k, n, G, reduction, ctx.needs_input_grad[:3]),
            None,
            None,
            None,
            None,
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return formula.info_nce_jvp(tangents[:3], *ctx.saved_tensors[:3], *ctx.options)


class Unit:
    """y = x / r, r = max(‖x‖, ε);  dx = (dy - y Σ y dy) / r."""

    @staticmethod
    def forward(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return primitives.unit_forward(x, eps)

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Tensor, float], output: tuple[Tensor, Tensor]
    ) -> None:
        x, ctx.eps = inputs
        y, r = output
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, y, r)
        ctx.save_for_forward(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> Any:
        if dy is None:
            return None, None
        x, y, r = ctx.saved_tensors
        if differentiated():
            return formula.unit_backward(dy, *formula.unit(x, ctx.eps), ctx.eps), None
        return primitives.unit_backward(dy, y, r, ctx.eps), None

    @staticmethod
    def jvp(ctx: Any, tx: Tensor, _: None) -> Tensor:
        (x, *_rest) = ctx.saved_tensors
        return formula.unit_backward(
            tx, *formula.unit(x, ctx.eps), ctx.eps
        )  # the Jacobian is symmetric


triplet = differentiable(autocast_cpu="float32", autocast_cuda="float32", keeps=True)(Triplet)
unit = differentiable(autocast_cpu="float32", autocast_cuda="float32", keeps=True)(Unit)
_info_nce = differentiable(autocast_cpu="float32", autocast_cuda="float32", keeps=True)(InfoNCE)


def info_nce(
    q: Tensor, k: Tensor, n: Tensor | None, temperature: float, symmetric: bool, reduction: int
) -> Tensor:
    """The loss of rows q (N, D) and k (N, D), with negatives n (M, D) or (N, M, D) or, for None,
    the other rows of k.

    G, of a number for each pair, is made in forward and kept, in the place of the similarities that
    it is made of.
    """
    if symmetric and reduction == NONE:  # G of the sum says nothing of each
        return (
            info_nce(q, k, n, temperature, False, NONE)
            + info_nce(k, q, n, temperature, False, NONE)
        ) / 2
    return _info_nce(q, k, n, temperature, symmetric, reduction, _keeps(q, k, n))


def _keeps(*tensors: Tensor | None) -> bool:
    """Whether an ordinary backward may follow: torch.func's transformations differentiate it again,
    and take the formula."""
    if not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in tensors):
        return False
    return torch.compiler.is_compiling() or not (
        torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    )

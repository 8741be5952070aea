"""Autograd of linear_cross_entropy, on x (N, H), a layer's weight (C, H) or (C, D, H), and a target
of floating-point numbers (probabilities) or of int64 (classes)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..backends import linear_cross_entropy as primitives
from ..formulas import linear_cross_entropy as formula
from ..formulas.loss import NONE
from .gradient import is_made_in_forward, scaled
from .route import OWN, op


class LinearCrossEntropy:
    """L_r = Σ_c q_rc (lse_r - l_rc), l = x Wᵀ + b;  dl = dy (p Q - q), dx = dl W, dW = dlᵀ x, db =
    Σ_rows dl."""

    forward_op, backward_op = primitives.forward, primitives.backward
    has_statistics = True
    autocast = OWN

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.options, (ctx.log_probs, _, ctx.makes) = inputs[6:-3], inputs[-3:]
        made = (g if make else None for g, make in zip(output[3:], ctx.makes, strict=True))
        ctx.save_for_backward(*inputs[:6], *made)

    @staticmethod
    def backward(run: Any, ctx: Any, dy: Tensor) -> Any:
        saved = ctx.saved_tensors
        if any(ctx.makes) and not ctx.is_differentiated:
            dx, dw, db = (None if g is None else scaled(ctx, g, dy) for g in saved[6:])
            return dx, dw, None, db
        return run(*saved[:6], dy, None, None, *ctx.options, ctx.needs_input_grad[:4])

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return formula.jvp(tangents[:4], ctx.saved_tensors[:6], False, *ctx.options)[0]


class LinearCrossEntropyInParts(LinearCrossEntropy):
    """L_r = Σ_c q_rc (lse_r - l_rc), the z-loss in it, and log p_rt;  dx = dl W, dW = dlᵀ x, db =
    Σ_rows dl, where dl is the sum of those of the three.

    The same as :class:`LinearCrossEntropy`, with two more outputs."""

    outputs = 3

    @staticmethod
    def backward(run: Any, ctx: Any, *dys: Tensor | None) -> Any:
        dy, dz, dlog_p = dys
        given = dy, dz, dlog_p if ctx.log_probs else None
        return run(*ctx.saved_tensors[:6], *given, *ctx.options, ctx.needs_input_grad[:4])

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return formula.jvp(tangents[:4], ctx.saved_tensors[:6], ctx.log_probs, *ctx.options)


_linear_cross_entropy = op(LinearCrossEntropy)
_in_parts = op(LinearCrossEntropyInParts)


def linear_cross_entropy(
    x: Tensor, linear_weight: Tensor, target: Tensor, bias: Tensor | None, in_parts: bool,
    *rest: Any,
) -> Any:  # fmt: skip
    """The loss; ``in_parts`` the z-loss and log p_rt too. The rest, which are ``forward``'s next
    arguments, get no gradient."""
    given = x, linear_weight, target, bias, *rest
    if in_parts:
        return _in_parts(*given, [False] * 3)
    leaves = x, linear_weight, bias
    wanted = [t for t in leaves if t is not None and t.requires_grad]
    scalar = rest[2] != NONE and not target.requires_grad
    if wanted and is_made_in_forward(primitives.forward, wanted[0], scalar):
        makes = [t is not None and t.requires_grad for t in leaves]
    else:
        makes = [False] * 3
    return _linear_cross_entropy(*given, makes)

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
    outputs, has_statistics = 3, True
    autocast = OWN

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.options, (ctx.log_probs, _, ctx.makes) = inputs[6:-3], inputs[-3:]
        made = (g if make else None for g, make in zip(output[3:], ctx.makes, strict=True))
        ctx.save_for_backward(*inputs[:6], *made)

    @staticmethod
    def backward(run: Any, ctx: Any, *dys: Tensor | None) -> Any:
        tensors, made = ctx.saved_tensors[:6], ctx.saved_tensors[6:]
        dy = dys[0] if dys[1:] == (None, None) else None
        if dy is not None and any(ctx.makes) and not ctx.is_differentiated:
            dx, dw, db = (None if g is None else scaled(ctx, g, dy) for g in made)
            return dx, dw, None, db
        return run(*tensors, *dys, *ctx.options, ctx.needs_input_grad[:4])

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        options: Any = (*ctx.options, ctx.log_probs)
        return formula.jvp(tangents[:4], ctx.saved_tensors[:6], *options)


_linear_cross_entropy = op(LinearCrossEntropy)


def linear_cross_entropy(
    x: Tensor, linear_weight: Tensor, target: Tensor, bias: Tensor | None, *rest: Any
) -> Any:
    """The loss, the z-loss in it, and log p_rt if wanted. The rest, which are ``forward``'s next
    arguments, get no gradient."""
    *options, log_probs, dtype = rest
    scalar = options[2] != NONE and not target.requires_grad
    makes = [t is not None and t.requires_grad for t in (x, linear_weight, bias)]
    wanted = [t for t in (x, linear_weight, bias) if t is not None and t.requires_grad]
    if not (wanted and is_made_in_forward(primitives.forward, wanted[0], scalar)):
        makes = [False] * 3
    return _linear_cross_entropy(x, linear_weight, target, bias, *options, log_probs, dtype, makes)

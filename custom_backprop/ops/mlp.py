"""Autograd of the gated MLP. Saved are x and the two products a and b, not f(a) nor f(a) b; with
``recompute`` only x."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..backends import mlp as primitives
from ..formulas import mlp as formula
from .route import LOWER, op


class GatedMLP:
    """y = (f(a) b) Wdᵀ, a = x Wgᵀ, b = x Wuᵀ;  dh = dy Wd, da = dh b f'(a), db = dh f(a),
    dx = da Wg + db Wu, dWg = daᵀ x, dWu = dbᵀ x, dWd = dyᵀ (f(a) b)."""

    forward_op, backward_op = primitives.forward, primitives.backward
    has_statistics = True
    autocast = LOWER

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        recompute = inputs[8]
        # the last bias does not matter to backward
        ctx.save_for_backward(*inputs[:6], *((None, None) if recompute else output[1:]))
        ctx.f = inputs[7]

    @staticmethod
    def backward(run: Any, ctx: Any, dy: Tensor) -> Any:
        *inputs, a, b = ctx.saved_tensors
        if ctx.is_differentiated:
            a = b = None
        return run(dy, *inputs, a, b, ctx.f, list(ctx.needs_input_grad[:7]))

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        return formula.mlp_jvp(*ctx.saved_tensors[:6], ctx.f, *tangents[:7])


#: gated_mlp(x, gate_weight, up_weight, down_weight, gate_bias, up_bias, down_bias, f, recompute)
gated_mlp = op(GatedMLP)

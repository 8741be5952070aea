"""Autograd of attention. Saved are q, k, v, y and one number a row: no matrix of scores, nor of
dropout, which a seed makes again."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..backends import attention as primitives
from ..formulas import attention as formula
from .route import LOWER, op


class Attention:
    """y = P v, P = softmax(c q kᵀ + b);  ds = P (dy vᵀ - dy · y), dq = c ds k, dk = c dsᵀ q,
    dv = Pᵀ dy, db = ds."""

    forward_op, backward_op = primitives.forward, primitives.backward
    has_statistics = True
    autocast = LOWER

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs[:6], *output)
        ctx.options = inputs[6:]

    @staticmethod
    def backward(run: Any, ctx: Any, dy: Tensor) -> Any:
        return run(dy, *ctx.saved_tensors, *ctx.options, *ctx.needs_input_grad[:4])

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        *inputs, _, _ = ctx.saved_tensors
        return formula.attention_jvp(tangents[:4], *inputs, *ctx.options)


#: attention(q, k, v, mask, slopes, seed, p, lowest, highest, scale): see formulas/attention.py
attention = op(Attention)

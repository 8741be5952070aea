"""Autograd of dropout. Saved is the seed: backward makes the mask again."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..backends import dropout as primitives
from ..formulas import dropout as formula
from .route import op


class Dropout:
    """y = r + m a x + b;  dx = m a dy, dr = dy, with the mask m of a seed."""

    forward_op, backward_op = primitives.forward, primitives.backward

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, y: Tensor) -> None:
        x, residual, seed = inputs[:3]
        ctx.save_for_backward(seed)
        ctx.options = inputs[3:]
        ctx.dtypes = x.dtype, None if residual is None else residual.dtype

    @staticmethod
    def backward(run: Any, ctx: Any, dy: Tensor) -> Any:
        need_x, need_residual, *_ = ctx.needs_input_grad
        of_x, of_residual = ctx.dtypes
        dx = run(dy, *ctx.saved_tensors, *ctx.options, of_x) if need_x else None
        return dx, dy.to(of_residual, copy=True) if need_residual else None

    @staticmethod
    def jvp(ctx: Any, tx: Tensor | None, tr: Tensor | None, *_: None) -> Any:
        if tx is None:
            return tr
        (seed,), (p, alpha, features, philox) = ctx.saved_tensors, ctx.options
        ty = formula.dropout_backward(tx, seed, p, alpha, features, philox, tx.dtype)
        return ty if tr is None else ty + tr


#: dropout(x, residual, seed, p, alpha, features, philox)
dropout = op(Dropout)

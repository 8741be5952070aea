"""Autograd of the division of a vector by its norm."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..backends import normalize as primitives
from ..formulas import normalize as formula
from .route import FLOAT32, op


class Normalize:
    """y = x / r, r = max(‖x‖, ε);  dx = (dy - y Σ y dy) / r."""

    forward_op, backward_op = primitives.forward, primitives.backward
    has_statistics = True
    autocast = FLOAT32

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, ctx.eps = inputs
        ctx.save_for_backward(x, *output)

    @staticmethod
    def backward(run: Any, ctx: Any, dy: Tensor) -> Any:
        x, y, r = ctx.saved_tensors
        if ctx.is_differentiated:
            y, r = formula.normalize(x, ctx.eps)
        return run(dy, y, r, ctx.eps)

    @staticmethod
    def jvp(ctx: Any, tx: Tensor, _: None) -> Tensor:
        x, *_ = ctx.saved_tensors
        # the Jacobian is symmetric
        return formula.normalize_backward(tx, *formula.normalize(x, ctx.eps), ctx.eps)


#: normalize(x, eps), along the last dimension
normalize = op(Normalize)

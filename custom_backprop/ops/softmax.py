"""Autograd of the softmaxes. Saved is y alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..backends.softmax import primitives, stock_of
from ..formulas.softmax import SOFTMAXES, Softmax
from .route import op


def _define(s: Softmax) -> Callable[..., Tensor]:
    class Definition:
        forward_op, backward_op = primitives[s.name]

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, y: Tensor) -> None:
            ctx.save_for_backward(y)
            ctx.dim, ctx.dtype = inputs[1], inputs[0].dtype

        @staticmethod
        def backward(run: Any, ctx: Any, dy: Tensor) -> Tensor:
            return run(dy, *ctx.saved_tensors, ctx.dim, ctx.dtype)

        @staticmethod
        def jvp(ctx: Any, tx: Tensor, *_: None) -> Tensor:
            (y,) = ctx.saved_tensors
            return s.jvp(tx.to(y.dtype), y, ctx.dim)

    Definition.__name__, Definition.__doc__ = s.name, s.formula
    return op(Definition, stock=stock_of(s.name))


#: name -> op(x, dim, dtype)
softmaxes = {s.name: _define(s) for s in SOFTMAXES.values()}

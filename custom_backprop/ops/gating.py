"""Autograd of the gates. Saved are a and b, not f(a)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..backends import gating as primitives
from ..formulas import gating as formula
from .route import op


class Gate:
    """y = f(a) b;  da = dy b f'(a), db = dy f(a)."""

    forward_op, backward_op = primitives.forward, primitives.backward

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, y: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.options = inputs[2:]

    @staticmethod
    def backward(run: Any, ctx: Any, dy: Tensor) -> Any:
        return run(dy, *ctx.saved_tensors, *ctx.options, *ctx.needs_input_grad[:2])

    @staticmethod
    def jvp(ctx: Any, tx: Tensor | None, tb: Tensor | None, *_: None) -> Any:
        x, b = ctx.saved_tensors
        *where, f = ctx.options
        a, value = formula.halves(x, b, *where)
        if b is None and tx is not None:
            tx, tb = formula.halves(tx, None, *where)
        y, derivative = formula.factors(a, f)
        terms = [t * k for t, k in ((tx, derivative * value), (tb, y)) if t is not None]
        return sum(terms[1:], terms[0])


#: gate(x, b, dim, gate_first, f): of a = x and b, or of the halves of x along dim
gate = op(Gate)

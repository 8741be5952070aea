"""Autograd of the parametric ReLU."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..backends import prelu as primitives
from ..formulas.prelu import prelu_jvp
from .route import LOWER, op


class PReLU:
    """y = x [x > 0] + w x [x <= 0];  dx = dy ([x > 0] + w [x <= 0]), dw_c = Σ dy x [x <= 0]."""

    forward_op, backward_op = primitives.forward, primitives.backward
    autocast = LOWER

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, y: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(run: Any, ctx: Any, dy: Tensor) -> Any:
        return run(dy, *ctx.saved_tensors, *ctx.needs_input_grad[:2])

    @staticmethod
    def jvp(ctx: Any, tx: Tensor | None, tw: Tensor | None) -> Tensor | None:
        x, weight = ctx.saved_tensors
        return prelu_jvp(x, weight, tx, tw)


prelu = op(PReLU)

"""Autograd of nll_loss, on x (N, C) or (N, C, D) and classes in int64."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..backends import nll as primitives
from ..formulas.nll import nll_forward
from .route import FLOAT32, op


class NLLLoss:
    """L_r = -w_t x_rt;  dx_rc = -w_t dy_r [c = t]."""

    forward_op, backward_op = primitives.forward, primitives.backward
    has_statistics = True
    autocast = FLOAT32

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, target, weight, *ctx.options = inputs
        ctx.save_for_backward(x, target, weight, output[1])

    @staticmethod
    def backward(run: Any, ctx: Any, dy: Tensor) -> Any:
        return run(dy, *ctx.saved_tensors, *ctx.options)

    @staticmethod
    def jvp(ctx: Any, tx: Tensor, *_: None) -> Any:
        _, target, weight, _ = ctx.saved_tensors
        return nll_forward(tx, target, weight, *ctx.options)[0]


#: nll_loss(x, target, weight, reduction, ignore_index), of log-probabilities x
nll_loss = op(NLLLoss)

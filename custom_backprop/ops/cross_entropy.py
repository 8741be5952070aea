"""Autograd of cross_entropy, on x (N, C) or (N, C, D) and a target of its dtype (probabilities) or
of int64 (classes)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends import cross_entropy as primitives
from ..formulas import cross_entropy as formula
from ..formulas.cross_entropy import GRADIENT, NOTHING, STATISTICS
from ..formulas.loss import NONE
from .gradient import is_made_in_forward, scaled
from .route import FLOAT32, op


class CrossEntropy:
    """L_r = Σ_c q_rc (lse_r - x_rc);  dx = dy (p Q - q)."""

    forward_op, backward_op = primitives.forward, primitives.backward
    has_statistics = True
    autocast = FLOAT32

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, target, weight, *ctx.options, ctx.made = inputs
        ctx.save_for_backward(x, target, weight, output[1])

    @staticmethod
    def backward(run: Any, ctx: Any, dy: Tensor) -> Any:
        *tensors, statistics = ctx.saved_tensors
        if ctx.made == GRADIENT and not ctx.is_differentiated:
            return scaled(ctx, statistics, dy)
        return run(dy, *tensors, statistics, *ctx.options, *ctx.needs_input_grad[:2])

    @staticmethod
    def jvp(ctx: Any, tx: Tensor | None, ttarget: Tensor | None, *_: None) -> Any:
        x, target, weight, _ = ctx.saved_tensors
        reduction, ignore_index, smoothing = ctx.options
        return formula.jvp(x, target, weight, reduction, ignore_index, smoothing, tx, ttarget)


_cross_entropy = op(CrossEntropy)


def cross_entropy(
    x: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int,
    smoothing: float,
) -> Tensor:  # fmt: skip
    """The loss of logits x. The weight gets no gradient."""
    makes = NOTHING
    if torch.is_grad_enabled() and (x.requires_grad or target.requires_grad):
        scalar = reduction != NONE and not target.requires_grad
        makes = GRADIENT if is_made_in_forward(primitives.forward, x, scalar) else STATISTICS
    return _cross_entropy(x, target, weight, reduction, ignore_index, smoothing, makes)

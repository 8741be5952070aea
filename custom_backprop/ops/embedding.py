"""Autograd of embedding. Saved are the indices, not the weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends import embedding as primitives
from ..formulas import embedding as formula
from .route import op


class Embedding:
    """y_r = W_t;  dW_v = Σ dy_r [t = v]."""

    forward_op, backward_op = primitives.forward, primitives.backward

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, y: Tensor) -> None:
        weight, index, *ctx.options, ctx.sparse = inputs
        ctx.save_for_backward(index)
        ctx.rows = weight.shape[0]

    @staticmethod
    def backward(run: Any, ctx: Any, dy: Tensor) -> Tensor:
        (index,) = ctx.saved_tensors
        if ctx.sparse:
            return formula.sparse_gradient(dy, index, ctx.rows, ctx.options[0])
        return run(dy, index, ctx.rows, *ctx.options)

    @staticmethod
    def jvp(ctx: Any, tw: Tensor, *_: None) -> Tensor:
        (index,) = ctx.saved_tensors
        return formula.embedding(tw, index, -1, False, False)


#: embedding(weight, index, padding_idx, scale_grad_by_freq, sparse)
embedding = op(Embedding, stock=torch.embedding)

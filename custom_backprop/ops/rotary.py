"""Autograd of rotary_embedding. Saved are the tables and the positions, not x."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..backends.rotary import rotate
from ..formulas import rotary as formula
from .route import op


class RotaryEmbedding:
    """y = R(φ) x;  dx = R(-φ) dy, where R(φ) turns each pair of numbers by its angle φ."""

    forward_op = backward_op = rotate

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, y: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:4])
        ctx.options = inputs[4:6]

    @staticmethod
    def backward(run: Any, ctx: Any, dy: Tensor) -> Tensor:
        return run(dy, *ctx.saved_tensors, *ctx.options, True)

    @staticmethod
    def jvp(ctx: Any, tx: Tensor, tcos: Tensor | None, tsin: Tensor | None, *_: None) -> Tensor:
        if tcos is not None or tsin is not None:
            raise RuntimeError("rotary_embedding is not differentiable with respect to cos and sin")
        return formula.rotate(tx, *ctx.saved_tensors, *ctx.options)


#: rotary_embedding(x, cos, sin, positions, offset, interleaved, inverse=False), where x has at most
#: four dimensions
rotary_embedding = op(RotaryEmbedding)

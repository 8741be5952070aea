"""Autograd of the division of a vector by its norm. Saved are x and the norms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends import normalize as primitives
from ..formulas import normalize as formula
from .route import op


class Normalize:
    """y = x / r, r = max(‖x‖, ε);  dx = (dy - y Σ y dy) / r."""

    forward_op, backward_op = primitives.forward, primitives.backward
    has_statistics = True
    autocast = {"cuda": "float32"}  # noqa: RUF012

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, ctx.eps = inputs
        ctx.save_for_backward(x, output[1])

    @staticmethod
    def backward(run: Any, ctx: Any, dy: Tensor) -> Any:
        x, r = ctx.saved_tensors
        if ctx.is_differentiated:
            r = formula.norm(x, ctx.eps)
        return run(dy, x, r, ctx.eps)

    @staticmethod
    def jvp(ctx: Any, tx: Tensor, _: None) -> Tensor:
        x, _ = ctx.saved_tensors
        # the Jacobian is symmetric
        return formula.normalize_backward(tx, x, formula.norm(x, ctx.eps), ctx.eps)


def _stock(x: Tensor, eps: float) -> Tensor:
    return torch.nn.functional.normalize(x, 2.0, -1, eps)


#: normalize(x, eps), along the last dimension
normalize = op(Normalize, _stock)

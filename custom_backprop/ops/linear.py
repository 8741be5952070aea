"""Autograd of the linear layer, plain and with an activation in the same Function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends import linear as primitives
from ..formulas import linear as formula
from ..formulas.activation import ACTIVATIONS
from .activation import stock_of
from .route import LOWER, op

_product = torch.nn.functional.linear


class Linear:
    """y = x Wᵀ + b;  dx = dy W, dW = dyᵀ x, db = Σ_rows dy."""

    forward_op, backward_op = primitives.forward, primitives.backward
    autocast = LOWER

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, y: Tensor) -> None:
        need_x, need_weight = ctx.needs_input_grad[:2]
        # dx needs the weight, dW the input
        ctx.save_for_backward(inputs[0] if need_weight else None, inputs[1] if need_x else None)

    @staticmethod
    def backward(run: Any, ctx: Any, dy: Tensor) -> Any:
        return run(dy, *ctx.saved_tensors, *ctx.needs_input_grad[:3])

    @staticmethod
    def jvp(ctx: Any, tx: Tensor | None, tw: Tensor | None, tb: Tensor | None) -> Tensor | None:
        x, weight = ctx.saved_tensors
        return formula.linear_jvp(x, weight, tx, tw, tb)


class LinearActivation:
    """y = f(z), z = x Wᵀ + b;  dz = dy f'(z), dx = dz W, dW = dzᵀ x, db = Σ_rows dz.

    It saves y if f' is written with y, else z.
    """

    forward_op, backward_op = primitives.activation_forward, primitives.activation_backward
    has_statistics = True
    autocast = LOWER

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight, bias, *ctx.function = inputs
        y, z = output
        if ACTIVATIONS[ctx.function[0]].saves_output:
            ctx.save_for_backward(x, weight, None, y)
        else:
            ctx.save_for_backward(x, weight, bias, z)  # the bias is needed to compute z again

    @staticmethod
    def backward(run: Any, ctx: Any, dy: Tensor) -> Any:
        x, weight, bias, saved = ctx.saved_tensors
        if ctx.is_differentiated:
            saved = formula.saved_for(ctx.function[0], x, weight, bias, saved)
        return run(dy, x, weight, saved, *ctx.function, *ctx.needs_input_grad[:3])

    @staticmethod
    def jvp(ctx: Any, tx: Tensor | None, tw: Tensor | None, tb: Tensor | None, *_: None) -> Any:
        x, weight, bias, saved = ctx.saved_tensors
        tz = formula.linear_jvp(x, weight, tx, tw, tb)
        name, parameters = ctx.function
        saved = formula.saved_for(name, x, weight, bias, saved)
        return None if tz is None else ACTIVATIONS[name].backward(tz, saved, *parameters)


linear = op(Linear, stock=_product)
#: linear_activation(x, weight, bias, activation, parameters)
linear_activation = op(
    LinearActivation,
    stock=lambda x, w, b, name, parameters: stock_of(name)(_product(x, w, b), *parameters),
)

"""Autograd of the activations: y = f(x), dx = dy f'."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..backends.activation import primitives
from ..formulas.activation import ACTIVATIONS, Activation
from .function import differentiable


def _function(a: Activation) -> Callable[..., Tensor]:
    run_forward, run_backward = primitives[a.name]
    derivative, formula_backward, saves_output = a.derivative, a.backward, a.saves_output
    no_gradients = (None,) * len(a.parameters)

    class Definition:
        @staticmethod
        def forward(x: Tensor, *parameters: float) -> Tensor:
            return run_forward(x, *parameters)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            saved = output if saves_output else inputs[0]
            ctx.save_for_backward(saved)
            ctx.save_for_forward(saved)
            ctx.set_materialize_grads(False)
            ctx.parameters = inputs[1:]

        @staticmethod
        def backward(ctx: Any, dy: Tensor | None) -> Any:
            if dy is None:
                return None, *no_gradients
            (saved,) = ctx.saved_tensors
            run = formula_backward if torch.is_grad_enabled() else run_backward
            return run(dy, saved, *ctx.parameters), *no_gradients

        @staticmethod
        def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
            (saved,) = ctx.saved_tensors
            return tangent * derivative(saved, *ctx.parameters)

    Definition.__name__ = a.name
    Definition.__doc__ = a.formula
    return differentiable()(Definition)


#: name -> op(x, *parameters)
activations = {a.name: _function(a) for a in ACTIVATIONS.values()}

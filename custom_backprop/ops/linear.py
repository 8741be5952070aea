"""Autograd of the linear layer, plain and with an activation in the same Function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends import linear as primitives
from ..formulas import linear as formula
from ..formulas.activation import ACTIVATIONS
from .function import differentiable


def check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raises RuntimeError, as stock does, for shapes or dtypes that do not fit."""
    if weight.dim() != 2 or x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise RuntimeError(f"linear: an input of shape {tuple(x.shape)} does not fit a weight of shape {tuple(weight.shape)}")
    if x.dtype != weight.dtype or (bias is not None and bias.dtype != weight.dtype):
        got = f"{x.dtype}, {weight.dtype}" + ("" if bias is None else f", {bias.dtype}")
        raise RuntimeError(f"linear: input, weight and bias must have the same dtype, got {got}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise RuntimeError(f"linear: a bias of shape {tuple(bias.shape)} does not fit a weight of shape {tuple(weight.shape)}")
    if x.is_complex():
        raise NotImplementedError(f"linear has no complex derivative here: got tensors of {x.dtype}")


class Linear:
    """y = x Wᵀ + b;  dx = dy W, dW = dyᵀ x, db = Σ_rows dy."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        check(x, weight, bias)
        return primitives.forward(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _ = inputs
        need_x, need_weight, _ = ctx.needs_input_grad
        # dx needs the weight, dW the input; forward mode asks for both
        ctx.save_for_backward(x if need_weight else None, weight if need_x else None)
        ctx.save_for_forward(x, weight)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> Any:
        if dy is None:
            return None, None, None
        x, weight = ctx.saved_tensors
        return _wanted(ctx.needs_input_grad, formula.linear_backward if torch.is_grad_enabled() else primitives.backward, dy, x, weight)

    @staticmethod
    def jvp(ctx: Any, tx: Tensor | None, tw: Tensor | None, tb: Tensor | None) -> Any:
        x, weight = ctx.saved_tensors
        return formula.linear_jvp(x, weight, tx, tw, tb)


linear = differentiable(autocast_cpu="lower", autocast_cuda="lower")(Linear)


class LinearActivation:
    """y = f(z), z = x Wᵀ + b;  dz = dy f', dx = dz W, dW = dzᵀ x, db = Σ_rows dz."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, parameters: tuple[float, ...]) -> tuple[Tensor, Tensor]:
        check(x, weight, bias)
        return primitives.activation_forward(x, weight, bias, activation, parameters)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, weight, bias, ctx.activation, ctx.parameters = inputs
        y, z = output
        ctx.mark_non_differentiable(z)
        ctx.save_for_backward(x, weight, bias, y if ACTIVATIONS[ctx.activation].saves_output else z)
        ctx.save_for_forward(x, weight, bias, y)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: None) -> Any:
        if dy is None:
            return (None,) * 5
        x, weight, bias, saved = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            saved = formula.saved_for(ctx.activation, x, weight, bias, saved)
            grads = formula.linear_activation_backward(dy, x, weight, saved, ctx.activation, ctx.parameters, *needs)
        else:
            grads = primitives.activation_backward(dy, x, weight, saved, ctx.activation, ctx.parameters, *needs)
        return *(g if need else None for g, need in zip(grads, needs, strict=True)), None, None

    @staticmethod
    def jvp(ctx: Any, tx: Tensor | None, tw: Tensor | None, tb: Tensor | None, *_: None) -> Any:
        x, weight, bias, y = ctx.saved_tensors
        tz = formula.linear_jvp(x, weight, tx, tw, tb)
        saved = formula.saved_for(ctx.activation, x, weight, bias, y)
        return None if tz is None else ACTIVATIONS[ctx.activation].backward(tz, saved, *ctx.parameters), None


_linear_activation = differentiable(autocast_cpu="lower", autocast_cuda="lower")(LinearActivation)


def linear_activation(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, parameters: tuple[float, ...]) -> Tensor:
    """f(x Wᵀ + b) in one Function."""
    return _linear_activation(x, weight, bias, activation, parameters)[0]


def _wanted(needs: tuple[bool, ...], run: Any, dy: Tensor, x: Tensor | None, weight: Tensor | None) -> tuple[Tensor | None, ...]:
    """dx, dW, db of the plain layer. What was not saved is not needed, and any tensor may stand in its place."""
    grads = run(dy, dy if x is None else x, dy if weight is None else weight, *needs)
    return tuple(g if need else None for g, need in zip(grads, needs, strict=True))

"""Autograd of the activations: y = f(x), dx = dy f'."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..backends.activation import primitives
from ..formulas.activation import ACTIVATIONS, Activation
from .function import differentiable

#: activations that torch's autocast computes in float32 on a GPU
_FLOAT32_ON_CUDA = {"softplus"}


def _function(a: Activation) -> Callable[..., Tensor]:
    run_forward, run_backward = primitives[a.name]
    derivative, formula_backward, saves_output = a.derivative, a.backward, a.saves_output
    no_gradients = (None,) * len(a.parameters)

    class Definition:
        @staticmethod
        def forward(x: Tensor, *parameters: float) -> Tensor:
            if x.is_complex():
                raise NotImplementedError(f"{a.name} has no complex derivative here: got a tensor of {x.dtype}")
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
    return differentiable(autocast_cuda="float32" if a.name in _FLOAT32_ON_CUDA else None)(Definition)


def _in_place_function(a: Activation) -> type[torch.autograd.Function]:
    """The same, writing y over x: what backward keeps is y, now in x's memory, or else a copy of x made before."""
    run_forward, run_backward = primitives[a.name]
    formula_backward, saves_output = a.backward, a.saves_output

    class InPlace(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, *parameters: float) -> Tensor:
            ctx.parameters = parameters
            kept = None if saves_output else x.clone()
            x.copy_(run_forward(x, *parameters))
            ctx.mark_dirty(x)
            ctx.save_for_backward(x if kept is None else kept)
            return x

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Any:
            (saved,) = ctx.saved_tensors
            cut = torch.is_grad_enabled() and not saves_output
            if cut:
                raise RuntimeError(f"{a.name}(inplace=True) has no second derivative: its input is gone; use inplace=False")
            run = formula_backward if torch.is_grad_enabled() else run_backward
            return run(dy, saved, *ctx.parameters), *(None,) * len(ctx.parameters)

    return InPlace


#: name -> op(x, *parameters)
activations = {a.name: _function(a) for a in ACTIVATIONS.values()}

_IN_PLACE = {a.name: _in_place_function(a) for a in ACTIVATIONS.values()}


def activate_(name: str, x: Tensor, *parameters: float) -> Tensor:
    """Writes f(x) over x and returns x.

    Raises:
        RuntimeError: x is a leaf that requires grad.
    """
    if not (torch.is_grad_enabled() and x.requires_grad) or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return x.copy_(activations[name](x, *parameters))
    if torch.autograd.forward_ad._current_level >= 0:
        return x.copy_(activations[name](x, *parameters))
    if x.is_leaf:
        raise RuntimeError(f"a leaf Variable that requires grad is being used in an in-place operation: {name} of shape {tuple(x.shape)}")
    return _IN_PLACE[name].apply(x, *parameters)

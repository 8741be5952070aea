"""Autograd of the activations: y = f(x), dx = dy f'."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from ..backends.activation import ATEN, in_place, primitives
from ..backends.selection import TENSORS, is_traced, is_transformed
from ..formulas.activation import ACTIVATIONS, Activation
from .route import is_ours, op, run_of_gradient


def stock_of(name: str) -> Callable[..., Tensor]:
    """PyTorch's own function for an activation."""
    return ATEN[name].stock or getattr(torch.nn.functional, name)


def _saves_output(name: str) -> bool:
    return ACTIVATIONS[name].saves_output and not ATEN[name].saves_input


def _define(a: Activation) -> Callable[..., Tensor]:
    saves_output, derivative = _saves_output(a.name), a.derivative

    class Definition:
        forward_op, backward_op = primitives[a.name]
        autocast = {"cuda": "float32"} if ATEN[a.name].float32_on_cuda else {}

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, y: Tensor) -> None:
            ctx.save_for_backward(y if saves_output else inputs[0])
            ctx.parameters = inputs[1:]

        @staticmethod
        def backward(run: Any, ctx: Any, dy: Tensor) -> Tensor:
            return run(dy, *ctx.saved_tensors, *ctx.parameters)

        @staticmethod
        def jvp(ctx: Any, tx: Tensor, *_: None) -> Tensor:
            return tx * derivative(*ctx.saved_tensors, *ctx.parameters)

    Definition.__name__, Definition.__doc__ = a.name, a.formula
    return op(Definition, stock=stock_of(a.name))


def _define_in_place(a: Activation) -> type[torch.autograd.Function]:
    """The same in place. It saves y, which is now in x's memory, or ``copy``, a copy of x that
    connects a second derivative to x."""
    forward_op, backward_op = in_place[a.name], primitives[a.name][1]

    class InPlace(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, copy: Tensor | None, *parameters: float) -> Tensor:
            forward_op(x, *parameters)
            ctx.mark_dirty(x)
            ctx.save_for_backward(x if copy is None else copy)
            ctx.parameters = parameters
            return x

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Any:
            dx = run_of_gradient(backward_op, dy)(dy, *ctx.saved_tensors, *ctx.parameters)
            return dx, *(None,) * (1 + len(ctx.parameters))

    InPlace.__name__, InPlace.__doc__ = f"{a.name}_", a.formula
    return InPlace


#: name -> op(x, *parameters)
activations = {a.name: _define(a) for a in ACTIVATIONS.values()}

_IN_PLACE = {name: _define_in_place(ACTIVATIONS[name]) for name in in_place}


def activate_(name: str, x: Tensor, *parameters: float) -> Tensor:
    """Overwrites x with f(x) and returns x.

    Raises:
        RuntimeError: x is a leaf that requires grad, or a view of one.
    """
    if type(x) not in TENSORS and has_torch_function((x,)):
        return handle_torch_function(activate_, (x,), name, x, *parameters)
    if not is_ours(x):
        return stock_of(name)(x, *parameters, inplace=True)
    if is_traced() or is_transformed():
        return x.copy_(activations[name](x.clone(), *parameters))
    if not (torch.is_grad_enabled() and x.requires_grad):
        in_place[name](x, *parameters)
        torch.autograd.graph.increment_version(x)  # the store of a kernel does not
        return x
    if x.is_leaf or (x._base is not None and x._base.is_leaf):
        what = "a leaf Variable" if x.is_leaf else "a view of a leaf Variable"
        raise RuntimeError(
            f"{what} that requires grad is being used in an in-place operation: {name}, "
            f"shape {tuple(x.shape)}"
        )
    same = _saves_output(name) or ATEN[name].same_at_output(*parameters)
    return _IN_PLACE[name].apply(x, None if same else x.clone(), *parameters)

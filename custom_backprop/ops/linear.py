"""Autograd of the linear layer, plain and with an activation in the same Function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends import linear as primitives
from ..backends.activation import ATEN, ATEN_IN_PLACE, ATEN_INTO
from ..formulas import linear as formula
from ..formulas.activation import ACTIVATIONS
from .activation import FLOAT32_ON_CUDA, activations, stock_of
from .function import differentiable, differentiated, wanted
from .reuse import LEAST, is_unseen, place

_product = torch.nn.functional.linear
_forward_by_kernels, _backward_by_kernels = (
    primitives.by_kernels("forward"),
    primitives.by_kernels("backward"),
)
_activation_forward_by_kernels = primitives.by_kernels("activation_forward")
_activation_backward_by_kernels = primitives.by_kernels("activation_backward")


def check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raises TypeError for what is no tensor. The product refuses what does not fit."""
    if not (
        isinstance(x, Tensor)
        and isinstance(weight, Tensor)
        and (bias is None or isinstance(bias, Tensor))
    ):
        got = ", ".join(type(a).__name__ for a in (x, weight, bias))
        raise TypeError(
            f"linear: input and weight must be Tensors, and bias a Tensor or None, not {got}"
        )


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
        run = formula.linear_backward if differentiated() else primitives.backward
        # what was not saved is not needed, and any tensor may stand in its place
        return wanted(
            ctx.needs_input_grad,
            run(
                dy, dy if x is None else x, dy if weight is None else weight, *ctx.needs_input_grad
            ),
        )

    @staticmethod
    def jvp(ctx: Any, tx: Tensor | None, tw: Tensor | None, tb: Tensor | None) -> Any:
        x, weight = ctx.saved_tensors
        return formula.linear_jvp(x, weight, tx, tw, tb)

    direct_value = staticmethod(_product)

    @staticmethod
    def direct_forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        need_x, need_weight, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x if need_weight else None, weight if need_x else None)
        ctx.set_materialize_grads(False)
        return _product(x, weight, bias)

    @staticmethod
    def direct_backward(ctx: Any, dy: Tensor) -> Any:
        return primitives.gradients(dy, *ctx.saved_tensors, *ctx.needs_input_grad)

    @staticmethod
    def kernel_value(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        check(x, weight, bias)
        return _forward_by_kernels(x, weight, bias)

    @staticmethod
    def kernel_forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        check(x, weight, bias)
        need_x, need_weight, *_ = ctx.needs_input_grad
        ctx.to_save, ctx.materialize_grads = (
            (x if need_weight else None, weight if need_x else None),
            False,
        )
        return _forward_by_kernels(x, weight, bias)

    @staticmethod
    def kernel_backward(ctx: Any, dy: Tensor) -> Any:
        return _backward_by_kernels(dy, *ctx.saved_tensors, *ctx.needs_input_grad)


linear = differentiable(autocast_cpu="lower", autocast_cuda="lower", stock=_product)(Linear)


def _direct_backward(ctx: Any, dy: Tensor) -> Any:
    x, weight, _, saved = ctx.saved_tensors
    activation, parameters = ctx.function
    if ctx.large and (dz := place(ctx.references, dy, saved, ctx.may_take_saved)) is not None:
        ATEN_INTO[activation](dz, dy, saved, *parameters)
    else:
        dz = ATEN[activation][1](dy, saved, *parameters)
    return *primitives.gradients(dz, x, weight, *ctx.needs_input_grad[:3]), None, None


def _kernel_value(x: Tensor, weight: Tensor, bias: Tensor | None, *function: Any) -> Tensor:
    check(x, weight, bias)
    return _activation_forward_by_kernels(x, weight, bias, *function)[0]


def _kernel_forward(
    ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *function: Any
) -> Tensor:
    check(x, weight, bias)
    y, z = _activation_forward_by_kernels(x, weight, bias, *function)
    ctx.function = function
    ctx.to_save, ctx.materialize_grads = (
        (x, weight, None, y) if z is None else (x, weight, bias, z),
        False,
    )
    return y


def _kernel_backward(ctx: Any, dy: Tensor) -> Any:
    x, weight, _, saved = ctx.saved_tensors
    return (
        *_activation_backward_by_kernels(
            dy, x, weight, saved, *ctx.function, *ctx.needs_input_grad[:3]
        ),
        None,
        None,
    )


class OfInput:
    """y = f(z), z = x Wᵀ + b;  dz = dy f'(z), dx = dz W, dW = dzᵀ x, db = Σ_rows dz.  Where f' is
    written with z."""

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        activation: str,
        parameters: tuple[float, ...],
    ) -> tuple[Tensor, Tensor]:
        check(x, weight, bias)
        return primitives.activation_forward(x, weight, bias, activation, parameters)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _keep(ctx, inputs, *output)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> Any:
        return _activation_backward(ctx, dy)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        return _activation_jvp(ctx, tangents)

    @staticmethod
    def direct_value(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        activation: str,
        parameters: tuple[float, ...],
    ) -> Tensor:
        return ATEN[activation][0](_product(x, weight, bias), *parameters)

    @staticmethod
    def direct_forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        activation: str,
        parameters: tuple[float, ...],
    ) -> Tensor:
        z = _product(x, weight, bias)
        ctx.save_for_backward(x, weight, bias, z)
        ctx.function = activation, parameters
        ctx.large, ctx.may_take_saved = activation in ATEN_INTO and z.numel() >= LEAST, False
        ctx.set_materialize_grads(False)
        return ATEN[activation][0](z, *parameters)

    direct_backward = staticmethod(_direct_backward)
    kernel_value = staticmethod(_kernel_value)
    kernel_forward = staticmethod(_kernel_forward)
    kernel_backward = staticmethod(_kernel_backward)


class OfOutput:
    """The same where f' is written with y: z is no output, and nobody keeps it."""

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        activation: str,
        parameters: tuple[float, ...],
    ) -> Tensor:
        check(x, weight, bias)
        return primitives.activation_forward(x, weight, bias, activation, parameters)[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _keep(ctx, inputs, output, output)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> Any:
        return _activation_backward(ctx, dy)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        return _activation_jvp(ctx, tangents)

    @staticmethod
    def direct_value(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        activation: str,
        parameters: tuple[float, ...],
    ) -> Tensor:
        return ATEN_IN_PLACE[activation](_product(x, weight, bias), *parameters)

    @staticmethod
    def direct_forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        activation: str,
        parameters: tuple[float, ...],
    ) -> Tensor:
        y = ATEN_IN_PLACE[activation](_product(x, weight, bias), *parameters)
        ctx.save_for_backward(x, weight, None, y)
        ctx.function = activation, parameters
        ctx.large = y.numel() >= LEAST
        ctx.may_take_saved = ctx.large and is_unseen()
        ctx.set_materialize_grads(False)
        return y

    direct_backward = staticmethod(_direct_backward)
    kernel_value = staticmethod(_kernel_value)
    kernel_forward = staticmethod(_kernel_forward)
    kernel_backward = staticmethod(_kernel_backward)


def _keep(ctx: Any, inputs: tuple[Any, ...], y: Tensor, saved: Tensor) -> None:
    x, weight, bias, *function = inputs
    ctx.function = function
    ctx.save_for_backward(
        x, weight, None if saved is y else bias, saved
    )  # with the bias z could be derived again
    ctx.save_for_forward(x, weight, bias, y)
    ctx.set_materialize_grads(False)


def _activation_backward(ctx: Any, dy: Tensor | None) -> Any:
    if dy is None:
        return (None,) * 5
    x, weight, bias, saved = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    if differentiated():
        saved = formula.saved_for(ctx.function[0], x, weight, bias, saved)
        grads = formula.linear_activation_backward(dy, x, weight, saved, *ctx.function, *needs)
    else:
        grads = primitives.activation_backward(dy, x, weight, saved, *ctx.function, *needs)
    return *wanted(needs, grads), None, None


def _activation_jvp(ctx: Any, tangents: tuple[Tensor | None, ...]) -> Tensor | None:
    tx, tw, tb, *_ = tangents
    x, weight, bias, y = ctx.saved_tensors
    tz = formula.linear_jvp(x, weight, tx, tw, tb)
    activation, parameters = ctx.function
    saved = formula.saved_for(activation, x, weight, bias, y)
    return None if tz is None else ACTIVATIONS[activation].backward(tz, saved, *parameters)


def _stock(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, parameters: tuple[float, ...]
) -> Tensor:
    return stock_of(activation)(_product(x, weight, bias), *parameters)


_of_input = differentiable(
    autocast_cpu="lower", autocast_cuda="lower", keeps=True, overwrites=True, stock=_stock
)(OfInput)
_of_output = differentiable(
    autocast_cpu="lower", autocast_cuda="lower", overwrites=True, stock=_stock
)(OfOutput)


def linear_activation(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, parameters: tuple[float, ...]
) -> Tensor:
    """f(x Wᵀ + b) in one Function; in two where autocast wants f in another dtype than the
    product."""
    if (
        activation in FLOAT32_ON_CUDA
        and isinstance(x, Tensor)
        and x.is_cuda
        and torch.is_autocast_enabled("cuda")
    ):
        return activations[activation](linear(x, weight, bias), *parameters)
    if ACTIVATIONS[activation].saves_output:
        return _of_output(x, weight, bias, activation, parameters)
    return _of_input(x, weight, bias, activation, parameters)

"""Autograd of the activations: y = f(x), dx = dy f'."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Number
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function

from ..backends.activation import ATEN, ATEN_INTO, ATEN_KEEPING, in_place, primitives
from ..backends.library import TENSORS
from ..formulas.activation import ACTIVATIONS, Activation
from .function import differentiable, differentiated, is_stocks
from .reuse import LEAST, is_unseen, place

#: activations that torch's autocast computes in float32 on a GPU (a square is a power there)
FLOAT32_ON_CUDA = {"softplus", "relu_squared"}


#: activations of which torch keeps the input, though the derivative can be had from the output:
#: that may then be changed in place
_OUTPUT_IS_FREE = {"hardtanh", "relu6"}


#: those that are not in ``torch.nn.functional`` by their name
_STOCK: dict[str, Callable[..., Tensor]] = {
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "relu_squared": lambda x: torch.nn.functional.relu(x).square(),
}


def stock_of(name: str) -> Callable[..., Tensor]:
    """PyTorch's own function for an activation."""
    return _STOCK[name] if name in _STOCK else getattr(torch.nn.functional, name)


def _saves_output(name: str) -> bool:
    return ACTIVATIONS[name].saves_output and name not in _OUTPUT_IS_FREE


def check(name: str, x: Any) -> None:
    """Raises TypeError, as stock does, for what is no tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: the input must be a Tensor, not {type(x).__name__}")


def number(name: str, p: Any) -> float:
    """A parameter as a float.

    Raises:
        TypeError, RuntimeError: it is no number, or a complex one.
    """
    if isinstance(p, complex):
        raise RuntimeError(f"{name}: a parameter must be real, got {p}")
    if not isinstance(p, (Number, Tensor)) or (isinstance(p, Tensor) and p.requires_grad):
        raise TypeError(f"{name}: a parameter must be a Number, not {type(p).__name__}")
    return float(p)  # type: ignore[arg-type]


def numbers(name: str, parameters: tuple[Any, ...]) -> tuple[float, ...]:
    """Each :func:`number` of them."""
    return tuple([p if type(p) is float else number(name, p) for p in parameters])


def _function(a: Activation) -> Callable[..., Tensor]:
    run_forward, run_backward = primitives[a.name]
    kernels_forward, kernels_backward = run_forward.kernels, run_backward.kernels  # type: ignore[attr-defined]
    aten_forward, aten_backward = ATEN[a.name]
    aten_into = ATEN_INTO.get(a.name)
    derivative, formula_backward, saves_output = a.derivative, a.backward, _saves_output(a.name)
    no_gradients = (None,) * len(a.parameters)

    def as_floats(parameters: tuple[Any, ...]) -> tuple[float, ...]:
        if parameters and not type(parameters[0]) is float is type(
            parameters[-1]
        ):  # none has more than two
            return numbers(a.name, parameters)
        return parameters

    class Definition:
        forward = staticmethod(run_forward)

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
            saved, *_ = ctx.saved_tensors
            run = formula_backward if differentiated() else run_backward
            return run(dy, saved, *ctx.parameters), *no_gradients

        @staticmethod
        def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
            (saved,) = ctx.saved_tensors
            return tangent * derivative(saved, *ctx.parameters)

        direct_value = staticmethod(aten_forward)

        @staticmethod
        def direct_forward(ctx: Any, x: Tensor, *parameters: float) -> Tensor:
            parameters = as_floats(parameters)
            y = aten_forward(x, *parameters)
            ctx.to_save, ctx.materialize_grads = (
                (y if saves_output else x,),
                False,
            )  # what the methods set, without their frames
            ctx.parameters = parameters
            ctx.large = aten_into is not None and y.numel() >= LEAST
            ctx.may_take_saved = ctx.large and saves_output and is_unseen()
            return y

        @staticmethod
        def direct_backward(ctx: Any, dy: Tensor) -> Any:
            (saved,) = ctx.saved_tensors
            if (
                ctx.large
                and (dx := place(ctx.references, dy, saved, ctx.may_take_saved)) is not None
            ):
                return aten_into(dx, dy, saved, *ctx.parameters), *no_gradients  # type: ignore[misc]
            return aten_backward(dy, saved, *ctx.parameters), *no_gradients

        @staticmethod
        def kernel_value(x: Tensor, *parameters: float) -> Tensor:
            return kernels_forward(x, *as_floats(parameters))

        @staticmethod
        def kernel_forward(ctx: Any, x: Tensor, *parameters: float) -> Tensor:
            parameters = as_floats(parameters)
            y = kernels_forward(x, *parameters)
            ctx.to_save, ctx.materialize_grads = (y if saves_output else x,), False
            ctx.parameters = parameters
            return y

        @staticmethod
        def kernel_backward(ctx: Any, dy: Tensor) -> Any:
            return kernels_backward(dy, *ctx.saved_tensors, *ctx.parameters), *no_gradients

    if a.name in ATEN_KEEPING:
        _keep(Definition, *ATEN_KEEPING[a.name])

    def prepare(x: Any, *parameters: Any) -> tuple[Any, ...]:
        check(a.name, x)
        return x, *numbers(a.name, parameters)

    Definition.__name__ = a.name
    Definition.__doc__ = a.formula
    policy = "float32" if a.name in FLOAT32_ON_CUDA else None
    return differentiable(
        autocast_cuda=policy, unary=True, overwrites=True, prepare=prepare, stock=stock_of(a.name)
    )(Definition)


def _keep(
    definition: Any, forward: Callable[..., tuple[Tensor, Tensor]], backward: Callable[..., Tensor]
) -> None:
    """The direct face of an activation whose forward has in hand what backward needs, and would pay
    for a second time."""

    def direct_forward(ctx: Any, x: Tensor) -> Tensor:
        y, kept = forward(x)
        ctx.to_save, ctx.materialize_grads, ctx.parameters = (x, kept), False, ()
        ctx.large = y.numel() >= LEAST
        return y

    def direct_backward(ctx: Any, dy: Tensor) -> Tensor:
        x, kept = ctx.saved_tensors
        return backward(place(ctx.references, dy, x, False) if ctx.large else None, dy, x, kept)

    definition.direct_forward, definition.direct_backward = (
        staticmethod(direct_forward),
        staticmethod(direct_backward),
    )


#: activations whose derivative is the same at y as at x, for such parameters: in place they need no
#: copy of x
_SAME_AT_OUTPUT: dict[str, Callable[..., bool]] = {
    "leaky_relu": lambda negative_slope: negative_slope >= 0,
    "threshold": lambda threshold, value: value <= threshold,
}


def _in_place_function(a: Activation) -> type[torch.autograd.Function]:
    """The same, writing y over x. Backward keeps y, now in x's memory, or ``kept``, a copy of x
    that leads a second derivative back."""
    run_forward_, run_backward, formula_backward = (
        in_place[a.name],
        primitives[a.name][1],
        a.backward,
    )
    no_gradients = (None,) * len(a.parameters)

    class InPlace(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, kept: Tensor | None, *parameters: float) -> Tensor:
            run_forward_(x, *parameters)
            ctx.mark_dirty(x)
            ctx.save_for_backward(x if kept is None else kept)
            ctx.parameters = parameters
            return x

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Any:
            (saved,) = ctx.saved_tensors
            dx = (formula_backward if differentiated() else run_backward)(
                dy, saved, *ctx.parameters
            )
            return dx, None, *no_gradients

    return InPlace


#: name -> op(x, *parameters)
activations = {a.name: _function(a) for a in ACTIVATIONS.values()}

_IN_PLACE = {name: _in_place_function(ACTIVATIONS[name]) for name in in_place}


def activate_(name: str, x: Tensor, *parameters: float) -> Tensor:
    """Writes f(x) over x and returns x.

    Raises:
        RuntimeError: x is a leaf that requires grad, or a view of one.
    """
    if is_stocks(x):
        return stock_of(name)(x, *parameters, inplace=True)
    if type(x) not in TENSORS and has_torch_function((x,)):
        return handle_torch_function(activate_, (x,), name, x, *parameters)
    check(name, x)
    parameters = numbers(name, parameters)
    if (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    ):
        return x.copy_(activations[name](x.clone(), *parameters))
    if not (torch.is_grad_enabled() and x.requires_grad):
        in_place[name](x, *parameters)
        torch.autograd.graph.increment_version(x)  # which the store of a kernel does not
        return x
    if x.is_leaf or (x._base is not None and x._base.is_leaf):
        what = "a leaf Variable" if x.is_leaf else "a view of a leaf Variable"
        raise RuntimeError(
            f"{what} that requires grad is being used in an in-place operation: {name}, shape {tuple(x.shape)}"
        )
    same = _saves_output(name) or (name in _SAME_AT_OUTPUT and _SAME_AT_OUTPUT[name](*parameters))
    return _IN_PLACE[name].apply(x, None if same else x.clone(), *parameters)

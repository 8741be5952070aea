"""Primitives of the activations: ``<name>_forward(x, *parameters)`` and ``<name>_backward(dy, saved, *parameters)``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..formulas.activation import ACTIVATIONS, SELU_ALPHA, SELU_SCALE, Activation
from .kernels import kernels
from .library import fold_batch, primitive

aten = torch.ops.aten
_threshold_backward = aten.threshold_backward.default._op  # without the Python of an OpOverload's call


def _softsign(x: Tensor) -> Tensor:
    if not x.is_floating_point():
        return x / (torch.abs(x) + 1)
    d = torch.abs(x).add_(1)
    return torch.div(x, d, out=d)


def _softsign_backward(dy: Tensor, x: Tensor) -> Tensor:
    d = torch.abs(x).add_(1)
    return torch.div(dy, d.mul_(d), out=d)


def _tanhshrink(x: Tensor) -> Tensor:
    t = torch.tanh(x)
    return torch.sub(x, t, out=t)


def _tanhshrink_backward(dy: Tensor, x: Tensor) -> Tensor:
    t = torch.tanh(x)
    return t.mul_(t).mul_(dy)


def _relu_squared(x: Tensor) -> Tensor:
    r = torch.relu(x)
    return r.mul_(r)


def _relu_squared_backward(dy: Tensor, x: Tensor) -> Tensor:
    return torch.relu(x).mul_(dy).mul_(2)


def _hardsigmoid_backward(dy: Tensor, x: Tensor) -> Tensor:
    if dy.dtype == torch.float64:  # ATen multiplies by 1/6 rounded to float32 in every dtype
        return aten.hardtanh_backward.default(dy, x, -3, 3).div_(6)
    return aten.hardsigmoid_backward.default(dy, x)


# log σ(x) = -softplus(-x), which is softplus with beta = -1: one pass each way, no buffer kept. Beyond 40, 1 + e^-40 is 1 in float64 too.
_LOGSIGMOID = (-1.0, 40.0)

#: name -> (forward, backward) by PyTorch's operators
ATEN: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "relu": (torch.relu, lambda dy, y: _threshold_backward(dy, y, 0)),
    "relu6": (lambda x: aten.hardtanh.default(x, 0, 6), lambda dy, y: aten.hardtanh_backward.default(dy, y, 0, 6)),
    "leaky_relu": (aten.leaky_relu.default, lambda dy, x, slope: aten.leaky_relu_backward.default(dy, x, slope, False)),
    "elu": (aten.elu.default, lambda dy, x, alpha: aten.elu_backward.default(dy, alpha, 1, 1, False, x)),
    "selu": (torch.selu, lambda dy, x: aten.elu_backward.default(dy, SELU_ALPHA, SELU_SCALE, 1, False, x)),
    "celu": (torch.celu, lambda dy, x, alpha: aten.elu_backward.default(dy, alpha, 1, 1 / alpha, False, x)),
    "gelu": (aten.gelu.default, aten.gelu_backward.default),
    "gelu_tanh": (
        lambda x: aten.gelu.default(x, approximate="tanh"),
        lambda dy, x: aten.gelu_backward.default(dy, x, approximate="tanh"),
    ),
    "silu": (aten.silu.default, aten.silu_backward.default),
    "mish": (aten.mish.default, aten.mish_backward.default),
    "sigmoid": (torch.sigmoid, aten.sigmoid_backward.default),
    "logsigmoid": (lambda x: aten.softplus.default(x, *_LOGSIGMOID), lambda dy, x: aten.softplus_backward.default(dy, x, *_LOGSIGMOID)),
    "hardsigmoid": (aten.hardsigmoid.default, _hardsigmoid_backward),
    "hardswish": (aten.hardswish.default, aten.hardswish_backward.default),
    "hardtanh": (aten.hardtanh.default, aten.hardtanh_backward.default),
    "tanh": (torch.tanh, aten.tanh_backward.default),
    "tanhshrink": (_tanhshrink, _tanhshrink_backward),
    "softplus": (aten.softplus.default, aten.softplus_backward.default),
    "softsign": (_softsign, _softsign_backward),
    "softshrink": (aten.softshrink.default, aten.softshrink_backward.default),
    "hardshrink": (aten.hardshrink.default, aten.hardshrink_backward.default),
    "threshold": (aten.threshold.default, lambda dy, x, threshold, value: aten.threshold_backward.default(dy, x, threshold)),
    "relu_squared": (_relu_squared, _relu_squared_backward),
}

#: the same over the input, where torch has it
ATEN_IN_PLACE: dict[str, Callable[..., Tensor]] = {
    "relu": torch.relu_,
    "relu6": lambda x: aten.hardtanh_.default(x, 0, 6),
    "leaky_relu": aten.leaky_relu_.default,
    "elu": aten.elu_.default,
    "selu": torch.selu_,
    "celu": torch.celu_,
    "silu": aten.silu_.default,
    "mish": aten.mish_.default,
    "sigmoid": torch.sigmoid_,
    "hardsigmoid": aten.hardsigmoid_.default,
    "hardswish": aten.hardswish_.default,
    "hardtanh": aten.hardtanh_.default,
    "tanh": torch.tanh_,
    "threshold": aten.threshold_.default,
}

#: name -> the backward that writes dx over the saved output
ATEN_OVER_OUTPUT: dict[str, Callable[..., Tensor]] = {
    "relu": lambda dy, y: aten.threshold_backward.grad_input(dy, y, 0, grad_input=y),
    "relu6": lambda dy, y: aten.hardtanh_backward.grad_input(dy, y, 0, 6, grad_input=y),
    "hardtanh": lambda dy, y, low, high: aten.hardtanh_backward.grad_input(dy, y, low, high, grad_input=y),
    "sigmoid": lambda dy, y: aten.sigmoid_backward.grad_input(dy, y, grad_input=y),
    "tanh": lambda dy, y: aten.tanh_backward.grad_input(dy, y, grad_input=y),
}


def _define(a: Activation) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    parameters = "".join(f", float {name}" for name in a.parameters)
    forward_aten, backward_aten = ATEN[a.name]

    def on_floats(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Anything else has no gradient: stock's result, or stock's error."""
        return lambda x, *parameters: (run if x.is_floating_point() else forward_aten)(x, *parameters)

    def vmap_forward(info: Any, in_dims: Any, x: Tensor, *parameters: float) -> tuple[Tensor, int]:
        return forward(x.movedim(in_dims[0], 0), *parameters), 0

    def vmap_backward(info: Any, in_dims: Any, dy: Tensor, saved: Tensor, *parameters: float) -> tuple[Tensor, int]:
        return backward(*fold_batch((dy, saved), in_dims[:2], info.batch_size), *parameters), 0

    forward = primitive(
        f"{a.name}_forward(Tensor x{parameters}) -> Tensor",
        formula=on_floats(a.value),
        aten=forward_aten,
        triton=on_floats(lambda x, *parameters: kernels("activation").forward(a.name, x, *parameters)),
        fake=on_floats(lambda x, *parameters: torch.empty_like(x)),
        vmap=vmap_forward,
    )
    backward = primitive(
        f"{a.name}_backward(Tensor dy, Tensor saved{parameters}) -> Tensor",
        formula=a.backward,
        aten=backward_aten,
        triton=lambda *args: kernels("activation").backward(a.name, *args),
        fake=lambda dy, saved, *parameters: torch.empty_like(saved),
        vmap=vmap_backward,
    )
    return forward, backward


def _define_in_place(a: Activation) -> Callable[..., None]:
    def on_aten(x: Tensor, *parameters: float) -> None:
        ATEN_IN_PLACE[a.name](x, *parameters)

    def formula(x: Tensor, *parameters: float) -> None:
        x.copy_(a.value(x, *parameters))

    def on_triton(x: Tensor, *parameters: float) -> None:
        kernels("activation").forward_(a.name, x, *parameters)

    def on_floats(run: Callable[..., None]) -> Callable[..., None]:
        return lambda x, *parameters: (run if x.is_floating_point() else on_aten)(x, *parameters)

    return primitive(
        f"{a.name}_forward_(Tensor(a!) x{''.join(f', float {name}' for name in a.parameters)}) -> ()",
        formula=on_floats(formula),
        aten=on_aten,
        triton=on_floats(on_triton),
        fake=lambda x, *parameters: None,
    )


#: name -> (forward, backward)
primitives = {a.name: _define(a) for a in ACTIVATIONS.values()}

#: name -> forward over the input
in_place = {name: _define_in_place(ACTIVATIONS[name]) for name in ATEN_IN_PLACE}

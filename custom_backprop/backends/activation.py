"""Primitives of the activations: ``<name>_forward(x, *parameters)`` and ``<name>_backward(dy,
saved, *parameters)``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..formulas.activation import ACTIVATIONS, SELU_ALPHA, SELU_SCALE, Activation
from .kernels import kernels
from .library import builtin, fold_batch, primitive

aten = torch.ops.aten


def _into(packet: Any) -> Callable[..., Tensor]:
    run = builtin(packet, "grad_input")
    return lambda dx, dy, saved, *parameters: run(dy, saved, *parameters, grad_input=dx)


_threshold_backward = builtin(aten.threshold_backward)
_hardtanh_backward = builtin(aten.hardtanh_backward)
_leaky_relu_backward = builtin(aten.leaky_relu_backward)
_elu_backward = builtin(aten.elu_backward)
_gelu_backward = builtin(aten.gelu_backward)
_log_sigmoid_backward = builtin(aten.log_sigmoid_backward)
_threshold_into = builtin(aten.threshold_backward, "grad_input")
_hardtanh_into = builtin(aten.hardtanh_backward, "grad_input")
_leaky_relu_into = builtin(aten.leaky_relu_backward, "grad_input")
_elu_into = builtin(aten.elu_backward, "grad_input")
_gelu_into = builtin(aten.gelu_backward, "grad_input")
_log_sigmoid_into = builtin(aten.log_sigmoid_backward, "grad_input")


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


# log σ(x) = -softplus(-x), which is softplus with beta = -1: one pass each way, no buffer kept.
# Beyond 40, 1 + e^-40 is 1 in float64 too.
_LOGSIGMOID = (-1.0, 40.0)

#: name -> (forward, backward) by PyTorch's operators on a CPU
ATEN: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "relu": (torch.relu, lambda dy, y: _threshold_backward(dy, y, 0)),
    "relu6": (
        lambda x: torch._C._nn.hardtanh(x, 0, 6),
        lambda dy, y: _hardtanh_backward(dy, y, 0, 6),
    ),
    "leaky_relu": (
        torch._C._nn.leaky_relu,
        lambda dy, x, slope: _leaky_relu_backward(dy, x, slope, False),
    ),
    "elu": (torch._C._nn.elu, lambda dy, x, alpha: _elu_backward(dy, alpha, 1, 1, False, x)),
    "selu": (torch.selu, lambda dy, x: _elu_backward(dy, SELU_ALPHA, SELU_SCALE, 1, False, x)),
    "celu": (torch.celu, lambda dy, x, alpha: _elu_backward(dy, alpha, 1, 1 / alpha, False, x)),
    "gelu": (torch._C._nn.gelu, _gelu_backward),
    "gelu_tanh": (
        lambda x: torch._C._nn.gelu(x, approximate="tanh"),
        lambda dy, x: _gelu_backward(dy, x, approximate="tanh"),
    ),
    "silu": (torch._C._nn.silu, builtin(aten.silu_backward)),
    "mish": (torch._C._nn.mish, builtin(aten.mish_backward)),
    "sigmoid": (torch.sigmoid, builtin(aten.sigmoid_backward)),
    "logsigmoid": (
        lambda x: torch._C._nn.softplus(x, *_LOGSIGMOID),
        lambda dy, x: aten.softplus_backward.default(dy, x, *_LOGSIGMOID),
    ),
    "hardsigmoid": (torch._C._nn.hardsigmoid, _hardsigmoid_backward),
    "hardswish": (torch._C._nn.hardswish, builtin(aten.hardswish_backward)),
    "hardtanh": (torch._C._nn.hardtanh, _hardtanh_backward),
    "tanh": (torch.tanh, builtin(aten.tanh_backward)),
    "tanhshrink": (_tanhshrink, _tanhshrink_backward),
    "softplus": (torch._C._nn.softplus, builtin(aten.softplus_backward)),
    "softsign": (_softsign, _softsign_backward),
    "softshrink": (torch._C._nn.softshrink, builtin(aten.softshrink_backward)),
    "hardshrink": (torch.hardshrink, builtin(aten.hardshrink_backward)),
    "threshold": (
        torch.threshold,
        lambda dy, x, threshold, value: _threshold_backward(dy, x, threshold),
    ),
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

#: those that on a GPU multiply by 1/6 rounded to float32, in float64 too: there these are exact
_EXACT: dict[str, Callable[[Tensor], Tensor]] = {
    "hardsigmoid": lambda x: torch._C._nn.hardtanh(x + 3, 0, 6).div_(6),
    "hardswish": lambda x: torch._C._nn.hardtanh(x + 3, 0, 6).mul_(x).div_(6),
}


def _on_any_device(name: str, in_place: bool = False) -> Callable[..., Tensor]:
    """The forward of ``ATEN`` or ``ATEN_IN_PLACE``, on a GPU an exact one. The direct faces, of CPU
    tensors alone, do without asking."""
    run = ATEN_IN_PLACE[name] if in_place else ATEN[name][0]
    if name not in _EXACT:
        return run
    exact = _EXACT[name]

    def forward(x: Tensor) -> Tensor:
        if not (x.is_cuda and x.dtype == torch.float64):
            return run(x)
        return x.copy_(exact(x)) if in_place else exact(x)

    return forward


#: name -> the forward by PyTorch's operators on any device
ATEN_FORWARD = {name: _on_any_device(name) for name in ATEN}

#: name -> the backward that writes into a dx that is dy or the saved tensor itself
ATEN_INTO: dict[str, Callable[..., Tensor]] = {
    "relu": lambda dx, dy, y: _threshold_into(dy, y, 0, grad_input=dx),
    "relu6": lambda dx, dy, y: _hardtanh_into(dy, y, 0, 6, grad_input=dx),
    "leaky_relu": lambda dx, dy, x, slope: _leaky_relu_into(dy, x, slope, False, grad_input=dx),
    "elu": lambda dx, dy, x, alpha: _elu_into(dy, alpha, 1, 1, False, x, grad_input=dx),
    "selu": lambda dx, dy, x: _elu_into(dy, SELU_ALPHA, SELU_SCALE, 1, False, x, grad_input=dx),
    "celu": lambda dx, dy, x, alpha: _elu_into(dy, alpha, 1, 1 / alpha, False, x, grad_input=dx),
    "gelu": _into(aten.gelu_backward),
    "gelu_tanh": lambda dx, dy, x: _gelu_into(dy, x, approximate="tanh", grad_input=dx),
    "silu": _into(aten.silu_backward),
    "sigmoid": _into(aten.sigmoid_backward),
    "logsigmoid": lambda dx, dy, x: aten.softplus_backward.grad_input(
        dy, x, *_LOGSIGMOID, grad_input=dx
    ),
    "hardtanh": _into(aten.hardtanh_backward),
    "tanh": _into(aten.tanh_backward),
    "softplus": _into(aten.softplus_backward),
    "softshrink": _into(aten.softshrink_backward),
    "hardshrink": _into(aten.hardshrink_backward),
    "threshold": lambda dx, dy, x, threshold, value: _threshold_into(
        dy, x, threshold, grad_input=dx
    ),
}


def _tanhshrink_keeping(x: Tensor) -> tuple[Tensor, Tensor]:
    t = torch.tanh(x)
    return x - t, t


def _tanhshrink_kept(dx: Tensor | None, dy: Tensor, x: Tensor, t: Tensor) -> Tensor:
    return torch.mul(dy, t, out=dx).mul_(t)


#: name -> (forward -> y and what backward would have to compute again, backward with that, into a
#: dx that is dy or None)
ATEN_KEEPING: dict[str, tuple[Callable[[Tensor], tuple[Tensor, Tensor]], Callable[..., Tensor]]] = {
    "logsigmoid": (
        builtin(aten.log_sigmoid_forward),
        lambda dx, dy, x, buffer: (
            _log_sigmoid_backward(dy, x, buffer)
            if dx is None
            else _log_sigmoid_into(dy, x, buffer, grad_input=dx)
        ),
    ),
    "tanhshrink": (_tanhshrink_keeping, _tanhshrink_kept),
}


def _in_strides_of_saved(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """As the fake says, and compiled code expects. PyTorch's operators and the formula take the
    strides of dy where those differ."""

    def backward(dy: Tensor, saved: Tensor, *parameters: float) -> Tensor:
        dx = run(dy, saved, *parameters)
        if dx.stride() == saved.stride():
            return dx
        laid_out = torch.empty_like(saved)
        return dx if dx.stride() == laid_out.stride() else laid_out.copy_(dx)

    return backward


def _define(a: Activation) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    parameters = "".join(f", float {name}" for name in a.parameters)
    forward_aten, backward_aten = ATEN_FORWARD[a.name], ATEN[a.name][1]

    def on_floats(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Anything else has no gradient: stock's result, or stock's error."""
        return lambda x, *parameters: (run if x.is_floating_point() else forward_aten)(
            x, *parameters
        )

    def vmap_forward(info: Any, in_dims: Any, x: Tensor, *parameters: float) -> tuple[Tensor, int]:
        return forward(x.movedim(in_dims[0], 0), *parameters), 0

    def vmap_backward(
        info: Any, in_dims: Any, dy: Tensor, saved: Tensor, *parameters: float
    ) -> tuple[Tensor, int]:
        return backward(*fold_batch((dy, saved), in_dims[:2], info.batch_size), *parameters), 0

    forward = primitive(
        f"{a.name}_forward(Tensor x{parameters}) -> Tensor",
        formula=on_floats(a.value),
        aten=forward_aten,
        triton=on_floats(
            lambda x, *parameters: kernels("activation").forward(a.name, x, *parameters)
        ),
        fake=on_floats(lambda x, *parameters: torch.empty_like(x)),
        vmap=vmap_forward,
    )
    backward = primitive(
        f"{a.name}_backward(Tensor dy, Tensor saved{parameters}) -> Tensor",
        formula=_in_strides_of_saved(a.backward),
        aten=_in_strides_of_saved(backward_aten),
        triton=lambda *args: kernels("activation").backward(a.name, *args),
        fake=lambda dy, saved, *parameters: torch.empty_like(saved),
        vmap=vmap_backward,
    )
    return forward, backward


def _define_in_place(a: Activation) -> Callable[..., None]:
    forward_aten = _on_any_device(a.name, in_place=True)

    def on_aten(x: Tensor, *parameters: float) -> None:
        forward_aten(x, *parameters)

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

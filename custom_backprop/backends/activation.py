"""Primitives of the activations: ``<name>_forward(x, *parameters)`` and ``<name>_backward(dy,
saved, *parameters)``, where ``saved`` is x or y."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..formulas.activation import ACTIVATIONS, SELU_ALPHA, SELU_SCALE, Activation
from ..formulas.precision import rounded_once
from .library import Primitive, builtin, fold_batch, launcher, primitive

aten, nn = torch.ops.aten, torch._C._nn
_threshold_backward = builtin(aten.threshold_backward)
_hardtanh_backward = builtin(aten.hardtanh_backward)
_elu_backward = builtin(aten.elu_backward)


class Aten(NamedTuple):
    """One activation by PyTorch's operators.

    Attributes:
        forward, backward, in_place: the last writes over x; None where torch has no such operator.
        stock: PyTorch's own function, if its name is another.
        saves_input: torch saves x where the derivative can be had from y, which may then be changed
            in place; so do we.
        same_at_output: whether, for given parameters, f' is the same at y as at x: then the
            in-place form needs no copy of x.
        float32_on_cuda: autocast on a GPU computes it in float32.
    """

    forward: Callable[..., Tensor]
    backward: Callable[..., Tensor]
    in_place: Callable[..., Tensor] | None = None
    stock: Callable[..., Tensor] | None = None
    saves_input: bool = False
    same_at_output: Callable[..., bool] = lambda *parameters: False
    float32_on_cuda: bool = False


# What is put together of several operators is computed in float32 and rounded once, as ATen's own
# operators and our kernels do.


@rounded_once
def _softsign(x):
    d = torch.abs(x).add_(1)
    return torch.div(x, d, out=d)


@rounded_once
def _softsign_backward(dy, x):
    d = torch.abs(x).add_(1)
    return torch.div(dy, d).div_(d)  # the square of d may overflow


@rounded_once
def _tanhshrink(x):
    t = torch.tanh(x)
    return torch.sub(x, t, out=t)


@rounded_once
def _tanhshrink_backward(dy, x):
    t = torch.tanh(x)
    return t.mul_(t).mul_(dy)


@rounded_once
def _relu_squared(x):
    r = torch.relu(x)
    return r.mul_(r)


# Of float64, ATen multiplies by 1/6 rounded to float32: in these on a GPU, in the derivative on a
# CPU too.


def _hardsigmoid(x):
    if x.is_cuda and x.dtype == torch.float64:
        return nn.hardtanh(x + 3, 0, 6).div_(6)
    return nn.hardsigmoid(x)


def _hardsigmoid_backward(dy, x):
    if dy.dtype == torch.float64:
        return torch.where((x > -3) & (x < 3), dy / 6, 0.0)
    return aten.hardsigmoid_backward.default(dy, x)


def _hardswish(x):
    if x.is_cuda and x.dtype == torch.float64:
        return nn.hardtanh(x + 3, 0, 6).mul_(x).div_(6)
    return nn.hardswish(x)


def _over_input(forward: Callable[..., Tensor], in_place: Callable[..., Tensor]) -> Any:
    """``in_place``, or where that is not exact ``forward`` and a copy."""

    def run(x):
        exact = x.is_cuda and x.dtype == torch.float64
        return x.copy_(forward(x)) if exact else in_place(x)

    return run


# log σ(x) = -softplus(-x), which is softplus with beta = -1: one pass each way and no buffer.
# Beyond 40, 1 + e^-40 is 1 in float64 too.
_LOGSIGMOID = (-1.0, 40.0)

ATEN: dict[str, Aten] = {
    "relu": Aten(torch.relu, lambda dy, y: _threshold_backward(dy, y, 0), torch.relu_),
    "relu6": Aten(
        lambda x: nn.hardtanh(x, 0, 6),
        lambda dy, y: _hardtanh_backward(dy, y, 0, 6),
        lambda x: aten.hardtanh_.default(x, 0, 6),
        saves_input=True,
    ),
    "leaky_relu": Aten(
        nn.leaky_relu,
        lambda dy, x, slope: aten.leaky_relu_backward.default(dy, x, slope, False),
        aten.leaky_relu_.default,
        same_at_output=lambda negative_slope: negative_slope >= 0,
    ),
    "elu": Aten(nn.elu, lambda dy, x, α: _elu_backward(dy, α, 1, 1, False, x), aten.elu_.default),
    "selu": Aten(
        torch.selu,
        lambda dy, x: _elu_backward(dy, SELU_ALPHA, SELU_SCALE, 1, False, x),
        torch.selu_,
    ),
    "celu": Aten(
        torch.celu, lambda dy, x, α: _elu_backward(dy, α, 1, 1 / α, False, x), torch.celu_
    ),
    "gelu": Aten(nn.gelu, builtin(aten.gelu_backward)),
    "gelu_tanh": Aten(
        lambda x: nn.gelu(x, approximate="tanh"),
        lambda dy, x: aten.gelu_backward.default(dy, x, approximate="tanh"),
        stock=lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    ),
    "silu": Aten(nn.silu, builtin(aten.silu_backward), aten.silu_.default),
    "mish": Aten(nn.mish, builtin(aten.mish_backward), aten.mish_.default),
    "sigmoid": Aten(torch.sigmoid, builtin(aten.sigmoid_backward), torch.sigmoid_),
    "logsigmoid": Aten(
        lambda x: nn.softplus(x, *_LOGSIGMOID),
        lambda dy, x: aten.softplus_backward.default(dy, x, *_LOGSIGMOID),
    ),
    "hardsigmoid": Aten(
        _hardsigmoid, _hardsigmoid_backward, _over_input(_hardsigmoid, aten.hardsigmoid_.default)
    ),
    "hardswish": Aten(
        _hardswish,
        builtin(aten.hardswish_backward),
        _over_input(_hardswish, aten.hardswish_.default),
    ),
    "hardtanh": Aten(nn.hardtanh, _hardtanh_backward, aten.hardtanh_.default, saves_input=True),
    "tanh": Aten(torch.tanh, builtin(aten.tanh_backward), torch.tanh_),
    "tanhshrink": Aten(_tanhshrink, _tanhshrink_backward),
    "softplus": Aten(nn.softplus, builtin(aten.softplus_backward), float32_on_cuda=True),
    "softsign": Aten(_softsign, _softsign_backward),
    "softshrink": Aten(nn.softshrink, builtin(aten.softshrink_backward)),
    "hardshrink": Aten(torch.hardshrink, builtin(aten.hardshrink_backward)),
    "threshold": Aten(
        torch.threshold,
        lambda dy, x, threshold, value: _threshold_backward(dy, x, threshold),
        aten.threshold_.default,
        same_at_output=lambda threshold, value: value <= threshold,
    ),
    "relu_squared": Aten(
        _relu_squared,
        rounded_once(lambda dy, x: torch.relu(x).mul_(2).mul_(dy)),
        stock=lambda x: torch.nn.functional.relu(x).square(),
        float32_on_cuda=True,
    ),
}


def _in_strides_of_saved(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """As the fake says, and compiled code expects. PyTorch's operators and the formula take the
    strides of dy where those differ."""

    def backward(dy, saved, *parameters):
        dx = run(dy, saved, *parameters)
        if dx.stride() == saved.stride():
            return dx
        laid_out = torch.empty_like(saved)
        return dx if dx.stride() == laid_out.stride() else laid_out.copy_(dx)

    return backward


def _elementwise(outputs, inputs):
    """Sharded alike along any dimension."""
    return lambda x, *rest: (([i] * outputs, [i] * inputs) for i in range(x.dim()))


def _traced(operator: Any, formula: Any) -> Any:
    """What a compiler is shown: on a CPU PyTorch's operator, if there is one to be shown."""
    if operator is None:
        return formula
    return lambda first, *rest: (operator if first.is_cpu else formula)(first, *rest)


#: of what Inductor is shown no formula on a CPU: it has no vectors of gelu's erfc, and would take
#: four times as long
SHOWN = {"gelu": (nn.gelu, aten.gelu_backward.default)}


def _define(a: Activation) -> tuple[Primitive, Primitive]:
    parameters = "".join(f", float {name}" for name in a.parameters)
    shown = SHOWN.get(a.name, (None, None))

    def vmap_forward(info, in_dims, x, *parameters):
        return forward(x.movedim(in_dims[0], 0), *parameters), 0

    def vmap_backward(info, in_dims, dy, saved, *rest):
        return backward(*fold_batch((dy, saved), in_dims[:2], info.batch_size), *rest), 0

    forward = primitive(
        f"{a.name}_forward(Tensor x{parameters}) -> Tensor",
        formula=a.value,
        aten=ATEN[a.name].forward,
        triton=launcher("activation", "forward", a.name),
        fake=lambda x, *parameters: torch.empty_like(x),
        vmap=vmap_forward,
        traced=_traced(shown[0], a.value),
        sharding=_elementwise(1, 1),
    )
    backward = primitive(
        f"{a.name}_backward(Tensor dy, Tensor saved{parameters}) -> Tensor",
        formula=_in_strides_of_saved(a.backward),
        aten=_in_strides_of_saved(ATEN[a.name].backward),
        triton=launcher("activation", "backward", a.name),
        fake=lambda dy, saved, *parameters: torch.empty_like(saved),
        vmap=vmap_backward,
        traced=_traced(shown[1], a.backward),
        sharding=_elementwise(1, 2),
    )
    return forward, backward


def _define_in_place(a: Activation, run: Callable[..., Tensor]) -> Primitive:
    def by_aten(x, *parameters):
        run(x, *parameters)

    def formula(x, *parameters):
        x.copy_(a.value(x, *parameters))

    return primitive(
        f"{a.name}_forward_(Tensor(a!) x{''.join(f', float {p}' for p in a.parameters)}) -> ()",
        formula=formula,
        aten=by_aten,
        triton=launcher("activation", "forward_", a.name),
        fake=lambda x, *parameters: None,
        sharding=_elementwise(0, 1),
    )


#: name -> (forward, backward)
primitives = {a.name: _define(a) for a in ACTIVATIONS.values()}

#: name -> forward over the input
in_place = {
    name: _define_in_place(ACTIVATIONS[name], by.in_place)
    for name, by in ATEN.items()
    if by.in_place is not None
}

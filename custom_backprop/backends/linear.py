"""Primitives of the linear layer, plain and with an activation.

With S(i) sharded along dimension i, R replicated, P a partial sum, and W (out, in), the layer
y = x Wᵀ + b is computed shard by shard:

    rows      x S(i),  W R,    b R      ->  y S(i);     dy S(i)   ->  dx S(i),  dW P,    db P
    columns   x R,     W S(0), b S(0)   ->  y S(-1);    dy S(-1)  ->  dx P,     dW S(0), db S(0)
    inner     x S(-1), W S(1), b P      ->  y P;        dy R      ->  dx S(-1), dW S(1), db R
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any

import torch

from ..formulas import linear as formula
from ..formulas.activation import ACTIVATIONS
from ..formulas.linear import rows
from .activation import ATEN
from .kernels import kernels
from .library import P, R, primitive
from .selection import get_backend

_product = torch.nn.functional.linear


def _forward(x, weight, bias):
    """torch's product, which of an input that is not 2-D would return a view where there is a
    bias."""
    if x.dim() == 2 or bias is None:
        return _product(x, weight, bias)
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    torch.addmm(bias, rows(x), weight.t(), out=rows(y))
    return y


def _backward(dy, x, weight, need_x, need_weight, need_bias):
    flat = dy if dy.dim() == 2 else rows(dy)
    dx = dw = None
    if need_x:
        dx = torch.mm(flat, weight)
        dx = dx if flat is dy else dx.view(*dy.shape[:-1], weight.shape[1])
    if need_weight:
        dw = torch.mm(flat.t(), x if x.dim() == 2 else rows(x))
    return dx, dw, flat.sum(0) if need_bias else None


def _activation_forward(x, weight, bias, activation, parameters):
    z, by = _forward(x, weight, bias), ATEN[activation]
    if not ACTIVATIONS[activation].saves_output:
        return by.forward(z, *parameters), z
    assert by.in_place is not None
    return by.in_place(z, *parameters), None  # y over z, which then never stands beside it


def _activation_backward(activations, dy, x, weight, saved, activation, parameters, *needs):
    return _backward(activations[activation].backward(dy, saved, *parameters), x, weight, *needs)


def _traced_forward(x, weight, bias, activation, parameters):
    z, a = _product(x, weight, bias), ACTIVATIONS[activation]
    return a.value(z, *parameters), None if a.saves_output else z


def _kernels(name: str) -> Callable[..., Any]:
    """The vendor's product beats ours, which therefore runs only where "triton" is forced."""
    return lambda *args: getattr(kernels("linear"), name)(*args, ours=get_backend() == "triton")


def _fake_forward(x, weight, bias):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _fake_backward(dy, x, weight, need_x, need_weight, need_bias):
    width = dy.shape[-1]
    dx = dy.new_empty(*dy.shape[:-1], weight.shape[1]) if need_x else None
    dw = dy.new_empty(width, x.shape[-1]) if need_weight else None
    return dx, dw, dy.new_empty(width) if need_bias else None


def _fake_activation_forward(x, weight, bias, activation, parameters):
    y = _fake_forward(x, weight, bias)
    return y, None if ACTIVATIONS[activation].saves_output else torch.empty_like(y)


def _sharding(x, weight, bias):
    last = x.dim() - 1
    for i in range(last):
        yield [i], [i, R, R]
    yield [last], [R, 0, 0]
    yield [P], [last, 1, P]


def _activation_sharding(x, weight, bias, activation, parameters):
    """Without the inner one: f of a partial sum is not a part of f of the sum."""
    saves_z = not ACTIVATIONS[activation].saves_output
    for (y,), inputs in _sharding(x, weight, bias):
        if y != P:
            yield [y, y if saves_z else R], inputs


def _backward_sharding(dy, x, weight, *needs):
    last = dy.dim() - 1
    need_x, need_weight, _ = needs

    def one(y, in_x, in_w, *grads):
        outputs = [g if need else R for g, need in zip(grads, needs, strict=True)]
        return outputs, [y, in_x if need_weight else None, in_w if need_x else None]

    yield from (one(i, i, R, i, P, P) for i in range(last))
    yield one(last, R, 0, P, 0, 0)
    yield one(R, last, 1, last, 1, R)


def _activation_backward_sharding(dy, x, weight, saved, *rest):
    for outputs, inputs in _backward_sharding(dy, x, weight, *rest[-3:]):
        yield outputs, [*inputs, inputs[0]]


def _flops(x, weight, *_):
    """x Wᵀ."""
    return 2 * prod(x) * weight[0]


def _backward_flops(dy, x, weight, *rest):
    """dy W and dyᵀ x, those that are needed."""
    need_x, need_weight, _ = rest[-3:]
    return 2 * prod(dy) * ((weight[-1] if need_x else 0) + (x[-1] if need_weight else 0))


_NEEDS = "bool need_x, bool need_weight, bool need_bias"

forward = primitive(
    "linear_forward(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    formula=formula.linear,
    aten=_forward,
    triton=_kernels("forward"),
    fake=_fake_forward,
    traced=_product,
    sharding=_sharding,
    flops=_flops,
)
backward = primitive(
    f"linear_backward(Tensor dy, Tensor? x, Tensor? weight, {_NEEDS}) "
    "-> (Tensor dx, Tensor dw, Tensor db)",
    formula=formula.linear_backward,
    aten=_backward,
    triton=_kernels("backward"),
    fake=_fake_backward,
    traced=_backward,
    sharding=_backward_sharding,
    flops=_backward_flops,
)
activation_forward = primitive(
    "linear_activation_forward(Tensor x, Tensor weight, Tensor? bias, str activation, "
    "float[] parameters) -> (Tensor y, Tensor z)",
    formula=formula.linear_activation,
    aten=_activation_forward,
    triton=_kernels("activation_forward"),
    fake=_fake_activation_forward,
    traced=_traced_forward,
    sharding=_activation_sharding,
    flops=_flops,
)
activation_backward = primitive(
    "linear_activation_backward(Tensor dy, Tensor x, Tensor weight, Tensor saved, "
    f"str activation, float[] parameters, {_NEEDS}) -> (Tensor dx, Tensor dw, Tensor db)",
    formula=formula.linear_activation_backward,
    aten=partial(_activation_backward, ATEN),
    triton=_kernels("activation_backward"),
    fake=lambda dy, x, weight, saved, activation, parameters, *needs: _fake_backward(
        dy, x, weight, *needs
    ),
    traced=partial(_activation_backward, ACTIVATIONS),
    sharding=_activation_backward_sharding,
    flops=_backward_flops,
)

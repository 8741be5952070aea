"""Primitives of the gates."""

from __future__ import annotations

import torch

from ..formulas import gating as formula
from ..formulas.activation import ACTIVATIONS
from ..formulas.precision import HALF
from .activation import ATEN
from .library import R, launcher, primitive

aten = torch.ops.aten

#: f'(a) dy, written over dy, of a, or of y where the activation saves that
OVER_DY = {
    "relu": lambda dy, y: aten.threshold_backward.grad_input(dy, y, 0, grad_input=dy),
    "sigmoid": lambda dy, y: aten.sigmoid_backward.grad_input(dy, y, grad_input=dy),
    "silu": lambda dy, a: aten.silu_backward.grad_input(dy, a, grad_input=dy),
    "gelu": lambda dy, a: aten.gelu_backward.grad_input(dy, a, grad_input=dy),
    "gelu_tanh": lambda dy, a: aten.gelu_backward.grad_input(
        dy, a, approximate="tanh", grad_input=dy
    ),
}


def _forward(x, b, dim, gate_first, f):
    if x.dtype in HALF:
        return formula.gate(x, b, dim, gate_first, f)
    if f == "sigmoid" and b is None and not gate_first:
        return aten.glu.default(x, dim)
    a, value = formula.halves(x, b, dim, gate_first)
    return ATEN[f].forward(a).mul_(value).contiguous()


def _backward(dy, x, b, dim, gate_first, f, *needs):
    if x.dtype in HALF or not all(needs[: 1 if b is None else 2]):
        return formula.gate_backward(dy, x, b, dim, gate_first, f, *needs)
    if f == "sigmoid" and b is None and not gate_first:
        return aten.glu_backward.default(dy, x, dim), None
    a, value = formula.halves(x, b, dim, gate_first)
    dx = x.new_empty(x.shape)
    da, db = formula.halves(dx, b if b is None else b.new_empty(b.shape), dim, gate_first)
    y = ATEN[f].forward(a)
    OVER_DY[f](torch.mul(dy, value, out=da), y if ACTIVATIONS[f].saves_output else a)
    torch.mul(dy, y, out=db)
    return dx, None if b is None else db


def _sharding(x, b, dim, gate_first, f):
    return (([i], [i, i]) for i in range(x.dim()) if b is not None or i != dim)


def _backward_sharding(dy, x, b, dim, gate_first, f, need_a, need_b):
    for (i,), inputs in _sharding(x, b, dim, gate_first, f):
        yield [i if need_a else R, i if need_b and b is not None else R], [i, *inputs]


forward = primitive(
    "gate_forward(Tensor x, Tensor? b, int dim, bool gate_first, str f) -> Tensor",
    formula=formula.gate,
    aten=_forward,
    triton=launcher("gating", "forward"),
    sharding=_sharding,
)
backward = primitive(
    "gate_backward(Tensor dy, Tensor x, Tensor? b, int dim, bool gate_first, str f, bool need_a, "
    "bool need_b) -> (Tensor da, Tensor db)",
    formula=formula.gate_backward,
    aten=_backward,
    triton=launcher("gating", "backward"),
    sharding=_backward_sharding,
)

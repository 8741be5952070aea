"""Neighbours of a model run as one op, where nobody can tell: both are exact classes known here,
nobody hears of their calls, and the tensors fit. Else they are called one after another.

On a CPU some ops gain nothing by it and cost their call: see :func:`takes`. Autocast is not
followed by the sums, and leaves them apart.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import functional as F
from .. import nn
from ..backends.selection import TENSORS, get_backend, is_autocast
from ..formulas.activation import ACTIVATIONS
from ..nn.linear import listened_to, plain_linear
from .activation import NAMES, activation_of
from .generated import made_of
from .norm import RMSNorm

_NAMES = {"LeakyReLU": "leaky_relu"}
#: torch's class, or ours -> the name of its activation
_ACTIVATIONS = {
    kind: _NAMES.get(name, name.lower())
    for name in nn.activation.__all__
    if hasattr(torch.nn, name)
    for kind in (getattr(torch.nn, name), getattr(nn, name))
}


def linear_activation(linear: Any, activation: Any, x: Tensor) -> Tensor:
    """activation(linear(x))."""
    name = None
    if plain_linear(linear) and _takes("linear_activation", x):
        name = name_of_activation(activation)
    if name is None:
        return activation(linear(x))
    parameters = {p: getattr(activation, p) for p in ACTIVATIONS[name].parameters}
    return F.linear_activation(x, linear.weight, linear.bias, name, **parameters)


def dropout_add(dropout: Any, x: Tensor, residual: Tensor, on: frozenset[str]) -> Tensor:
    """dropout(x) + residual. A dropout of torch, whose mask is another one, is called."""
    if "dropout_add" in on and _drops(dropout) and _fit(x, residual):
        return F.dropout_add(x, residual, dropout.p)
    return dropout(x) + residual


def add_norm(
    norm: Any, x: Tensor, residual: Tensor, on: frozenset[str], dropout: Any = None
) -> tuple[Tensor, Tensor]:
    """(norm(h), h), h = dropout(x) + residual. What drops goes with the sum and not the norm."""
    if dropout is not None:
        if "dropout_add" in on and _drops(dropout):
            h = dropout_add(dropout, x, residual, on)
            return norm(h), h
        x = dropout(x)
    op = op_of_norm(type(norm)) if "add_norm" in on and _fit(x, residual) else None
    if op is None or listened_to(norm) or is_autocast(x) or not _takes(op, x):
        h = x + residual
        return norm(h), h
    return _norm_of_sum(norm, op, x, residual)


def is_activation(module: torch.nn.Module) -> bool:
    """Whether there is an op for it."""
    cls = type(module)
    return cls in _ACTIVATIONS or (cls.__module__, cls.__qualname__) in NAMES


def name_of_activation(module: torch.nn.Module) -> str | None:
    """The name of the activation that a module computes, if nobody hears of it."""
    cls: Any = type(module)
    if listened_to(module) or cls not in _ACTIVATIONS or cls.__name__ == "GELU":
        return activation_of(module)
    return _ACTIVATIONS[cls]


def op_of_norm(cls: type) -> str | None:
    """The op for a sum and a norm of this class."""
    if cls in (torch.nn.LayerNorm, nn.LayerNorm):
        return "add_layer_norm"
    made = made_of(cls)
    of_others = made is not None and isinstance(made[1], RMSNorm)
    return "add_rms_norm" if of_others or cls in (torch.nn.RMSNorm, nn.RMSNorm) else None


def _norm_of_sum(norm, op, x, residual):
    w = norm.weight
    if w is not None and w.dtype != x.dtype:
        h = x + residual
        return norm(h), h
    if op == "add_layer_norm":
        return F.add_layer_norm(x, residual, norm.normalized_shape, w, norm.bias, norm.eps)
    made = made_of(type(norm))
    if made is not None:
        rms: Any = made[1]
        return F.add_rms_norm(x, residual, w.shape, w, getattr(norm, rms.epsilon), rms.casting)
    casting = getattr(norm, "casting", "torch")
    return F.add_rms_norm(x, residual, norm.normalized_shape, w, norm.eps, casting)


def _takes(op, x):
    return type(x) in TENSORS and takes(op, x.device.type)


def takes(op: str, device: str) -> bool:
    """Whether an op is taken on a device. On a CPU, unless a backend is forced, those are left that
    are not marked, and save no memory there either. Stock's time over theirs, forward and backward
    in float32, is for linear_activation 0.84 at 32x64 -> 64 and 1.00 at 1024x256 -> 1024, for
    add_layer_norm 0.64 at 64x64 and 0.91 at 1024x256. Of the marked ones add_rms_norm has 1.04 and
    1.51; dropout_add 1.03 and 1.09 over ours one after another.
    """
    if device != "cpu" or get_backend() is not None:
        return True
    return hasattr(getattr(F, op), "gains_on_a_cpu")


def _fit(x, residual):
    both = type(x) in TENSORS and type(residual) in TENSORS
    return both and x.shape == residual.shape and x.dtype == residual.dtype


def _drops(dropout):
    """Whether it is ours, drops anything, and nobody hears of it."""
    drops = type(dropout) is nn.Dropout and dropout.training and dropout.p > 0
    return drops and not listened_to(dropout)

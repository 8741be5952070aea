"""The linear layer y = x Wᵀ + b, and the same followed by an activation.

With y_ro = Σ_i x_ri W_oi + b_o, the loss depends on each entry through the outputs that use it:

    dL/dx_ri = Σ_o dy_ro W_oi      dx = dy W
    dL/dW_oi = Σ_r dy_ro x_ri      dW = dyᵀ x
    dL/db_o  = Σ_r dy_ro           db = Σ_rows dy

With an activation y = f(z), z = x Wᵀ + b, only dz = dy f'(z) replaces dy. This is the delta of
backpropagation (Rumelhart, Hinton and Williams, 1986), delta_i = (W_{i+1}ᵀ delta_{i+1})
f_i'(z_i), dL/dW_i = delta_i a_{i-1}ᵀ.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .activation import ACTIVATIONS
from .precision import widen


def rows(t: Tensor) -> Tensor:
    """(..., n) as (rows, n), even if one of them is 0."""
    return t.reshape(t.shape[:-1].numel(), t.shape[-1])


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., in), weight (out, in), bias (out) or None -> (..., out)."""
    y = widen(x) @ widen(weight).t()
    return (y if bias is None else y + widen(bias)).to(x.dtype)


def linear_backward(
    dy: Tensor, x: Tensor, weight: Tensor, need_x: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dW and db; an empty tensor for each that is not needed."""
    nothing = dy.new_empty(0)
    wide = widen(dy)
    dx = (wide @ widen(weight)).to(dy.dtype) if need_x else nothing
    dw = (rows(wide).t() @ widen(rows(x))).to(dy.dtype) if need_weight else nothing
    db = rows(wide).sum(0).to(dy.dtype) if need_bias else nothing
    return dx, dw, db


def linear_jvp(
    x: Tensor, weight: Tensor, tx: Tensor | None, tw: Tensor | None, tb: Tensor | None
) -> Tensor | None:
    """ty = tx Wᵀ + x tWᵀ + tb."""
    terms = [tx @ weight.t()] if tx is not None else []
    if tw is not None:
        terms.append(x @ tw.t())
    if tb is not None:
        terms.append(tb.expand(*x.shape[:-1], -1))
    return sum(terms[1:], terms[0]) if terms else None


def linear_activation(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, parameters: list[float]
) -> tuple[Tensor, Tensor]:
    """y = f(z), and z if the derivative of f needs it (else an empty tensor)."""
    a = ACTIVATIONS[activation]
    z = linear(x, weight, bias)
    return a.value(z, *parameters), z.new_empty(0) if a.saves_output else z


def linear_activation_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    saved: Tensor,
    activation: str,
    parameters: list[float],
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dz = dy f'; then dx, dW and db of the linear layer."""
    dz = ACTIVATIONS[activation].backward(dy, saved, *parameters)
    return linear_backward(dz, x, weight, need_x, need_weight, need_bias)


def saved_for(activation: str, x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor) -> Tensor:
    """y or z, whichever f' is written with, as a differentiable function of the inputs; z is
    computed again."""
    return (
        y if ACTIVATIONS[activation].saves_output else torch.nn.functional.linear(x, weight, bias)
    )

"""Primitives of the linear layer, plain and with an activation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..formulas import linear as formula
from ..formulas.linear import rows
from . import selection
from .activation import ATEN, ATEN_FORWARD, ATEN_IN_PLACE
from .kernels import kernels
from .library import primitive


def gradients(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx = dy W, dW = dyᵀ x, db = Σ_rows dy by ATen; None for each that is not needed. dx needs the
    weight alone, dW the input."""
    flat = dy if dy.dim() == 2 else rows(dy)
    dx = dw = db = None
    if need_x:
        dx = torch.mm(flat, weight)  # type: ignore[arg-type]
        if flat is not dy:
            dx = dx.view(*dy.shape[:-1], weight.shape[1])  # type: ignore[union-attr]
    if need_weight:
        dw = torch.mm(flat.t(), x if x.dim() == 2 else rows(x))  # type: ignore[union-attr, arg-type]
    if need_bias:
        db = flat.sum(0)
    return dx, dw, db


def _backward(dy: Tensor, x: Tensor, weight: Tensor, *needs: bool) -> tuple[Tensor, ...]:
    return tuple(dy.new_empty(0) if g is None else g for g in gradients(dy, x, weight, *needs))


def _activation_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, parameters: list[float]
) -> tuple[Tensor, Tensor]:
    z = torch.nn.functional.linear(x, weight, bias)
    if formula.ACTIVATIONS[activation].saves_output:  # y over z, which then never stands beside it
        return ATEN_IN_PLACE[activation](z, *parameters), z.new_empty(0)
    return ATEN_FORWARD[activation](z, *parameters), z


def _activation_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    saved: Tensor,
    activation: str,
    parameters: list[float],
    *needs: bool,
) -> tuple[Tensor, ...]:
    return _backward(ATEN[activation][1](dy, saved, *parameters), x, weight, *needs)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raises RuntimeError, as PyTorch's own product does, for shapes or dtypes that do not fit: a
    kernel would not see it."""
    if weight.dim() != 2 or x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise RuntimeError(
            f"linear: an input of shape {tuple(x.shape)} does not fit a weight of shape {tuple(weight.shape)}"
        )
    if x.dtype != weight.dtype or (bias is not None and bias.dtype != weight.dtype):
        got = f"{x.dtype}, {weight.dtype}" + ("" if bias is None else f", {bias.dtype}")
        raise RuntimeError(f"linear: input, weight and bias must have the same dtype, got {got}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise RuntimeError(
            f"linear: a bias of shape {tuple(bias.shape)} does not fit a weight of shape {tuple(weight.shape)}"
        )


def _checked(run: Callable[..., Any]) -> Callable[..., Any]:
    def call(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Any:
        _check(x, weight, bias)
        return run(x, weight, bias, *rest)

    return call


def by_kernels(name: str) -> Callable[..., Any]:
    """A launcher. Forced, its products run in our kernels; else a table of measurements decides
    between them and the vendor's library."""

    def call(*args: Any) -> Any:
        return getattr(kernels("linear"), name)(*args, always=selection._forced == "triton")

    return _checked(call) if name.endswith("forward") else call


def _filled(run: Callable[..., Any]) -> Callable[..., Any]:
    """With an empty tensor for each None, which no primitive returns."""
    return lambda t, *args: tuple(t.new_empty(0) if r is None else r for r in run(t, *args))


def _fake_forward(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _fake_backward(
    dy: Tensor, x: Tensor, weight: Tensor, need_x: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    nothing = dy.new_empty(0)
    dx = dy.new_empty(*dy.shape[:-1], weight.shape[1]) if need_x else nothing
    dw = dy.new_empty(dy.shape[-1], x.shape[-1]) if need_weight else nothing
    return dx, dw, dy.new_empty(dy.shape[-1]) if need_bias else nothing


def _fake_activation_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, parameters: list[float]
) -> tuple[Tensor, Tensor]:
    y = _fake_forward(x, weight, bias)
    return y, x.new_empty(0) if formula.ACTIVATIONS[activation].saves_output else torch.empty_like(
        y
    )


_NEEDS = "bool need_x, bool need_weight, bool need_bias"

forward = primitive(
    "linear_forward(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    formula=_checked(formula.linear),
    aten=torch.nn.functional.linear,
    triton=by_kernels("forward"),
    fake=_checked(_fake_forward),
)
backward = primitive(
    f"linear_backward(Tensor dy, Tensor x, Tensor weight, {_NEEDS}) -> (Tensor dx, Tensor dw, Tensor db)",
    formula=formula.linear_backward,
    aten=_backward,
    triton=_filled(by_kernels("backward")),
    fake=_fake_backward,
)
activation_forward = primitive(
    "linear_activation_forward(Tensor x, Tensor weight, Tensor? bias, str activation, float[] parameters) -> (Tensor y, Tensor z)",
    formula=_checked(formula.linear_activation),
    aten=_activation_forward,
    triton=_filled(by_kernels("activation_forward")),
    fake=_checked(_fake_activation_forward),
)
activation_backward = primitive(
    "linear_activation_backward(Tensor dy, Tensor x, Tensor weight, Tensor saved, str activation, float[] parameters, "
    f"{_NEEDS}) -> (Tensor dx, Tensor dw, Tensor db)",
    formula=formula.linear_activation_backward,
    aten=_activation_backward,
    triton=_filled(by_kernels("activation_backward")),
    fake=lambda dy, x, weight, saved, activation, parameters, *needs: _fake_backward(
        dy, x, weight, *needs
    ),
)

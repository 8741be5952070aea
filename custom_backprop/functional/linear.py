"""The linear layer: ``linear`` as in ``torch.nn.functional``, and ``linear_activation``, both in
one Function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..formulas.activation import ACTIVATIONS
from ..ops import linear as ops
from ..ops.activation import number

__all__ = ["linear", "linear_activation"]

#: the parameters of each activation that has a default for all
_DEFAULTS: dict[str, tuple[Any, ...]] = {
    n: tuple(a.parameters.values())
    for n, a in ACTIVATIONS.items()
    if None not in a.parameters.values()
}


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x Wᵀ + b;  dx = dy W, dW = dyᵀ x, db = Σ_rows dy.

    Args:
        input: (..., in_features).
        weight: (out_features, in_features), or without a bias (in_features), which gives an output
            without the last dimension.
        bias: (out_features), or what broadcasts with the output.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit.
        TypeError: one is no tensor.
    """
    if bias is None and isinstance(weight, Tensor) and weight.dim() == 1:
        return ops.linear(input, weight.unsqueeze(0), None).squeeze(-1)
    if isinstance(bias, Tensor) and bias.dim() != 1:
        return torch.add(ops.linear(input, weight, None), bias)
    return ops.linear(input, weight, bias)


def linear_activation(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "relu",
    **parameters: float,
) -> Tensor:
    """y = f(z), z = x Wᵀ + b;  dz = dy f', dx = dz W, dW = dzᵀ x, db = Σ_rows dz.

    One Function for both: where f' can be written with y, z is never kept, and dz and db come from
    one pass.

    Args:
        input, weight, bias: as in :func:`linear`, ``weight`` with two dimensions.
        activation: the name of an activation of :mod:`custom_backprop.functional` ("gelu_tanh" is
            gelu's tanh form).
        parameters: the activation's own parameters by name, such as ``negative_slope=0.1``.

    Raises:
        ValueError: no activation of that name.
        TypeError: it has no such parameter, one without a default is missing, or something is no
            tensor or no number.
        RuntimeError: shapes, dtypes or devices do not fit.
    """
    return ops.linear_activation(
        input, weight, bias, activation, activation_parameters(activation, parameters)
    )


def activation_parameters(activation: str, given: dict[str, float]) -> tuple[float, ...]:
    """The parameters of an activation in order, defaults filled in.

    Raises:
        ValueError, TypeError: as :func:`linear_activation`.
    """
    if not given and activation in _DEFAULTS:
        return _DEFAULTS[activation]
    if activation not in ACTIVATIONS:
        raise ValueError(f"no activation {activation!r}: choose one of {', '.join(ACTIVATIONS)}")
    known = ACTIVATIONS[activation].parameters
    if unknown := [name for name in given if name not in known]:
        raise TypeError(
            f"{activation} has no parameter {', '.join(unknown)}; it has {', '.join(known) or 'none'}"
        )
    values = [given.get(name, default) for name, default in known.items()]
    if missing := [name for name, value in zip(known, values, strict=True) if value is None]:
        raise TypeError(f"{activation} needs a value for {', '.join(missing)}")
    return tuple(number(activation, value) for value in values)

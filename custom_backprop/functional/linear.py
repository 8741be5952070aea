"""The linear layer: ``linear`` as in ``torch.nn.functional``, and ``linear_activation``, both in
one Function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends.activation import ATEN
from ..formulas.activation import ACTIVATIONS
from ..ops import linear as ops
from ..ops.activation import activations
from ..ops.route import overridable
from .arguments import cast_to_one_dtype, not_tensors, number

__all__ = ["linear", "linear_activation"]

#: the parameters of each activation that has a default for all
_DEFAULTS: dict[str, tuple[Any, ...]] = {
    n: tuple(a.parameters.values())
    for n, a in ACTIVATIONS.items()
    if None not in a.parameters.values()
}


@overridable
def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x Wᵀ + b;  dx = dy W, dW = dyᵀ x, db = Σ_rows dy.

    Args:
        input: (..., in_features).
        weight: (out_features, in_features), or without a bias (in_features), which gives an output
            without the last dimension.
        bias: (out_features), or of fewer elements what broadcasts to the output.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit.
        TypeError: one is not a tensor.
    """
    _check("linear", input, weight, bias)
    if input.dim() == 1:  # as a row: what comes of it is then a view that autograd knows
        return linear(input.unsqueeze(0), weight, bias).squeeze(0)
    if weight.dim() == 1:
        return ops.linear(input, weight.unsqueeze(0), None).squeeze(-1)
    if bias is not None and bias.shape != weight.shape[:1]:
        return ops.linear(input, weight, None) + bias
    return ops.linear(input, weight, bias)


@overridable
def linear_activation(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "relu",
    **parameters: float,
) -> Tensor:
    """y = f(z), z = x Wᵀ + b;  dz = dy f', dx = dz W, dW = dzᵀ x, db = Σ_rows dz.

    One Function for both: where f' can be written with y, z is not saved, and dz and db come from
    one pass. It is two where autocast wants f in another dtype than the product.

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
    _check("linear_activation", input, weight, bias)
    if weight.dim() != 2:
        raise RuntimeError(
            f"linear_activation: expected a weight of two dimensions, got {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        bias = bias.reshape(-1).expand(weight.shape[0])
    if input.dim() == 1:
        row = input.unsqueeze(0)
        return linear_activation(row, weight, bias, activation, **parameters).squeeze(0)
    values = None if parameters else _DEFAULTS.get(activation)
    if values is None:
        values = activation_parameters(activation, parameters)
    if input.is_cuda and torch.is_autocast_enabled("cuda") and ATEN[activation].float32_on_cuda:
        return activations[activation](ops.linear(input, weight, bias), *values)
    return ops.linear_activation(input, weight, bias, activation, values)


def _check(name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raises what stock's product raises: a kernel would not see it."""
    given = (x, weight) if bias is None else (x, weight, bias)
    for t in given:
        if not isinstance(t, Tensor):
            raise not_tensors(name, *given)
    if x.is_nested:
        return  # stock's own checks follow
    if not x.dim() or weight.dim() not in (1, 2) or x.shape[-1] != weight.shape[-1]:
        raise RuntimeError(
            f"{name}: an input of shape {tuple(x.shape)} does not fit a weight of shape "
            f"{tuple(weight.shape)}"
        )
    if bias is not None and weight.dim() == 1:
        raise RuntimeError(f"{name}: a weight of one dimension takes no bias")
    if bias is not None and bias.shape != weight.shape[:1] and not _fits(bias, x, weight):
        raise RuntimeError(
            f"{name}: a bias of shape {tuple(bias.shape)} does not fit a weight of shape "
            f"{tuple(weight.shape)}"
        )
    differ = x.dtype != weight.dtype or (bias is not None and bias.dtype != weight.dtype)
    if differ and not cast_to_one_dtype(*given):
        got = ", ".join(str(t.dtype) for t in given)
        raise RuntimeError(f"{name}: input, weight and bias must have the same dtype, got {got}")


def _fits(bias: Tensor, x: Tensor, weight: Tensor) -> bool:
    """Whether ``bias`` broadcasts to the output and leaves its shape."""
    shape = (*x.shape[:-1], weight.shape[0])
    pairs = zip(reversed(bias.shape), reversed(shape), strict=False)
    return bias.dim() <= len(shape) and all(b in (1, n) for b, n in pairs)


def activation_parameters(activation: str, given: dict[str, float]) -> tuple[float, ...]:
    """The parameters of an activation in order, defaults filled in.

    Raises:
        ValueError, TypeError: as :func:`linear_activation`.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"no activation {activation!r}: choose one of {', '.join(ACTIVATIONS)}")
    known = ACTIVATIONS[activation].parameters
    if unknown := [name for name in given if name not in known]:
        raise TypeError(
            f"{activation} has no parameter {', '.join(unknown)}; "
            f"it has {', '.join(known) or 'none'}"
        )
    values = {name: given.get(name, default) for name, default in known.items()}
    if missing := [name for name, value in values.items() if value is None]:
        raise TypeError(f"{activation} needs a value for {', '.join(missing)}")
    return tuple(number(activation, value) for value in values.values())

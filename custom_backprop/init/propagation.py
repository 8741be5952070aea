"""What a layer with an activation does to variance and gradients, in three integrals."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch

from ..formulas.activation import ACTIVATIONS
from ..functional.linear import activation_parameters


class Propagation(NamedTuple):
    """What one layer with an activation does to unit variance, with its gain."""

    gain: float
    gradient: float
    slope: float


@lru_cache(maxsize=64)
def _propagation(activation: str, parameters: tuple[float, ...]) -> Propagation:
    """The three integrals over the normal density, by the trapezoidal rule, to about ten digits."""
    z = torch.linspace(-12, 12, 480_001, dtype=torch.float64)
    density = torch.exp(-z * z / 2)
    density /= density.sum()
    f = ACTIVATIONS[activation]
    y = f.value(z, *parameters)
    slope = f.derivative(y if f.saves_output else z, *parameters)

    square, squared_slope, drift = (
        torch.dot(density, x).item() for x in (y * y, slope * slope, y * y * (z * z - 1) / 2)
    )
    return Propagation(square**-0.5, math.sqrt(squared_slope / square), drift / square)


def propagation(activation: str, **parameters: float) -> Propagation:
    """g, b and s of the table in :mod:`custom_backprop.init`.

    Args:
        activation: "linear", or the name of an activation of :mod:`custom_backprop.functional`.
        parameters: the activation's own, such as ``negative_slope=0.1``.

    Raises:
        ValueError: there is no activation of that name.
        TypeError: it has no such parameter.
    """
    if activation == "linear" and not parameters:
        return Propagation(1.0, 1.0, 1.0)
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"no activation {activation!r}: choose one of linear, {', '.join(ACTIVATIONS)}"
        )
    return _propagation(activation, activation_parameters(activation, parameters))


def gain(activation: str, **parameters: float) -> float:
    """g = E[f(z)²]^(-1/2) for z ~ N(0, 1): the standard deviation of √fan_in · w that preserves the
    variance.

    Arguments and errors are those of :func:`propagation`. For relu and leaky_relu it equals
    ``torch.nn.init.calculate_gain``. That has 5/3 for tanh, 1 for sigmoid and 3/4 for selu, from
    other rules, which preserve other quantities.
    """
    return propagation(activation, **parameters).gain

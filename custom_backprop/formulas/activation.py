"""Activations y = f(x), elementwise, and their derivatives.

The chain rule for an elementwise f is one product: dL/dx_i = dL/dy_i * f'(x_i). So an activation is a pair (f, f'). Where f' can be
written with y = f(x) alone, y is what backward keeps: the next layer keeps it as its input anyway, so it costs no memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Activation:
    """One activation.

    Attributes:
        value: f, as ``value(x, *parameters)``.
        derivative: f', as ``derivative(saved, *parameters)``, where ``saved`` is x, or y if ``saves_output``.
        parameters: the names of the parameters and their defaults, in order.
        formula: what ``check`` prints.
    """

    name: str
    formula: str
    value: Callable[..., Tensor]
    derivative: Callable[..., Tensor]
    saves_output: bool = False
    parameters: dict[str, float] = field(default_factory=dict)

    def backward(self, dy: Tensor, saved: Tensor, *parameters: float) -> Tensor:
        """dx = dy * f'."""
        return dy * self.derivative(saved, *parameters)


def silu(x: Tensor) -> Tensor:
    """y = x s with s = 1 / (1 + e^-x)."""
    return x * torch.sigmoid(x)


def silu_derivative(x: Tensor) -> Tensor:
    """f' = s + x s (1 - s), since s' = s (1 - s)."""
    s = torch.sigmoid(x)
    return s * (1 + x * (1 - s))


def relu(x: Tensor) -> Tensor:
    """y = max(x, 0)."""
    return x.clamp_min(0)


def relu_derivative(y: Tensor) -> Tensor:
    """f' = 1 where y > 0 (which is where x > 0), else 0: torch's choice of the subgradient at 0."""
    return (y > 0).to(y.dtype)


ACTIVATIONS = {
    a.name: a
    for a in (
        Activation("relu", "y = max(x, 0);  dx = dy [y > 0]", relu, relu_derivative, saves_output=True),
        Activation("silu", "y = x s(x);  dx = dy s (1 + x (1 - s))", silu, silu_derivative),
    )
}

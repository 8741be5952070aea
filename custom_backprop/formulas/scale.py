"""A gradient that was made in forward, times the gradient of the loss.

A loss L = Σ l_i is one number. Where forward computes g = ∂L/∂x beside it, the chain rule leaves
one product to backward: with dy = ∂(what is differentiated)/∂L, which has one element,

    dx = dy g.
"""

from __future__ import annotations

from torch import Tensor

from .precision import rounded_once


@rounded_once
def scale(grad: Tensor, dy: Tensor) -> Tensor:
    """dx of g and dy."""
    return grad * dy


def scale_(grad: Tensor, dy: Tensor) -> None:
    """The same over g."""
    grad.copy_(scale(grad, dy))

"""The parametric ReLU (He et al., 2015): a leaky ReLU with learned slopes, one for all channels or
one for each.

With y_i = x_i where x_i > 0, else w_c x_i, for an element i of channel c:

    dL/dx_i = dL/dy_i ([x_i > 0] + w_c [x_i <= 0])
    dL/dw_c = Σ_{i in c} dL/dy_i x_i [x_i <= 0],

since the loss depends on w_c through each element of its channel that is not positive.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .constant import with_zero_slope
from .precision import rounded_once, widen


def spread(weight: Tensor, x: Tensor) -> Tensor:
    """A weight of one element or of C, in a shape that broadcasts along dimension 1 of x."""
    return (
        weight.reshape(1, -1, *[1] * (x.dim() - 2))
        if x.dim() > 1
        else weight.reshape([1] * x.dim())
    )


def summed(t: Tensor, weight: Tensor) -> Tensor:
    """The sum of t over all elements that share one of the weight, in the weight's shape."""
    each = t.dim() > 1 and weight.numel() != 1
    return t.sum([d for d in range(t.dim()) if d != 1 or not each]).reshape(weight.shape)


@rounded_once
def prelu(x: Tensor, weight: Tensor) -> Tensor:
    """x (N, C, ...), or of fewer dimensions with one weight; weight (C) or one element."""
    return torch.where(x > 0, x, spread(weight, x) * x)


def prelu_backward(
    dy: Tensor, x: Tensor, weight: Tensor, need_x: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    """dx and dw; an empty tensor for one that is not needed."""
    dtype, nothing = dy.dtype, dy.new_empty(0)
    dy, x, weight = widen(dy), widen(x), widen(weight)
    dx = (
        with_zero_slope(torch.where(x > 0, dy, spread(weight, x) * dy), x).to(dtype)
        if need_x
        else nothing
    )
    dw = (
        with_zero_slope(summed(torch.where(x > 0, 0.0, x * dy), weight), weight).to(dtype)
        if need_weight
        else nothing
    )
    return dx, dw


def prelu_jvp(x: Tensor, weight: Tensor, tx: Tensor | None, tw: Tensor | None) -> Tensor | None:
    """ty = tx ([x > 0] + w [x <= 0]) + tw x [x <= 0]."""
    of_x = None if tx is None else torch.where(x > 0, tx, spread(weight, x) * tx)
    of_weight = None if tw is None else torch.where(x > 0, 0.0, spread(tw, x) * x)
    return of_weight if of_x is None else of_x if of_weight is None else of_x + of_weight

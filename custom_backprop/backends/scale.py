"""Primitives that scale a gradient held since forward by the gradient of the loss, into a new
tensor or over the old one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..formulas.precision import rounded_once
from .kernels import kernels
from .library import primitive


def _formula(grad: Tensor, dy: Tensor) -> Tensor:
    """dx = dy g, with a dy of one element."""
    return rounded_once(lambda g, d: g * d)(grad, dy)


def _formula_(grad: Tensor, dy: Tensor) -> None:
    grad.copy_(_formula(grad, dy))


def scale_aten_(grad: Tensor, dy: Tensor) -> None:
    """What :data:`scale_` is on a CPU."""
    if dy.item() != 1:  # on a CPU reading a number is free; a pass over the gradient is not
        grad.mul_(dy)


def _vmap(info: Any, in_dims: Any, grad: Tensor, dy: Tensor) -> tuple[Tensor, int]:
    grad = grad if in_dims[0] is None else grad.movedim(in_dims[0], 0)
    if in_dims[1] is None:
        return scale(grad, dy), 0
    dims = (-1, *[1] * (grad.dim() - (in_dims[0] is not None)))
    return grad * dy.movedim(in_dims[1], 0).reshape(dims), 0


scale = primitive(
    "scale(Tensor grad, Tensor dy) -> Tensor",
    formula=_formula,
    aten=torch.mul,
    triton=lambda grad, dy: kernels("scale").scale(grad, dy),
    fake=lambda grad, dy: torch.empty_like(grad),
    vmap=_vmap,
)
scale_ = primitive(
    "scale_(Tensor(a!) grad, Tensor dy) -> ()",
    formula=_formula_,
    aten=scale_aten_,
    triton=lambda grad, dy: kernels("scale").scale_(grad, dy),
    fake=lambda grad, dy: None,
)

"""Primitives that multiply a gradient made in forward by the gradient of the loss, into a new
tensor or over the old one."""

from __future__ import annotations

import torch

from ..formulas import scale as formula
from .library import P, R, launcher, primitive


def _aten_(grad, dy):
    if dy.item() != 1:  # on a CPU reading a number is free; a pass over the gradient is not
        grad.mul_(dy)


def _vmap(info, in_dims, grad, dy):
    grad = grad if in_dims[0] is None else grad.movedim(in_dims[0], 0)
    if in_dims[1] is None:
        return scale(grad, dy), 0
    dims = (-1, *[1] * (grad.dim() - (in_dims[0] is not None)))
    return grad * dy.movedim(in_dims[1], 0).reshape(dims), 0


def _sharding(grad, dy):
    return (([i], [i, R]) for i in (P, *range(grad.dim())))


scale = primitive(
    "scale(Tensor grad, Tensor dy) -> Tensor",
    formula=formula.scale,
    aten=torch.mul,
    triton=launcher("scale", "scale"),
    fake=lambda grad, dy: torch.empty_like(grad),
    vmap=_vmap,
    sharding=_sharding,
)
scale_ = primitive(
    "scale_(Tensor(a!) grad, Tensor dy) -> ()",
    formula=formula.scale_,
    aten=_aten_,
    triton=launcher("scale", "scale_"),
    fake=lambda grad, dy: None,
    sharding=lambda grad, dy: (([], inputs) for _, inputs in _sharding(grad, dy)),
)

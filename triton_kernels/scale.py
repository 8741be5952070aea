"""dx = dy g for a g computed in forward and a dy of one element, read on the device: no synchronisation, and no pass where dy is 1."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import BLOCK, upcast
from .launch import bind, cdiv, kept


@triton.jit
def _scale(G, DY, DX, n, IN_PLACE: tl.constexpr, BLOCK: tl.constexpr):
    """dx = dy g, BLOCK elements a program. In place (DX is G) there is nothing to do where dy is 1."""
    dy = upcast(tl.load(DY))
    if IN_PLACE:
        n = tl.where(dy == 1, 0, n)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = tl.arange(0, BLOCK)
    inside = offsets < tl.minimum(n - start, BLOCK).to(tl.int32)
    g = upcast(tl.load(G + start + offsets, inside, other=0.0))
    tl.store(DX + start + offsets, (dy * g).to(DX.dtype.element_ty), inside)


@kept
def _bound(in_place: bool) -> Any:
    return bind(_scale, 3, 1, IN_PLACE=in_place, BLOCK=BLOCK)


def scale(grad: Tensor, dy: Tensor) -> Tensor:
    """dy g in a new tensor, for a dense ``grad`` of any strides."""
    dx, n = torch.empty_like(grad), grad.numel()
    _bound(False)(cdiv(n, BLOCK), grad, dy, dx, n)
    return dx


def scale_(grad: Tensor, dy: Tensor) -> None:
    """dy g over ``grad``, which is dense."""
    n = grad.numel()
    _bound(True)(cdiv(n, BLOCK), grad, dy, grad, n)

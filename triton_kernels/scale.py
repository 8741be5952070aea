"""dx = dy g for a g computed in forward and a dy of one element, read on the device: no
synchronisation, and no pass where dy is 1."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import BLOCK
from .elementary import upcast
from .launch import bind, cdiv, kept, multiprocessors


@triton.jit
def _scale(G, DY, DX, n, blocks, IN_PLACE: tl.constexpr, BLOCK: tl.constexpr):
    """dx = dy g, ``blocks`` blocks a program. In place (DX is G) there is nothing to do where dy is
    1."""
    dy = upcast(tl.load(DY))
    if IN_PLACE:
        blocks = tl.where(dy == 1, 0, blocks)
    first = tl.program_id(0).to(tl.int64) * blocks
    offsets = tl.arange(0, BLOCK)
    for block in range(blocks):
        start = (first + block) * BLOCK
        inside = offsets < tl.minimum(n - start, BLOCK).to(tl.int32)
        g = upcast(tl.load(G + start + offsets, inside, other=0.0))
        tl.store(DX + start + offsets, (dy * g).to(DX.dtype.element_ty), inside)


# programs a multiprocessor: where dy is 1 each of them is only begun and ended, which takes as long
# as a kilobyte
PROGRAMS = 16


@kept
def _bound(in_place: bool) -> Any:
    return bind(_scale, 3, 2, IN_PLACE=in_place, BLOCK=BLOCK)


def _run(grad: Tensor, dy: Tensor, dx: Tensor) -> None:
    n = grad.numel()
    count = cdiv(n, BLOCK)
    blocks = cdiv(count, PROGRAMS * multiprocessors(grad.device))
    _bound(dx is grad)(cdiv(count, max(blocks, 1)), grad, dy, dx, n, blocks)


def scale(grad: Tensor, dy: Tensor) -> Tensor:
    """dy g in a new tensor, for a dense ``grad`` of any strides."""
    dx = torch.empty_like(grad)
    _run(grad, dy, dx)
    return dx


def scale_(grad: Tensor, dy: Tensor) -> None:
    """dy g over ``grad``, which is dense."""
    _run(grad, dy, grad)

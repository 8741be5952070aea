"""dx = dy g for a g computed in forward and a dy of one element, read on the device: no
synchronisation, and no pass where dy is 1."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from .elementary import upcast
from .launch import Launch, cdiv, kernel, multiprocessors, planned
from .pointwise import block_for, block_of
from .rows import read, write

#: programs a multiprocessor: where dy is 1 each of them only begins and ends, which takes as long
#: as a kilobyte
PROGRAMS = 16


@kernel
def _scale(G, DY, DX, n, blocks, IN_PLACE: tl.constexpr, BLOCK: tl.constexpr):
    """dx = dy g, ``blocks`` blocks a program. In place there is nothing to do where dy is 1."""
    dy = upcast(tl.load(DY))
    first = tl.program_id(0).to(tl.int64) * blocks
    if IN_PLACE:
        blocks = tl.where(dy == 1, 0, blocks)
    for block in range(blocks):
        start, offsets, inside = block_of(first + block, n, BLOCK)
        write(DX + start, offsets, inside, dy * read(G + start, offsets, inside))


@planned
def plan(n: int, dtype: torch.dtype, count: int, in_place: bool) -> Launch:
    """Of ``n`` elements on ``count`` multiprocessors."""
    block = block_for(dtype)
    blocks = max(cdiv(cdiv(n, block), PROGRAMS * count), 1)
    programs = cdiv(cdiv(n, block), blocks)
    return _scale.launch(programs, n=n, blocks=blocks, IN_PLACE=in_place, BLOCK=block)


def scale(grad: Tensor, dy: Tensor) -> Tensor:
    """dy g in a new tensor, for a dense ``grad`` of any strides."""
    dx = torch.empty_like(grad)
    plan(grad.numel(), grad.dtype, multiprocessors(grad.device), False)(grad, dy, dx)
    return dx


def scale_(grad: Tensor, dy: Tensor) -> None:
    """dy g over ``grad``, which is dense."""
    plan(grad.numel(), grad.dtype, multiprocessors(grad.device), True)(grad, dy, grad)

"""Elementwise kernels: a value and its derivative, one block of a dense tensor a program.

The functions that they apply are compile-time constants: ``F(x, A, B, HALF)`` takes x in the
accumulator's dtype, two parameters, and whether x came from 16 bits. (A float argument of a kernel
would be float32, which rounds a parameter in float64.)
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .elementary import half
from .launch import cdiv, kernel
from .rows import read, write

#: elements a program of kernels with several operands: 8 a thread at 4 warps, two 128-bit accesses
#: of float32
BLOCK = 1024


@triton.jit
def block_of(index, n, BLOCK: tl.constexpr):
    """(start, offsets, inside) of a block. The start is int64, so that no tensor is too large."""
    start = index.to(tl.int64) * BLOCK
    offsets = tl.arange(0, BLOCK)
    return start, offsets, offsets < tl.minimum(n - start, BLOCK).to(tl.int32)


@kernel
def forward(X, Y, n, F: tl.constexpr, A: tl.constexpr, B: tl.constexpr, BLOCK: tl.constexpr):
    """y = f(x)."""
    start, offsets, inside = block_of(tl.program_id(0), n, BLOCK)
    write(Y + start, offsets, inside, F(read(X + start, offsets, inside), A, B, half(X)))


@kernel
def backward(
    DY, SAVED, DX, n, F: tl.constexpr, A: tl.constexpr, B: tl.constexpr, BLOCK: tl.constexpr
):
    """dx = dy f'(saved)."""
    start, offsets, inside = block_of(tl.program_id(0), n, BLOCK)
    dy = read(DY + start, offsets, inside)
    saved = read(SAVED + start, offsets, inside)
    write(DX + start, offsets, inside, dy * F(saved, A, B, half(SAVED)))


def block_for(dtype: torch.dtype) -> int:
    """Elements of two 128-bit accesses a thread at 4 warps."""
    return 4 * BLOCK // dtype.itemsize


def grid(n: int, dtype: torch.dtype) -> dict[str, Any]:
    """What a launch over ``n`` elements takes: two 128-bit accesses a thread, one of float64, whose
    elements take two registers. Half precision shares a program's cost among twice as many."""
    block = block_for(dtype)
    warps = 8 if dtype == torch.float64 else 4
    return {"programs": cdiv(n, block), "n": n, "BLOCK": block, "num_warps": warps}


def like(t: Tensor, layout: Tensor) -> Tensor:
    """``t`` with the strides of ``layout`` (copied only if they differ)."""
    return t if t.stride() == layout.stride() else torch.empty_like(layout, dtype=t.dtype).copy_(t)

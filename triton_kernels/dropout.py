"""Dropout by a mask that is made where it is needed: one pass each way, and nothing is stored.

Words come from Philox 4x32-7. Its four results are those of four neighbours, so that an element
costs a quarter of a call. Formulas: ``custom_backprop/formulas/dropout.py``.

For other kernels: :func:`word_of` is the word of any element, :func:`words_of` those of a block,
and :func:`words_at` those of a tile. An element is kept where its word is not below p 2^32.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, cdiv, kernel, next_power_of_2, planned
from .pointwise import block_of, grid, like
from .rows import read, write

#: of Philox: with seven an element takes 18 instructions, with Triton's ten it takes 23
ROUNDS = tl.constexpr(7)


@triton.jit
def word_of(seed, index):
    """The random uint32 of each element: ``index`` is a block of numbers of elements, of int32 or
    int64, and ``seed`` the int64 that was drawn for the call."""
    first, second, third, fourth = tl.randint4x(seed, index >> 2, ROUNDS)
    lane = index & 3
    return tl.where(
        lane < 2, tl.where(lane == 0, first, second), tl.where(lane == 2, third, fourth)
    )


@triton.jit
def _fours(seed, counter):
    """Those of 4 ``counter`` to 4 ``counter`` + 3, in two new dimensions."""
    first, second, third, fourth = tl.randint4x(seed, counter, ROUNDS)
    return tl.join(tl.join(first, third), tl.join(second, fourth))


@triton.jit
def words_of(seed, start, BLOCK: tl.constexpr):
    """Those of the BLOCK elements from ``start`` on, both multiples of 4, at a quarter of the
    cost."""
    return _fours(seed, start // 4 + tl.arange(0, BLOCK // 4)).reshape(BLOCK)


@triton.jit
def words_at(seed, counter):
    """(M, 4 N) words, of four neighbours for each of (M, N) counters."""
    return _fours(seed, counter).reshape(counter.shape[0], 4 * counter.shape[1])


@triton.jit
def _dropped(x, keep, scale, add, instead, SHIFTED: tl.constexpr):
    """y of a block. A NaN that is dropped stays one, as in torch."""
    zero = tl.zeros((), x.dtype)
    y = x * tl.where(keep, tl.full((), scale, x.dtype), zero)
    if SHIFTED:
        y += tl.where(keep, tl.full((), add, x.dtype), tl.full((), instead, x.dtype))
    return y


@kernel
def _elements(
    X, RESIDUAL, SEED, Y, n, threshold: tl.uint32, scale: tl.float64, add: tl.float64,
    instead: tl.float64, SHIFTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y = r + m a x + b, one word an element."""
    start, offsets, inside = block_of(tl.program_id(0), n, BLOCK)
    keep = words_of(tl.load(SEED), start, BLOCK) >= threshold
    y = _dropped(read(X + start, offsets, inside), keep, scale, add, instead, SHIFTED)
    if RESIDUAL is not None:
        y += read(RESIDUAL + start, offsets, inside)
    write(Y + start, offsets, inside, y)


@kernel
def _features(
    X, SEED, Y, rows, n, blocks, threshold: tl.uint32, scale: tl.float64, add: tl.float64,
    instead: tl.float64, SHIFTED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y = m a x + b of (rows, n), one word a row."""
    row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    keep = (word_of(tl.load(SEED), row) >= threshold)[:, None]
    place = row[:, None] * n + column[None, :]
    inside = (row < rows)[:, None] & (column < n)[None, :]
    write(Y, place, inside, _dropped(read(X, place, inside), keep, scale, add, instead, SHIFTED))


@planned
def plan(shape: tuple[int, ...], features: bool, shifted: bool, dtype: torch.dtype) -> Launch:
    """Of a contiguous tensor, without the numbers, which may be others at every call."""
    n = math.prod(shape)
    if not features:
        return _elements.launch(**grid(n, dtype), SHIFTED=shifted)
    rows, size = shape[0] * shape[1], grid(n, dtype)["BLOCK"]
    n //= rows
    block = min(next_power_of_2(n), size)
    tile, blocks = min(next_power_of_2(rows), size // block), cdiv(n, block)
    return _features.launch(
        cdiv(rows, tile) * blocks, rows=rows, n=n, blocks=blocks, SHIFTED=shifted, ROWS=tile,
        BLOCK=block, num_warps=8 if dtype == torch.float64 else 4,
    )  # fmt: skip


def dropout(
    x: Tensor, residual: Tensor | None, seed: Tensor, threshold: int, scale: float, add: float,
    instead: float, features: bool, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """y of ``dtype``, with the strides of x if it is dense: scale x + add where a word is not below
    ``threshold``, else ``instead``; plus the residual, if not ``features``. Backward is the same of
    dy."""
    rows, residual = x.contiguous(), None if residual is None else residual.contiguous()
    y = torch.empty_like(rows, dtype=dtype)
    if x.numel():
        launch = plan(tuple(x.shape), features, bool(add or instead), x.dtype)
        numbers = {"threshold": threshold, "scale": scale, "add": add, "instead": instead}
        tensors = (rows, seed, y) if features else (rows, residual, seed, y)
        launch(*tensors, **numbers)
    return y if x.is_contiguous() else like(y, x)

"""Vectors divided by their norms: a kernel each way on rows, and their launchers.

Formulas: ``custom_backprop/formulas/normalize.py``.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from .launch import Launch, accumulator, kernel, multiprocessors, planned
from .rows import over_rows, read, rows_of, tile_of, write


@kernel
def _forward(
    X, Y, R, rows, n, tiles, x_row, EPS: tl.constexpr, SEVERAL: tl.constexpr, LOOP: tl.constexpr,
    WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y = x / r and r = max(‖x‖, ε)."""
    first = tl.program_id(0)
    for tile in range(first, tiles if SEVERAL else first + 1, tl.num_programs(0) if SEVERAL else 1):
        row, alive, column = tile_of(tile, rows, ROWS, BLOCK, WIDE, False)
        x_start, y_start = X + (row * x_row)[:, None], Y + (row * n)[:, None]
        inside = alive[:, None] & (column < n)
        x = read(x_start, column, inside)
        square = x * x
        if LOOP:
            for start in range(BLOCK, n, BLOCK):
                more = read(x_start, start + column, alive[:, None] & (start + column < n))
                square += more * more
        r = tl.sqrt(tl.sum(square, 1))
        r = tl.where(r < EPS, EPS, r)
        tl.store(R + row, r, alive)
        write(y_start, column, inside, x / r[:, None])
        if LOOP:
            for start in range(BLOCK, n, BLOCK):
                inside = alive[:, None] & (start + column < n)
                x = read(x_start, start + column, inside)
                write(y_start, start + column, inside, x / r[:, None])


@kernel
def _backward(
    DY, Y, R, DX, rows, n, tiles, dy_row, EPS: tl.constexpr, SEVERAL: tl.constexpr,
    LOOP: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx = (dy - y Σ y dy) / r."""
    first = tl.program_id(0)
    for tile in range(first, tiles if SEVERAL else first + 1, tl.num_programs(0) if SEVERAL else 1):
        row, alive, column = tile_of(tile, rows, ROWS, BLOCK, WIDE, False)
        dy_start, y_start = DY + (row * dy_row)[:, None], (row * n)[:, None]
        inside = alive[:, None] & (column < n)
        dy = read(dy_start, column, inside)
        y = read(Y + y_start, column, inside)
        product = dy * y
        if LOOP:
            for start in range(BLOCK, n, BLOCK):
                place = start + column
                more = alive[:, None] & (place < n)
                product += read(dy_start, place, more) * read(Y + y_start, place, more)
        r = tl.load(R + row, alive, other=1.0)
        along = tl.where(r > EPS, tl.sum(product, 1), 0.0)[:, None]
        write(DX + y_start, column, inside, (dy - y * along) / r[:, None])
        if LOOP:
            for start in range(BLOCK, n, BLOCK):
                place = start + column
                inside = alive[:, None] & (place < n)
                dy = read(dy_start, place, inside)
                y = read(Y + y_start, place, inside)
                write(DX + y_start, place, inside, (dy - y * along) / r[:, None])


@planned
def plan(
    backward: bool, rows: int, n: int, stride: int, dtype: torch.dtype, count: int, eps: float
) -> Launch:
    """Of rows of which x or dy has this stride."""
    kernel, given = (_backward, "dy_row") if backward else (_forward, "x_row")
    layouts = [(stride, 1, 1), (n, 1, 1)]
    named = {given: stride, "EPS": eps}
    live = 8 if dtype == torch.float64 else 4
    return over_rows(kernel, (rows, n, 1), layouts, dtype, live, count, **named)


def forward(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y, contiguous, and r."""
    flat, count = rows_of(x), multiprocessors(x.device)
    y, r = x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=accumulator(x.dtype))
    plan(False, *flat.shape, flat.stride(0), x.dtype, count, eps)(flat, y, r)
    return y, r


def backward(dy: Tensor, y: Tensor, r: Tensor, eps: float) -> Tensor:
    """dx, contiguous."""
    flat, count = rows_of(dy), multiprocessors(y.device)
    dx = y.new_empty(y.shape)
    plan(True, *flat.shape, flat.stride(0), y.dtype, count, eps)(flat, y.contiguous(), r, dx)
    return dx

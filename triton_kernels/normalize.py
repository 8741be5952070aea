"""Vectors divided by their norms: a kernel each way on rows, and their launchers.

Formulas: ``custom_backprop/formulas/normalize.py``.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from .launch import Launch, has_clusters, kernel, multiprocessors, planned
from .rows import over_rows, partial_sums, read, rows_of, tile_of, write


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
        x = tl.zeros((ROWS, BLOCK), R.dtype.element_ty)
        squares = tl.zeros((ROWS, BLOCK), R.dtype.element_ty)
        for start in range(0, n if LOOP else BLOCK, BLOCK):
            place = start + column
            x = read(x_start, place, alive[:, None] & (place < n))
            squares += x * x
        r = tl.sqrt(tl.sum(squares, 1))
        r = tl.where(r < EPS, EPS, r)
        for start in range(0, n if LOOP else BLOCK, BLOCK):
            place = start + column
            inside = alive[:, None] & (place < n)
            if LOOP:
                x = read(x_start, place, inside)
            write(y_start, place, inside, x / r[:, None])
        tl.store(R + row, r, alive)


@kernel
def _backward(
    DY, X, R, DX, rows, n, tiles, dy_row, x_row, EPS: tl.constexpr, SEVERAL: tl.constexpr,
    LOOP: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx = (dy - y Σ y dy) / r."""
    first = tl.program_id(0)
    for tile in range(first, tiles if SEVERAL else first + 1, tl.num_programs(0) if SEVERAL else 1):
        row, alive, column = tile_of(tile, rows, ROWS, BLOCK, WIDE, False)
        dy_start, x_start = DY + (row * dy_row)[:, None], X + (row * x_row)[:, None]
        r = tl.load(R + row, alive, other=1.0)
        dy = tl.zeros((ROWS, BLOCK), R.dtype.element_ty)
        y = tl.zeros((ROWS, BLOCK), R.dtype.element_ty)
        along = tl.zeros((ROWS, BLOCK), R.dtype.element_ty)
        for start in range(0, n if LOOP else BLOCK, BLOCK):
            place = start + column
            inside = alive[:, None] & (place < n)
            dy, y = read(dy_start, place, inside), read(x_start, place, inside) / r[:, None]
            along += dy * y
        along = tl.where(r > EPS, tl.sum(along, 1), 0.0)[:, None]
        for start in range(0, n if LOOP else BLOCK, BLOCK):
            place = start + column
            inside = alive[:, None] & (place < n)
            if LOOP:
                dy, y = read(dy_start, place, inside), read(x_start, place, inside) / r[:, None]
            write(DX + (row * n)[:, None], place, inside, (dy - y * along) / r[:, None])


@planned
def plan(
    backward: bool, rows: int, n: int, strides: tuple[int, ...], dtype: torch.dtype, count: int,
    clusters: bool, eps: float,
) -> Launch:  # fmt: skip
    """Of rows of x, or of dy and x, with these strides, on ``count`` multiprocessors, with or
    without clusters of blocks."""
    kernel, names = (_backward, ("dy_row", "x_row")) if backward else (_forward, ("x_row",))
    numbers = dict(zip(names, strides, strict=True))
    layouts = [(stride, 1, 1) for stride in (*strides, n)]
    # forward of half precision has room for more loads under way
    live = 8 if dtype == torch.float64 else 4 if backward or dtype == torch.float32 else 2
    return over_rows(
        kernel, (rows, n, 1), layouts, dtype, live, count, clusters, EPS=eps, **numbers
    )


def _where(x: Tensor) -> tuple[int, bool]:
    """The multiprocessors of x's GPU, and whether it has clusters of blocks."""
    return multiprocessors(x.device), has_clusters(x.device)


def forward(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y, contiguous, and r."""
    flat = rows_of(x)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    r = partial_sums(x, *x.shape[:-1])
    plan(False, *flat.shape, (flat.stride(0),), x.dtype, *_where(x), eps)(flat, y, r)
    return y, r


def backward(dy: Tensor, x: Tensor, r: Tensor, eps: float) -> Tensor:
    """dx, contiguous."""
    dy, x = rows_of(dy), rows_of(x)
    dx = r.new_empty((*r.shape, x.shape[1]), dtype=x.dtype)
    strides = dy.stride(0), x.stride(0)
    plan(True, *x.shape, strides, x.dtype, *_where(x), eps)(dy, x, r.contiguous(), dx)
    return dx

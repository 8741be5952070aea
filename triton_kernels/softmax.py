"""Softmax, softmin and log-softmax along any dimension: one kernel each way, on ``rows.py``.

Formulas: ``custom_backprop/formulas/softmax.py``.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .elementary import exp_below_0, half, upcast
from .launch import Launch, has_clusters, kernel, multiprocessors, planned
from .rows import (
    lowest,
    online,
    online_of_rows,
    online_start,
    over_rows,
    read,
    start_of,
    tile_of,
    write,
)

LOG_HALF = tl.constexpr(math.log(0.5))


@triton.jit
def _input(X, place, inside, Y, NEGATE: tl.constexpr):
    """A block of ±x, cast as y is and then to the accumulator's dtype; -inf outside."""
    x = tl.load(X + place, inside, other=float("inf") if NEGATE else float("-inf"))
    x = upcast(x.to(Y.dtype.element_ty))
    return -x if NEGATE else x


@kernel
def _forward(
    X, Y, rows, n, inner, tiles, s_outer, s_n, s_inner,
    LOG: tl.constexpr, NEGATE: tl.constexpr, SEVERAL: tl.constexpr, LOOP: tl.constexpr,
    WIDE: tl.constexpr, WIDE_COLUMNS: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A row's m = max x and z = Σ e^(x-m), then y."""
    HALF: tl.constexpr = half(Y)
    dtype: tl.constexpr = tl.float64 if Y.dtype.element_ty == tl.float64 else tl.float32
    first = tl.program_id(0)
    for tile in range(first, tiles if SEVERAL else first + 1, tl.num_programs(0) if SEVERAL else 1):
        row, alive, column = tile_of(tile, rows, ROWS, BLOCK, WIDE, WIDE_COLUMNS)
        x_start = X + start_of(row, inner, s_outer, s_inner)
        y_start = Y + start_of(row, inner, n * inner, 1)
        alive = alive[:, None]
        if LOOP:
            m, z = online_start(X, ROWS, BLOCK, dtype)
            for start in range(0, n, BLOCK):
                place = start + column
                x = _input(x_start, place * s_n, alive & (place < n), Y, NEGATE)
                m, z = online(m, z, x, ALIGNED)
            m, z = online_of_rows(m, z)
        else:
            x = _input(x_start, column * s_n, alive & (column < n), Y, NEGATE)
            m = tl.max(x, 1)
            x -= m[:, None]
            z = tl.sum(exp_below_0(x, HALF), 1)
        last = tl.cdiv(n, BLOCK) * BLOCK - BLOCK if LOOP else 0
        for back in range(0, n if LOOP else BLOCK, BLOCK):
            place = last - back + column
            inside = alive & (place < n)
            if LOOP:
                x = _input(x_start, place * s_n, inside, Y, NEGATE) - m[:, None]
            if LOG:
                y = x - tl.log(z[:, None])
            else:
                e = exp_below_0(x, HALF)
                y = e * (1 / z)[:, None] if HALF else e / z[:, None]
            write(y_start, place * inner, inside, y)


@kernel
def _backward(
    DY, Y, DX, rows, n, inner, tiles, s_outer, s_n, s_inner,
    LOG: tl.constexpr, NEGATE: tl.constexpr, SEVERAL: tl.constexpr, LOOP: tl.constexpr,
    WIDE: tl.constexpr, WIDE_COLUMNS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row's sums, then dx. With k the place of the largest y, they leave out or subtract dy_k, so
    that nothing cancels where y_k is nearly 1.

    Lane by lane: the largest y (``top``), its dy (``s``), and of what was seen: for a log-softmax Σ
    dy and Σ e^y without the largest, else Σ y (dy - s) and Σ y.
    """
    dtype: tl.constexpr = tl.float64 if Y.dtype.element_ty == tl.float64 else tl.float32
    HALF: tl.constexpr = half(Y)
    least: tl.constexpr = float("-inf") if LOG else 0.0
    first = tl.program_id(0)
    for tile in range(first, tiles if SEVERAL else first + 1, tl.num_programs(0) if SEVERAL else 1):
        row, alive, column = tile_of(tile, rows, ROWS, BLOCK, WIDE, WIDE_COLUMNS)
        dy_start = DY + start_of(row, inner, s_outer, s_inner)
        y_start = start_of(row, inner, n * inner, 1)
        alive = alive[:, None]
        a = tl.zeros((ROWS, BLOCK), dtype)
        b = tl.zeros((ROWS, BLOCK), dtype)
        if LOOP:
            top = tl.full((ROWS, BLOCK), lowest(dtype), dtype)
            s = tl.zeros((ROWS, BLOCK), dtype)
            for start in range(0, n, BLOCK):
                place = start + column
                inside = alive & (place < n)
                dy = read(dy_start, place * s_n, inside)
                y = read(Y + y_start, place * inner, inside, least)
                larger = y > top
                if LOG:
                    a += tl.where(larger, s, dy)
                    b += exp_below_0(tl.where(larger, top, y), HALF)
                else:
                    a += tl.where(larger, (s - dy) * b, y * (dy - s))
                    b += y
                s, top = tl.where(larger, dy, s), tl.where(larger, y, top)
        else:
            inside = alive & (column < n)
            dy = read(dy_start, column * s_n, inside)
            y = read(Y + y_start, column * inner, inside, least)
            s, top = dy, y
            if not LOG:
                b = y
        largest = tl.max(tl.where(top == top, top, least), 1)[:, None]
        its = top == largest
        if LOG:
            total = tl.sum(a + s, 1)[:, None]
            others = tl.sum(a + tl.where(its, 0.0, s), 1)[:, None]
            rest = tl.sum(b + tl.where(its, 0.0, exp_below_0(top, HALF)), 1)[:, None]
        else:
            dy_k = tl.max(tl.where(its, s, float("-inf")), 1)[:, None]
            total = tl.sum(a + (s - dy_k) * b, 1)[:, None]
        last = tl.cdiv(n, BLOCK) * BLOCK - BLOCK if LOOP else 0
        for back in range(0, n if LOOP else BLOCK, BLOCK):
            place = last - back + column
            inside = alive & (place < n)
            if LOOP:
                dy = read(dy_start, place * s_n, inside)
                y = read(Y + y_start, place * inner, inside)
            if LOG:
                certain = (y == largest) & (y > LOG_HALF)
                dx = tl.where(
                    certain, dy * rest - (1 - rest) * others, dy - exp_below_0(y, HALF) * total
                )
            else:
                dx = y * ((dy - dy_k) - total)
            write(DX + y_start, place * inner, inside, -dx if NEGATE else dx)


@planned
def plan(
    backward: bool, name: str, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype,
    count: int, clusters: bool = False,
) -> Launch:  # fmt: skip
    """Of rows (outer, n, inner), of which x or dy has these strides, on ``count``
    multiprocessors, with or without clusters of blocks."""
    _, n, inner = shape
    both, log = [strides, (n * inner, inner, 1)], name == "log_softmax"
    kernel, live = (_backward, (2, 4 if log else 2)) if backward else (_forward, 1)
    named = {"LOG": log, "NEGATE": name == "softmin"}
    return over_rows(kernel, shape, both, dtype, live, count, clusters, **named)


def _rows(t: Tensor, dim: int) -> tuple[Tensor, tuple[int, ...], tuple[int, ...]]:
    """``t``, its sizes as (outer, n, inner) and its strides. It is copied where its strides allow
    no such view, or where its memory runs along outer."""
    sizes = t.shape
    shape = sizes[:dim].numel(), sizes[dim], sizes[dim + 1 :].numel()
    if not t.is_contiguous():
        t = t.reshape(shape)
        if shape[2] != 1 or t.stride(1) <= max(t.stride(0), 1):
            return t, shape, t.stride()
        t = t.contiguous()
    return t, shape, (shape[1] * shape[2], shape[2], 1)


def forward(name: str, x: Tensor, dim: int, dtype: torch.dtype | None) -> Tensor:
    """y, contiguous, of x cast to ``dtype``."""
    y = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    if x.numel():
        v, shape, strides = _rows(x, dim)
        on = multiprocessors(x.device), has_clusters(x.device)
        plan(False, name, shape, strides, y.dtype, *on)(v, y)
    return y


def backward(name: str, dy: Tensor, y: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """dx, contiguous, in ``dtype``."""
    dx = torch.empty_like(y, dtype=dtype, memory_format=torch.contiguous_format)
    if y.numel():
        v, shape, strides = _rows(dy, dim)
        on = multiprocessors(y.device), has_clusters(y.device)
        plan(True, name, shape, strides, y.dtype, *on)(v, y.contiguous(), dx)
    return dx

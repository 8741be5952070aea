"""Softmax, softmin and log-softmax along any dimension: one kernel each way, and their launchers.

A tensor is seen as (outer, n, inner), and row number o * inner + i holds the n elements at (o, i).
Where inner > 1, rows of neighbouring numbers are neighbours in memory, so that a tile of several
reads whole cache lines.
Formulas: ``custom_backprop/formulas/softmax.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import bind, cdiv, kept, multiprocessors, next_power_of_2


@triton.jit
def _value(x, m, z, LOG: tl.constexpr):
    """y of x, with m = max x and z = Σ e^(x-m)."""
    return x - m - tl.log(z) if LOG else tl.exp(x - m) / z


@triton.jit
def _forward_tile(
    tile, X, Y, rows, n, inner, x_outer, x_n, x_inner,
    LOG: tl.constexpr, NEGATE: tl.constexpr, LOOP: tl.constexpr, WIDE: tl.constexpr, WIDE_COLUMNS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS rows, n <= BLOCK at once, or in a loop: one reading for m and z, and one, backwards, for
    y.

    The second reading begins with what the first read last, which is what the cache still holds of
    rows that are larger than their share.
    """
    dtype: tl.constexpr = tl.float64 if Y.dtype.element_ty == tl.float64 else tl.float32
    row = tile * tl.full((), ROWS, tl.int64 if WIDE else tl.int32) + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK).to(tl.int64 if WIDE_COLUMNS else tl.int32)[None, :]
    alive = (row < rows)[:, None]
    nothing = tl.where(
        alive, float("inf") if NEGATE else float("-inf"), 0.0
    )  # past a row's end; rows past the last are zeros
    outer, side = row // inner, row % inner
    X += (outer * x_outer + side * x_inner)[:, None]
    Y += (outer * n * inner + side)[:, None]
    if LOOP:
        # m and z of each lane by itself, so that no iteration waits for another warp. m starts at
        # the lowest finite number, not at -inf, and -inf adds e^-inf = 0 to z. One exponential
        # serves both cases: x <= m adds e^(x-m), x > m scales z by e^(m-x) and adds 1.
        lowest: tl.constexpr = (
            -1.7976931348623157e308 if dtype == tl.float64 else -3.4028234663852886e38
        )
        m = tl.full((ROWS, BLOCK), lowest, dtype)
        z = tl.zeros((ROWS, BLOCK), dtype)
        for start in range(0, n, BLOCK):
            place = start + column
            x = (
                tl.load(X + place * x_n, alive & (place < n), other=nothing)
                .to(Y.dtype.element_ty)
                .to(dtype)
            )
            x = -x if NEGATE else x
            e = tl.exp(-tl.abs(x - m))
            z = tl.where(x > m, z * e + 1, z + e)
            m = tl.maximum(m, x)
        lane = m
        m = tl.max(lane, 1)[:, None]
        z = tl.sum(z * tl.exp(lane - m), 1)[:, None]
        last = tl.cdiv(n, BLOCK) * BLOCK - BLOCK
        for back in range(0, n, BLOCK):
            place = last - back + column
            x = (
                tl.load(X + place * x_n, alive & (place < n), other=0.0)
                .to(Y.dtype.element_ty)
                .to(dtype)
            )
            tl.store(
                Y + place * inner,
                _value(-x if NEGATE else x, m, z, LOG).to(Y.dtype.element_ty),
                alive & (place < n),
            )
    else:
        x = (
            tl.load(X + column * x_n, alive & (column < n), other=nothing)
            .to(Y.dtype.element_ty)
            .to(dtype)
        )
        x = -x if NEGATE else x
        m = tl.max(x, 1)[:, None]
        z = tl.sum(tl.exp(x - m), 1)[:, None]
        tl.store(
            Y + column * inner, _value(x, m, z, LOG).to(Y.dtype.element_ty), alive & (column < n)
        )


@triton.jit
def _forward(
    X, Y, rows, n, inner, x_outer, x_n, x_inner, tiles,
    LOG: tl.constexpr, NEGATE: tl.constexpr, LOOP: tl.constexpr, WIDE: tl.constexpr, WIDE_COLUMNS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A tile a program; of single rows that are read in a loop several, one after the other, so
    that no more are under way than the cache holds until their second reading."""
    if LOOP and ROWS == 1:
        for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
            _forward_tile(
                tile,
                X,
                Y,
                rows,
                n,
                inner,
                x_outer,
                x_n,
                x_inner,
                LOG,
                NEGATE,
                LOOP,
                WIDE,
                WIDE_COLUMNS,
                ROWS,
                BLOCK,
            )
    else:
        _forward_tile(
            tl.program_id(0),
            X,
            Y,
            rows,
            n,
            inner,
            x_outer,
            x_n,
            x_inner,
            LOG,
            NEGATE,
            LOOP,
            WIDE,
            WIDE_COLUMNS,
            ROWS,
            BLOCK,
        )


@triton.jit
def _gradient(dy, y, total, LOG: tl.constexpr, NEGATE: tl.constexpr):
    """dx, with total = Σ dy of a log-softmax, else Σ y dy."""
    dx = dy - tl.exp(y) * total if LOG else y * (dy - total)
    return -dx if NEGATE else dx


@triton.jit
def _backward_tile(
    tile, DY, Y, DX, rows, n, inner, dy_outer, dy_n, dy_inner,
    LOG: tl.constexpr, NEGATE: tl.constexpr, LOOP: tl.constexpr, WIDE: tl.constexpr, WIDE_COLUMNS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The same tiles: a row's sum, then dx."""
    dtype: tl.constexpr = tl.float64 if Y.dtype.element_ty == tl.float64 else tl.float32
    row = tile * tl.full((), ROWS, tl.int64 if WIDE else tl.int32) + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK).to(tl.int64 if WIDE_COLUMNS else tl.int32)[None, :]
    alive = (row < rows)[:, None]
    outer, side = row // inner, row % inner
    DY += (outer * dy_outer + side * dy_inner)[:, None]
    Y += (outer * n * inner + side)[:, None]
    DX += (outer * n * inner + side)[:, None]
    if LOOP:
        total = tl.zeros((ROWS, BLOCK), dtype)
        for start in range(0, n, BLOCK):
            place = start + column
            dy = tl.load(DY + place * dy_n, alive & (place < n), other=0.0).to(dtype)
            total += (
                dy
                if LOG
                else dy * tl.load(Y + place * inner, alive & (place < n), other=0.0).to(dtype)
            )
        total = tl.sum(total, 1)[:, None]
        last = tl.cdiv(n, BLOCK) * BLOCK - BLOCK
        for back in range(0, n, BLOCK):
            place = last - back + column
            dy = tl.load(DY + place * dy_n, alive & (place < n), other=0.0).to(dtype)
            y = tl.load(Y + place * inner, alive & (place < n), other=0.0).to(dtype)
            tl.store(
                DX + place * inner,
                _gradient(dy, y, total, LOG, NEGATE).to(DX.dtype.element_ty),
                alive & (place < n),
            )
    else:
        dy = tl.load(DY + column * dy_n, alive & (column < n), other=0.0).to(dtype)
        y = tl.load(Y + column * inner, alive & (column < n), other=0.0).to(dtype)
        total = tl.sum(dy if LOG else dy * y, 1)[:, None]
        tl.store(
            DX + column * inner,
            _gradient(dy, y, total, LOG, NEGATE).to(DX.dtype.element_ty),
            alive & (column < n),
        )


@triton.jit
def _backward(
    DY, Y, DX, rows, n, inner, dy_outer, dy_n, dy_inner, tiles,
    LOG: tl.constexpr, NEGATE: tl.constexpr, LOOP: tl.constexpr, WIDE: tl.constexpr, WIDE_COLUMNS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """As in forward."""
    if LOOP and ROWS == 1:
        for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
            _backward_tile(
                tile,
                DY,
                Y,
                DX,
                rows,
                n,
                inner,
                dy_outer,
                dy_n,
                dy_inner,
                LOG,
                NEGATE,
                LOOP,
                WIDE,
                WIDE_COLUMNS,
                ROWS,
                BLOCK,
            )
    else:
        _backward_tile(
            tl.program_id(0),
            DY,
            Y,
            DX,
            rows,
            n,
            inner,
            dy_outer,
            dy_n,
            dy_inner,
            LOG,
            NEGATE,
            LOOP,
            WIDE,
            WIDE_COLUMNS,
            ROWS,
            BLOCK,
        )


#: offsets from here on are int64: half of what int32 holds, since the masked end of the last tile
#: needs room too
FAR = 2**30


#: numbers of a block where a row is read in a loop, and programs a multiprocessor: with half as
#: many, too little is under way to hide the memory's latency (1.6 TB/s in place of 2.2 on an H200,
#: softmax forward of rows of 131072). Two of twice as many numbers and warps do as well, but of 16
#: warps ptxas spills some registers
LOOPED, RESIDENT = 4096, 4


@dataclass(frozen=True)
class Config:
    """``rows`` rows by ``block`` columns a program."""

    rows: int
    block: int
    num_warps: int


def config(n: int, inner: int, dtype: torch.dtype, tensors: int) -> Config:
    """The tile for rows of ``n``, ``inner`` of them side by side, in a kernel that reads
    ``tensors`` tensors and computes in ``dtype``."""
    # at 16 warps, the most that 64-wide warps allow, 64 numbers a thread, half of its registers; 16
    # where each takes two registers, or has an address of its own
    held = 32768 // tensors // (4 if dtype == torch.float64 else 1) // (4 if inner > 1 else 1)
    block = next_power_of_2(n)
    # short rows: 2048 elements a program, if it may hold as many. Side by side: enough of them to
    # fill a cache line of 128 bytes
    rows = max(min(2048, held) // block, min(next_power_of_2(inner), 128 // dtype.itemsize))
    if rows * block > held:
        block = min(held // 2, LOOPED) // rows  # x, m and z, or y, dy and their sum
    a_thread = 8 if inner > 1 or dtype == torch.float64 else 16
    return Config(rows, block, min(max(rows * block // (32 * a_thread), 1), 16))


def _view(t: Tensor, dim: int) -> Tensor:
    """``t`` as (outer, n, inner). Copied where its strides allow no such view, and where its memory
    runs along outer."""
    if t.dim() == 2 and dim == 1 and t.is_contiguous():
        return t.unsqueeze(2)
    v = t.reshape(t.shape[:dim].numel(), t.shape[dim], t.shape[dim + 1 :].numel())
    return v.contiguous() if v.shape[2] == 1 and v.stride(1) > max(v.stride(0), 1) else v


@lru_cache(maxsize=4096)
def _planned(
    which: str,
    name: str,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    dtype: torch.dtype,
    count: int,
) -> tuple[Callable[..., None], int, tuple[int, ...]]:
    """(launcher, programs, numbers that the kernel takes) of what is read (outer, n, inner) in
    these strides, on ``count`` multiprocessors."""
    outer, n, inner = shape
    c = config(n, inner, dtype, 1 if which == "forward" else 2)
    tiles = cdiv(outer * inner, c.rows)
    programs = min(tiles, RESIDENT * count) if n > c.block and c.rows == 1 else tiles
    columns = (n - 1) * max(strides[1], inner)
    extent = max(
        outer * n * inner, columns, (outer - 1) * strides[0] + (inner - 1) * strides[2] + columns
    )
    block = (
        c.block // 2 if columns >= FAR and n > c.block else c.block
    )  # an offset of 64 bits takes two registers
    run = _bound(which, name, n > block, extent >= FAR, columns >= FAR, c.rows, block, c.num_warps)
    return run, programs, (outer * inner, n, inner, *strides, tiles)


@kept
def _bound(
    which: str,
    name: str,
    loop: bool,
    wide: bool,
    wide_columns: bool,
    rows: int,
    block: int,
    warps: int,
) -> Callable[..., None]:
    kernel, tensors = (_forward, 2) if which == "forward" else (_backward, 3)
    return bind(
        kernel, tensors, 7, LOG=name == "log_softmax", NEGATE=name == "softmin", LOOP=loop, WIDE=wide, WIDE_COLUMNS=wide_columns, ROWS=rows,
        BLOCK=block, num_warps=warps,
    )  # fmt: skip


def _launch(
    which: str, name: str, read: Tensor, others: tuple[Tensor, ...], dtype: torch.dtype
) -> None:
    """One kernel on ``read`` (outer, n, inner), of any strides, and on ``others``, which are
    contiguous."""
    run, programs, numbers = _planned(
        which, name, read.shape, read.stride(), dtype, multiprocessors(read.device)
    )
    run(programs, read, *others, *numbers)


def forward(name: str, x: Tensor, dim: int, dtype: torch.dtype | None) -> Tensor:
    """y, contiguous, of x cast to ``dtype``."""
    y = x.new_empty(x.shape, dtype=dtype)
    if x.numel():
        _launch("forward", name, _view(x, dim), (y,), y.dtype)
    return y


def backward(name: str, dy: Tensor, y: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """dx, contiguous, in ``dtype``."""
    dx = y.new_empty(y.shape, dtype=dtype)
    if y.numel():
        _launch("backward", name, _view(dy, dim), (y.contiguous(), dx), y.dtype)
    return dx

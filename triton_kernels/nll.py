"""nll_loss: kernels on ``rows.py`` and their launchers; what cross_entropy shares with them.

x is (N, C) or (N, C, D), reduced over C; a row is one (n, d), its number is n * D + d. Losses of
rows meet in a partial sum a program and one sum of those: no atomics, the same bits every time.
Nothing is read by the host. Formulas: ``custom_backprop/formulas/nll.py``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import rows as row_kernels
from .elementary import exp_below_0
from .launch import Launch, cdiv, kernel, multiprocessors, next_power_of_2, planned
from .rows import RESIDENT, far, lowest, online_of_rows, over_rows, read, start_of, tile_of, write

NONE, MEAN = 0, 1

#: rows of a tile where only one number of each is read
PICKED = 512


@triton.jit
def class_of(TARGET, WEIGHT, row, alive, n, ignore_index, dtype: tl.constexpr):
    """(t, or -1 where there is no class to read; whether the row counts; w_t): 0 where the row is
    ignored, NaN where t is no class."""
    t = tl.load(TARGET + row, alive, other=0)
    counted = alive & (t != ignore_index)
    valid = counted & (t >= 0) & (t < n)
    # not by ``valid``: there triton 3.6 stops where rows lie side by side
    w = tl.where((t < 0) | (t >= n), float("nan"), 1.0).to(dtype)
    if WEIGHT is not None:
        w *= tl.load(WEIGHT + t, valid, other=0.0).to(dtype)
    return tl.where(valid, t, -1), counted, tl.where(counted, w, 0.0)


@triton.jit
def total_of(
    TARGET, WEIGHT, TOTAL, rows, n, ignore_index, PARTS: tl.constexpr, dtype: tl.constexpr
):
    """Σ w_t over all rows, from PARTS partial sums; without these, from the rows themselves, of
    which there are up to PARTS."""
    every = tl.arange(0, PARTS)
    if TOTAL is None:
        w = class_of(TARGET, WEIGHT, every, every < rows, n, ignore_index, dtype)[2]
    else:
        w = tl.load(TOTAL + every).to(dtype)
    return tl.sum(w)


@triton.jit
def logit_of(X, start, t, s_n):
    """x_t of each row, -inf where it has no class."""
    return tl.sum(read(X, start + (t * s_n)[:, None], (t >= 0)[:, None], float("-inf")), 1)


@triton.jit
def at(x, column, chosen, value):
    """x of a block with ``value`` where the column is the chosen one; of one row, nothing is
    compared in a block without it."""
    if x.shape[0] > 1:
        return tl.where(column == chosen, value, x)
    place = tl.sum(chosen)
    if (place >= 0) & (place < x.shape[1]):
        x = tl.where(column == chosen, value, x)
    return x


@triton.jit
def largest_of(x, x_t):
    """m of each row of x. One of these is x_t, but so no block of a cluster has a sum of e^(x-m),
    let alone writes dx over x, before every block has read x_t."""
    return tl.maximum(tl.max(x, 1), tl.maximum(x_t, lowest(x.dtype)))


@triton.jit
def largest_and_rest_of(m, z, x_t):
    """(m, Σ e^(x-m) without x_t) of each row, from those of its lanes without x_t."""
    others, z = online_of_rows(m, z)
    m = tl.maximum(others, x_t)
    return m, z * exp_below_0(others - m)


@triton.jit
def store_sums(
    LOSS, WEIGHTS, losses, weights, rows, MEAN: tl.constexpr, PROBABILITIES: tl.constexpr
):
    """Σ loss of a program, and Σ w for another kernel to divide by. Without WEIGHTS the loss of a
    mean is divided here: by that of an only program, or by the count of rows."""
    total = tl.sum(losses)
    if WEIGHTS is not None:
        tl.store(WEIGHTS + tl.program_id(0), tl.sum(weights))
    elif MEAN:
        total /= rows if PROBABILITIES else tl.sum(weights)
    tl.store(LOSS + tl.program_id(0), total.to(LOSS.dtype.element_ty))


@triton.jit
def share_of(
    DY, TOTAL, row, alive, rows, PER_ROW: tl.constexpr, MEAN: tl.constexpr, PARTS: tl.constexpr,
    dtype: tl.constexpr,
):  # fmt: skip
    """dy_r of each row. Without a TOTAL all rows of a mean weigh 1."""
    dy = tl.load(DY + row, alive, other=0.0) if PER_ROW else tl.load(DY)
    dy = tl.full(row.shape, 1, dtype) * dy.to(dtype)
    if MEAN:
        dy /= rows if TOTAL is None else total_of(None, None, TOTAL, 0, 0, 0, PARTS, dtype)
    return dy


@kernel
def _forward(
    X, TARGET, WEIGHT, LOSS, TOTAL, rows, n, inner, tiles, s_outer, s_n, s_inner, ignore_index,
    REDUCE: tl.constexpr, DOUBLE: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """-w_t x_t of each row, or their sum a program, and the sum of w_t."""
    dtype: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    losses, weights = tl.zeros((ROWS,), dtype), tl.zeros((ROWS,), dtype)
    first = tl.program_id(0)
    for tile in range(first, tiles, tl.num_programs(0)):
        row = tile * tl.full((), ROWS, tl.int64 if WIDE else tl.int32) + tl.arange(0, ROWS)
        alive = row < rows
        t, counted, w = class_of(TARGET, WEIGHT, row, alive, n, ignore_index, dtype)
        weights += w
        if X is not None:
            start = row // inner * s_outer + row % inner * s_inner
            x = tl.load(X + start + t * s_n, t >= 0, other=0.0).to(dtype)
            loss = tl.where(counted, -w * x, 0.0)
            if REDUCE:
                losses += loss
            else:
                tl.store(LOSS + row, loss.to(LOSS.dtype.element_ty), alive)
    if REDUCE and X is not None:
        tl.store(LOSS + first, tl.sum(losses).to(LOSS.dtype.element_ty))
    if TOTAL is not None:
        tl.store(TOTAL + first, tl.sum(weights))


@kernel
def _backward(
    DY, TARGET, WEIGHT, TOTAL, DX, rows, n, inner, tiles, s_outer, s_n, s_inner, ignore_index,
    MEAN: tl.constexpr, PER_ROW: tl.constexpr, SEVERAL: tl.constexpr, WIDE: tl.constexpr,
    WIDE_COLUMNS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx = -w_t dy where c = t, 0 elsewhere. A class out of range makes all of its row NaN."""
    dtype: tl.constexpr = tl.float64 if DX.dtype.element_ty == tl.float64 else tl.float32
    first = tl.program_id(0)
    for tile in range(first, tiles if SEVERAL else first + 1, tl.num_programs(0) if SEVERAL else 1):
        row, alive, column = tile_of(tile, rows, ROWS, BLOCK, WIDE, WIDE_COLUMNS)
        t, counted, w = class_of(TARGET, WEIGHT, row, alive, n, ignore_index, dtype)
        dy = share_of(DY, TOTAL, row, alive, rows, PER_ROW, MEAN, 1, dtype)
        hard = tl.where(counted, -w * dy, 0.0)
        other = tl.where(counted & (t < 0), hard, 0.0)[:, None]
        chosen = t.to(column.dtype)[:, None]
        start = DX + start_of(row, inner, s_outer, s_inner)
        for done in range(0, n, BLOCK):
            place = done + column
            dx = tl.where(place == chosen, hard[:, None], other)
            write(start, place * s_n, alive[:, None] & (place < n), dx)


def as_rows(
    shape: tuple[int, ...], strides: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(N, C) or (N, C, D) as (outer, C, inner). Rows whose classes lie further apart than they do
    themselves are side by side."""
    if len(shape) != 2:
        return shape, strides
    (rows, n), (s_row, s_n) = shape, strides
    if s_n > s_row:
        return (1, n, rows), (0, s_n, s_row)
    return (rows, n, 1), (s_row, s_n, 0)


def parts_of(rows: int, count: int) -> int:
    """Programs that read one number a row, on ``count`` multiprocessors: a power of two, and so few
    that a block of another kernel sums their sums."""
    return next_power_of_2(max(min(cdiv(rows, PICKED), RESIDENT * count), 1))


@planned
def plan_forward(
    shape: tuple[int, ...], strides: tuple[int, ...], rows: int, double: bool, count: int,
    reduction: int, ignore_index: int,
) -> Launch:  # fmt: skip
    """The rows of a dense (N, C) or (N, C, D), or, where it has no strides, their weights alone; on
    ``count`` multiprocessors."""
    shape, strides = as_rows(shape, strides or (0,) * len(shape))
    s_outer, s_n, s_inner = strides
    extent = sum((size - 1) * s for size, s in zip(shape, strides, strict=True))
    return _forward.launch(
        parts_of(rows, count), rows=rows, n=shape[1], inner=shape[2], tiles=cdiv(rows, PICKED),
        s_outer=s_outer, s_n=s_n, s_inner=s_inner, ignore_index=ignore_index,
        REDUCE=reduction != NONE, DOUBLE=double, WIDE=far(max(extent, rows)), ROWS=PICKED,
        num_warps=8 if double else 4,
    )  # fmt: skip


@planned
def plan_backward(
    shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, count: int,
    reduction: int, ignore_index: int,
) -> Launch:  # fmt: skip
    """The rows of a dense (N, C) or (N, C, D), on ``count`` multiprocessors."""
    shape, strides = as_rows(shape, strides)
    return over_rows(
        _backward, shape, [strides], dtype, 2, count, ignore_index=ignore_index,
        MEAN=reduction == MEAN, PER_ROW=reduction == NONE,
    )  # fmt: skip


def weights_of_rows(x: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    """Partial sums of w_t, whose number is a power of two: :func:`total_of` adds them."""
    double, count = x.dtype == torch.float64, multiprocessors(x.device)
    run = plan_forward(x.shape, (), target.numel(), double, count, MEAN, ignore_index)
    partial = row_kernels.partial_sums(x, run.programs)
    run(None, target, weight, None, partial)
    return partial


def forward(
    x: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """The loss, and Σ w_t (for a mean; else any number)."""
    target = target.contiguous()
    weight = None if weight is None else weight.contiguous()
    of = x.dtype == torch.float64, multiprocessors(x.device), reduction, ignore_index
    run = plan_forward(x.shape, x.stride(), target.numel(), *of)
    total = x.new_empty(())
    loss = x.new_empty(target.shape if reduction == NONE else ())
    in_one = reduction == NONE or (reduction != MEAN and run.programs == 1)
    partial = loss if in_one else row_kernels.partial_sums(x, run.programs)
    weights = torch.empty_like(partial) if reduction == MEAN else None
    run(x, target, weight, partial, weights)
    if not in_one:
        row_kernels.total(partial, loss, weight=weights, total_weight=total)
    return loss, total


def backward(
    dy: Tensor, x: Tensor, target: Tensor, weight: Tensor | None, total: Tensor, reduction: int,
    ignore_index: int,
) -> Tensor:  # fmt: skip
    """dx, contiguous."""
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    of = x.dtype, multiprocessors(x.device), reduction, ignore_index
    run = plan_backward(dx.shape, dx.stride(), *of)
    weight = None if weight is None else weight.contiguous()
    run(dy.contiguous(), target.contiguous(), weight, total, dx)
    return dx

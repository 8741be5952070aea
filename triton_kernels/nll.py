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
from .launch import Launch, cdiv, kernel, multiprocessors, planned
from .rows import far, over_rows, start_of, tile_of, write

NONE, MEAN = 0, 1

#: rows a program where only one number of each is read
PICKED = 512


@triton.jit
def class_of(
    TARGET, WEIGHT, row, alive, n, ignore_index, PROBABILITIES: tl.constexpr, dtype: tl.constexpr
):
    """(t, or -1 where there is no class to read; whether the row counts; w_t): 0 where the row is
    ignored, NaN where t is no class. With PROBABILITIES every row counts and has no class."""
    t, counted, w = tl.full(row.shape, -1, tl.int64), alive, tl.zeros(row.shape, dtype)
    if not PROBABILITIES:
        t = tl.load(TARGET + row, alive, other=0)
        counted = alive & (t != ignore_index)
        valid = counted & (t >= 0) & (t < n)
        # not by ``valid``: there triton 3.6 stops where rows lie side by side
        w = tl.where((t < 0) | (t >= n), float("nan"), 1.0).to(dtype)
        if WEIGHT is not None:
            w *= tl.load(WEIGHT + t, valid, other=0.0).to(dtype)
        t, w = tl.where(valid, t, -1), tl.where(counted, w, 0.0)
    return t, counted, w


@triton.jit
def share_of(
    DY, TOTAL, row, alive, rows, PER_ROW: tl.constexpr, MEAN: tl.constexpr, dtype: tl.constexpr
):
    """dy_r of each row. Without a TOTAL all rows of a mean weigh 1."""
    dy = tl.load(DY + row, alive, other=0.0) if PER_ROW else tl.load(DY)
    dy = tl.full(row.shape, 1, dtype) * dy.to(dtype)
    if MEAN:
        dy /= rows if TOTAL is None else tl.load(TOTAL).to(dtype)
    return dy


@kernel
def _forward(
    X, TARGET, WEIGHT, LOSS, TOTAL, rows, n, inner, s_outer, s_n, s_inner, ignore_index,
    REDUCE: tl.constexpr, DOUBLE: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS rows a program: -w_t x_t of each, or their sum, and the sum of w_t."""
    dtype: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    program = tl.program_id(0).to(tl.int64 if WIDE else tl.int32)
    row = program * ROWS + tl.arange(0, ROWS)
    alive = row < rows
    t, counted, w = class_of(TARGET, WEIGHT, row, alive, n, ignore_index, False, dtype)
    if X is not None:
        start = row // inner * s_outer + row % inner * s_inner
        x = tl.load(X + start + t * s_n, t >= 0, other=0.0).to(dtype)
        loss = tl.where(counted, -w * x, 0.0)
        if REDUCE:
            tl.store(LOSS + program, tl.sum(loss).to(LOSS.dtype.element_ty))
        else:
            tl.store(LOSS + row, loss.to(LOSS.dtype.element_ty), alive)
    if TOTAL is not None:
        tl.store(TOTAL + program, tl.sum(w))


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
        t, counted, w = class_of(TARGET, WEIGHT, row, alive, n, ignore_index, False, dtype)
        dy = share_of(DY, TOTAL, row, alive, rows, PER_ROW, MEAN, dtype)
        hard = tl.where(counted, -w * dy, 0.0)
        other = tl.where(counted & (t < 0), hard, 0.0)[:, None]
        chosen = t.to(column.dtype)[:, None]
        start = DX + start_of(row, inner, s_outer, s_inner)
        for done in range(0, n, BLOCK):
            place = done + column
            dx = tl.where(place == chosen, hard[:, None], other)
            write(start, place * s_n, alive[:, None] & (place < n), dx)


def view_of(x: Tensor) -> Tensor:
    """x as (outer, C, inner). Rows whose classes lie further apart than they do themselves are side
    by side."""
    if x.dim() == 2 and x.stride(1) > x.stride(0):
        return x.t().unsqueeze(0)
    return x.unsqueeze(2) if x.dim() == 2 else x


@planned
def plan_forward(
    shape: tuple[int, ...], strides: tuple[int, ...], rows: int, double: bool, reduction: int,
    ignore_index: int,
) -> Launch:  # fmt: skip
    """The rows of a dense (outer, C, inner); of no x where it has no strides."""
    s_outer, s_n, s_inner = strides = strides or (0, 0, 0)
    extent = sum((size - 1) * s for size, s in zip(shape, strides, strict=True))
    return _forward.launch(
        cdiv(rows, PICKED), rows=rows, n=shape[1], inner=shape[2], s_outer=s_outer, s_n=s_n,
        s_inner=s_inner, ignore_index=ignore_index, REDUCE=reduction != NONE, DOUBLE=double,
        WIDE=far(max(extent, rows)), ROWS=PICKED, num_warps=8 if double else 4,
    )  # fmt: skip


@planned
def plan_backward(
    shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, count: int,
    reduction: int, ignore_index: int,
) -> Launch:  # fmt: skip
    """The rows of a dense (outer, C, inner), on ``count`` multiprocessors."""
    return over_rows(
        _backward, shape, [strides], dtype, 2, count, ignore_index=ignore_index,
        MEAN=reduction == MEAN, PER_ROW=reduction == NONE,
    )  # fmt: skip


def total_weight(x: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    """Σ w_t over the rows."""
    v, double = view_of(x), x.dtype == torch.float64
    run = plan_forward(v.shape, (), target.numel(), double, MEAN, ignore_index)
    total = row_kernels.partial_sums(x)
    partial = total if run.programs == 1 else row_kernels.partial_sums(x, run.programs)
    run(None, target, weight, None, partial)
    if run.programs != 1:
        row_kernels.total(partial, total)
    return total


def forward(
    x: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """The loss, and Σ w_t (for a mean; else any number)."""
    target = target.contiguous()
    weight = None if weight is None else weight.contiguous()
    v, double = view_of(x), x.dtype == torch.float64
    run = plan_forward(v.shape, v.stride(), target.numel(), double, reduction, ignore_index)
    total = x.new_empty(())
    loss = x.new_empty(target.shape if reduction == NONE else ())
    in_one = reduction == NONE or (reduction != MEAN and run.programs == 1)
    partial = loss if in_one else row_kernels.partial_sums(x, run.programs)
    weights = torch.empty_like(partial) if reduction == MEAN else None
    run(v, target, weight, partial, weights)
    if not in_one:
        row_kernels.total(partial, loss, weight=weights, total_weight=total)
    return loss, total


def backward(
    dy: Tensor, x: Tensor, target: Tensor, weight: Tensor | None, total: Tensor, reduction: int,
    ignore_index: int,
) -> Tensor:  # fmt: skip
    """dx, contiguous."""
    dx = x.new_empty(x.shape)
    v, count = view_of(dx), multiprocessors(x.device)
    run = plan_backward(v.shape, v.stride(), x.dtype, count, reduction, ignore_index)
    weight = None if weight is None else weight.contiguous()
    run(dy.contiguous(), target.contiguous(), weight, total, dx)
    return dx

"""cross_entropy: the kernels for a target of classes, on ``rows.py``, and the launchers. A target
that is spread over the classes has kernels of its own, in ``soft_cross_entropy.py``.

x is (N, C) or (N, C, D), reduced over C; a row is one (n, d), its number is n * D + d. Losses of
rows meet in a partial sum a program and one sum of those: no atomics, the same bits every time.
Nothing is read by the host. Formulas: ``custom_backprop/formulas/cross_entropy.py``.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import rows as row_kernels
from . import soft_cross_entropy
from .elementary import exp_below_0, expm1, half, log_sum
from .launch import Launch, has_clusters, kernel, multiprocessors, planned
from .nll import (
    MEAN,
    NONE,
    as_rows,
    at,
    class_of,
    largest_and_rest_of,
    largest_of,
    logit_of,
    parts_of,
    share_of,
    store_sums,
    total_of,
    weights_of_rows,
)
from .pointwise import like
from .rows import (
    online,
    online_start,
    over_rows,
    read,
    start_of,
    tile_of,
    write,
)

GRADIENT, STATISTICS = 1, 2

#: rows whose weights each program adds up for itself, rather than wait for another kernel
FEW = 1024


@triton.jit
def _for_minus_0(e, value):
    """e, not below 0, with a ``value`` below 0 in place of -0, the lowest of all integers."""
    whole: tl.constexpr = tl.int64 if e.dtype == tl.float64 else tl.int32
    larger = tl.maximum(e.to(whole, bitcast=True), value.to(whole, bitcast=True))
    return larger.to(e.dtype, bitcast=True)


@kernel
def _forward(
    X, TARGET, WEIGHT, TOTAL, LOSS, WEIGHTS, DX, LARGEST, LOG_SUM,
    rows, n, inner, tiles, s_outer, s_n, s_inner, ignore_index,
    MEAN: tl.constexpr, REDUCE: tl.constexpr, PARTS: tl.constexpr, SEVERAL: tl.constexpr,
    LOOP: tl.constexpr, WIDE: tl.constexpr, WIDE_COLUMNS: tl.constexpr, ALIGNED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The loss of each row, or their sum a program and that of their weights, by which a mean
    divides; dx for a dy of 1; m and log z = log Σ e^(x-m).

    With w the weight of class t, loss = -w log p_t, dx = w p, and dx_t = -w (1 - p_t). Class t is
    left out of z's sum, since 1 - p_t is the rest over z: nothing cancels.
    """
    dtype: tl.constexpr = tl.float64 if X.dtype.element_ty == tl.float64 else tl.float32
    HALF: tl.constexpr = half(X)
    share = tl.full((), 1, dtype)
    if MEAN and DX is not None:
        share /= total_of(TARGET, WEIGHT, TOTAL, rows, n, ignore_index, PARTS, dtype)
    losses, weights = tl.zeros((ROWS,), dtype), tl.zeros((ROWS,), dtype)
    first = tl.program_id(0)
    for tile in range(first, tiles if SEVERAL else first + 1, tl.num_programs(0) if SEVERAL else 1):
        row, alive, column = tile_of(tile, rows, ROWS, BLOCK, WIDE, WIDE_COLUMNS)
        start = start_of(row, inner, s_outer, s_inner)
        # what is read row by row, before what takes longest
        t, counted, w = class_of(TARGET, WEIGHT, row, alive, n, ignore_index, dtype)
        chosen = t.to(column.dtype)[:, None]
        x_t = logit_of(X, start, t, s_n)
        if LOOP:
            m, z = online_start(X, ROWS, BLOCK, dtype)
            for done in range(0, n * tl.max(counted.to(tl.int32)), BLOCK):
                place = done + column
                x = read(X + start, place * s_n, alive[:, None] & (place < n), float("-inf"))
                m, z = online(m, z, at(x, column, chosen - done, float("-inf")), ALIGNED)
            m, rest = largest_and_rest_of(m, z, x_t)
        else:
            x = read(X + start, column * s_n, alive[:, None] & (column < n), float("-inf"))
            m = largest_of(x, x_t)
            # of class t -0, to which the sum is blind and in whose place dx has -rest
            e = tl.where(column == chosen, -0.0, exp_below_0(x - m[:, None], HALF))
            rest = tl.sum(e, 1)
        e_t = exp_below_0(x_t - m)
        z, log_z = rest + e_t, log_sum(rest, e_t)
        loss = tl.where(counted, w * (log_z + tl.where(t < 0, 0.0, m - x_t)), 0.0)
        if REDUCE:
            losses += loss
            weights += w
        else:
            tl.store(LOSS + row, loss.to(LOSS.dtype.element_ty), alive)
        if LARGEST is not None:
            tl.store(LARGEST + row, m, alive)
            tl.store(LOG_SUM + row, log_z, alive)
        if DX is not None:
            m, rest = tl.where(counted, m, 0.0), tl.where(counted, rest, 0.0)
            of_p = tl.where(counted, share * w / z, 0.0)[:, None]
            of_t = -rest[:, None]
            if LOOP:
                last = tl.cdiv(n, BLOCK) * BLOCK - BLOCK
                for back in range(0, n, BLOCK):
                    begin = last - back
                    place = begin + column
                    inside = alive[:, None] & (place < n)
                    x = read(X + start, place * s_n, inside & counted[:, None])
                    e = at(exp_below_0(x - m[:, None], HALF), column, chosen - begin, of_t)
                    write(DX + start, place * s_n, inside, e * of_p)
            else:
                e = _for_minus_0(e, of_t)
                write(DX + start, column * s_n, alive[:, None] & (column < n), e * of_p)
    if REDUCE:
        store_sums(LOSS, WEIGHTS, losses, weights, rows, MEAN, False)


@kernel
def _backward(
    DY, X, TARGET, WEIGHT, TOTAL, DX, LARGEST, LOG_SUM,
    rows, n, inner, tiles, s_outer, s_n, s_inner, ignore_index,
    MEAN: tl.constexpr, PER_ROW: tl.constexpr, PARTS: tl.constexpr, SEVERAL: tl.constexpr,
    WIDE: tl.constexpr, WIDE_COLUMNS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx, from x and the statistics of its rows."""
    dtype: tl.constexpr = tl.float64 if X.dtype.element_ty == tl.float64 else tl.float32
    HALF: tl.constexpr = half(X)
    first = tl.program_id(0)
    for tile in range(first, tiles if SEVERAL else first + 1, tl.num_programs(0) if SEVERAL else 1):
        row, alive, column = tile_of(tile, rows, ROWS, BLOCK, WIDE, WIDE_COLUMNS)
        start = start_of(row, inner, s_outer, s_inner)
        t, counted, w = class_of(TARGET, WEIGHT, row, alive, n, ignore_index, dtype)
        m = tl.load(LARGEST + row, counted, other=0.0)
        log_z = tl.load(LOG_SUM + row, counted, other=0.0)
        w *= share_of(DY, TOTAL, row, alive, rows, PER_ROW, MEAN, PARTS, dtype)
        w = tl.where(counted, w, 0.0)
        of_t = (w * expm1(logit_of(X, start, t, s_n) - m - log_z))[:, None]
        of_p = (w * exp_below_0(-log_z))[:, None]
        chosen = t.to(column.dtype)[:, None]
        for done in range(0, n, BLOCK):
            place = done + column
            inside = alive[:, None] & (place < n)
            x = read(X + start, place * s_n, inside & counted[:, None])
            dx = at(exp_below_0(x - m[:, None], HALF) * of_p, column, chosen - done, of_t)
            write(DX + start, place * s_n, inside, dx)


def _dense(x: Tensor) -> Tensor:
    """``x`` in strides that ``empty_like`` preserves: without gaps or overlaps."""
    if x.is_contiguous():
        return x
    layout = torch.empty_like(x, device="meta").stride()
    return x if x.stride() == layout else torch.empty_like(x).copy_(x)


@planned
def plan(
    backward: bool, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype,
    count: int, clusters: bool, probabilities: bool, reduction: int, ignore_index: int,
    smoothing: float, makes_dx: bool = True,
) -> Launch:  # fmt: skip
    """Of the rows of a dense (N, C) or (N, C, D), on ``count`` multiprocessors, with or without
    clusters of blocks."""
    shape, strides = as_rows(shape, strides)
    outer, n, inner = shape
    soft, rows = probabilities or smoothing > 0, outer * inner
    divides = reduction == MEAN and makes_dx and not probabilities
    named: dict[str, Any] = {
        "MEAN": reduction == MEAN, "ignore_index": ignore_index,
        "PARTS": 1 if not divides else parts_of(rows, count) if backward or rows > FEW else FEW,
        **({"PER_ROW": reduction == NONE} if backward else {"REDUCE": reduction != NONE}),
        **({"PROBABILITIES": probabilities, "SMOOTHING": smoothing} if soft else {}),
    }  # fmt: skip
    live = 4 if soft else 2
    looped = n > row_kernels.row_config(n, inner, dtype, live, clusters).block
    narrow = makes_dx and reduction == NONE and n % 16 > 0  # dx of an odd length beside the losses
    if looped and (row_kernels.far(rows * n) or narrow):
        live = 4  # an offset of 64 bits takes two registers, an address for each number many more
    if probabilities and not backward and dtype == torch.float64:
        live = 8  # Q and T beside the rest, each number in two registers
    if soft:
        kernel = soft_cross_entropy.backward if backward else soft_cross_entropy.forward
    else:
        kernel = _backward if backward else _forward
    heavy = not soft and (inner > 1 or not backward)
    return over_rows(kernel, shape, [strides], dtype, live, count, clusters, heavy, **named)


def _prepared(
    x: Tensor, target: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, bool]:
    """As the kernels read them; and whether the target is of probabilities."""
    x, probabilities = _dense(x), target.is_floating_point()
    target = like(target, x) if probabilities else target.contiguous()
    return x, target, None if weight is None else weight.contiguous(), probabilities


def _of_rows(statistics: Tensor | None, soft: bool) -> list[Tensor | None]:
    """m and log z of each row, and of a soft target Q and T; None for those that were not made."""
    made: list[Tensor | None] = [] if statistics is None else list(statistics)
    return made + [None] * ((4 if soft else 2) - len(made))


def forward(
    x: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int,
    smoothing: float, makes: int, loss: Tensor | None = None, dx: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The loss, and what it ``makes`` for backward: nothing, dx for a dy of 1, or (m, log Σ
    e^(x-m)) of each row, and of probabilities (Q, T). Losses of rows and dx may go to memory that
    is given; dx may be x, since a program reads what it writes first."""
    x, target, weight, probabilities = _prepared(x, target, weight)
    shape, soft = (x.shape[0], *x.shape[2:]), probabilities or smoothing > 0
    if makes == GRADIENT and dx is None:
        dx = torch.empty_like(x)
    count = 4 if probabilities else 2
    statistics = row_kernels.partial_sums(x, count, *shape) if makes == STATISTICS else None
    saved = statistics if dx is None else dx
    if not x.numel():
        nothing = float("nan") if reduction == MEAN else 0.0
        return x.new_full(shape if reduction == NONE else (), nothing), saved
    of = probabilities, reduction, ignore_index, smoothing, dx is not None
    on = multiprocessors(x.device), has_clusters(x.device)
    run = plan(False, x.shape, x.stride(), x.dtype, *on, *of)
    if loss is None:
        loss = x.new_empty(shape if reduction == NONE else ())
    of_classes = reduction == MEAN and not probabilities
    total = weights = None
    if of_classes and dx is not None and target.numel() > FEW:
        total = weights_of_rows(x, target, weight, ignore_index)
    alone = reduction == NONE or run.programs == 1
    partial = loss if alone else row_kernels.partial_sums(x, run.programs)
    if of_classes and not alone:
        weights = torch.empty_like(partial)
    run(x, target, weight, total, partial, weights, dx, *_of_rows(statistics, soft))
    if not alone:
        row_kernels.total(partial, loss, weight=weights)
    return loss, saved


def backward(
    dy: Tensor, x: Tensor, target: Tensor, weight: Tensor | None, statistics: Tensor,
    reduction: int, ignore_index: int, smoothing: float, need_x: bool, need_target: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """dx and the gradient of class probabilities; None for one that is not needed."""
    layout = target
    x, target, weight, probabilities = _prepared(x, target, weight)
    soft = probabilities or smoothing > 0
    dx = torch.empty_like(x) if need_x else None
    dtarget = torch.empty_like(target) if need_target else None
    total = None
    if reduction == MEAN and not probabilities:
        total = weights_of_rows(x, target, weight, ignore_index)
    of = probabilities, reduction, ignore_index, smoothing
    run = plan(True, x.shape, x.stride(), x.dtype, multiprocessors(x.device), False, *of)
    made = _of_rows(statistics.contiguous(), soft)
    run(dy.contiguous(), x, target, weight, total, dx, *made, *([dtarget] if soft else []))
    if dtarget is not None and dtarget.stride() != layout.stride():
        dtarget = torch.empty_like(layout).copy_(dtarget)
    return dx, dtarget

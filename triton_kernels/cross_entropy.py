"""cross_entropy: kernels on ``rows.py`` and their launchers.

x is (N, C) or (N, C, D), reduced over C; a row is one (n, d), its number is n * D + d. Losses of
rows meet in a partial sum a program and one sum of those: no atomics, the same bits every time.
Nothing is read by the host. Formulas: ``custom_backprop/formulas/cross_entropy.py``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import rows as row_kernels
from .elementary import expm1, log1p_positive
from .launch import Launch, kernel, multiprocessors, planned
from .nll import MEAN, NONE, class_of, share_of, total_weight, view_of
from .pointwise import like
from .rows import (
    lowest,
    online,
    online_of_rows,
    online_rest,
    online_rest_of_rows,
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
def _soft(
    TARGET, WEIGHT, s_n, place, inside, n,
    PROBABILITIES: tl.constexpr, SMOOTHING: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """u of a block, 0 outside: the part of the target that is spread over the classes."""
    u = tl.full(place.shape, SMOOTHING, dtype) / n
    if PROBABILITIES:
        u += tl.load(TARGET + place * s_n, inside, other=0.0).to(dtype) * (1 - SMOOTHING)
    if WEIGHT is not None:
        u *= tl.load(WEIGHT + place, place < n, other=0.0).to(dtype)
    return tl.where(inside, u, 0.0)


@triton.jit
def _logit_of(X, start, t, s_n):
    """x_t of each row, -inf where it has no class."""
    return tl.sum(read(X, start + (t * s_n)[:, None], (t >= 0)[:, None], float("-inf")), 1)


@kernel
def _forward(
    X, TARGET, WEIGHT, TOTAL, LOSS, DX, LARGEST, LOG_SUM, SHARES, OTHERS,
    rows, n, inner, tiles, s_outer, s_n, s_inner, ignore_index,
    PROBABILITIES: tl.constexpr, SMOOTHING: tl.constexpr, MEAN: tl.constexpr, REDUCE: tl.constexpr,
    ALL: tl.constexpr, SEVERAL: tl.constexpr, LOOP: tl.constexpr, WIDE: tl.constexpr,
    WIDE_COLUMNS: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The loss of each row, or their sum a program; dx for a dy of 1; m, log z = log Σ e^(x-m), and
    of probabilities Q and T.

    With q the target's share of a class and Q its sum, loss = -Σ q log p and dx = Q p - q. The
    class of a hard target is left out of z's sum, since 1 - p_t is the rest over z; of
    probabilities the largest x is, and out of T, the sum of q: nothing cancels.
    """
    SOFT: tl.constexpr = PROBABILITIES or SMOOTHING > 0
    dtype: tl.constexpr = tl.float64 if X.dtype.element_ty == tl.float64 else tl.float32
    share = tl.full((), 1, dtype)  # what a mean multiplies by
    if MEAN:
        if PROBABILITIES:
            share /= rows
        elif ALL > 0:
            every = tl.arange(0, ALL)
            of_all = class_of(TARGET, WEIGHT, every, every < rows, n, ignore_index, False, dtype)
            share /= tl.sum(of_all[2])
        else:
            share /= tl.load(TOTAL).to(dtype)
    losses = tl.zeros((ROWS,), dtype)
    first = tl.program_id(0)
    for tile in range(first, tiles if SEVERAL else first + 1, tl.num_programs(0) if SEVERAL else 1):
        row, alive, column = tile_of(tile, rows, ROWS, BLOCK, WIDE, WIDE_COLUMNS)
        start = start_of(row, inner, s_outer, s_inner)
        Q = TARGET + start if PROBABILITIES else TARGET
        # what is read row by row, before what takes longest
        t, counted, w = class_of(TARGET, WEIGHT, row, alive, n, ignore_index, PROBABILITIES, dtype)
        hard, chosen = w * (1 - SMOOTHING), t.to(column.dtype)[:, None]
        x_t = _logit_of(X, start, t, s_n)
        u = tl.zeros((ROWS, BLOCK), dtype)
        top = tl.zeros((ROWS, BLOCK), dtype)  # of probabilities, that of the largest x, not in u
        if LOOP and PROBABILITIES:
            of_lane = tl.full((ROWS, BLOCK), lowest(dtype), dtype)
            rest = tl.full((ROWS, BLOCK), -1, dtype)
            for done in range(0, n, BLOCK):
                place = done + column
                inside = alive[:, None] & (place < n)
                x = read(X + start, place * s_n, inside, float("-inf"))
                q = _soft(Q, WEIGHT, s_n, place, inside, n, PROBABILITIES, SMOOTHING, dtype)
                u += tl.where(x > of_lane, top, q)
                top = tl.where(x > of_lane, q, top)
                of_lane, rest = online_rest(of_lane, rest, x, False)
            m, rest = online_rest_of_rows(of_lane, rest, False)
            u += tl.where(of_lane == m[:, None], 0.0, top)
            top = tl.where(of_lane == m[:, None], top, 0.0)
        elif LOOP:
            m, z = online_start(X, ROWS, BLOCK, dtype)
            for done in range(0, n, BLOCK):
                place = done + column
                inside = alive[:, None] & (place < n)
                x = read(X + start, place * s_n, inside, float("-inf"))
                m, z = online(m, z, tl.where(column == chosen - done, float("-inf"), x), ALIGNED)
                if SOFT:
                    u += _soft(Q, WEIGHT, s_n, place, inside, n, PROBABILITIES, SMOOTHING, dtype)
            others, z = online_of_rows(m, z)
            m = tl.maximum(others, x_t)
            rest = z * tl.exp(others - m)
        else:
            inside = alive[:, None] & (column < n)
            x = read(X + start, column * s_n, inside, float("-inf"))
            m = tl.maximum(tl.max(x, 1), lowest(dtype))
            x -= m[:, None]
            e = tl.exp(x)
            apart = x == 0 if PROBABILITIES else column == chosen
            rest = tl.sum(tl.where(apart, 0.0, e), 1)
            if PROBABILITIES:
                rest += tl.sum(tl.where(apart, 1.0, 0.0), 1) - 1  # more than 0 if several are equal
            if SOFT:
                q = _soft(Q, WEIGHT, s_n, column, inside, n, PROBABILITIES, SMOOTHING, dtype)
                u = tl.where(apart, 0.0, q) if PROBABILITIES else q
                top = tl.where(apart, q, 0.0)
        soft = tl.sum(u, 1) if SOFT else tl.zeros((ROWS,), dtype)
        e_t = tl.exp(x_t - m)
        z = rest + (1 if PROBABILITIES else e_t)
        certain = (rest < 1) & ((rest >= 0) if PROBABILITIES else (x_t == m))
        log_z = tl.where(certain, log1p_positive(tl.where(certain, rest, 0.0)), tl.log(z))
        loss = hard * (log_z + tl.where(t < 0, 0.0, m - x_t))
        if LARGEST is not None:
            tl.store(LARGEST + row, m, alive)
            tl.store(LOG_SUM + row, log_z, alive)
        share_p = share / z
        of_t = share_p * (e_t * soft - rest * hard)
        if PROBABILITIES:
            others = soft
            soft += tl.sum(top, 1)
            of_t = share * others - share_p * rest * soft
            if LARGEST is not None:
                tl.store(SHARES + row, soft, alive)
                tl.store(OTHERS + row, others, alive)
        of_p = (share_p * (hard + soft))[:, None]
        if SOFT or DX is not None:
            soft_loss = tl.zeros((ROWS, BLOCK), dtype)
            last = tl.cdiv(n, BLOCK) * BLOCK - BLOCK if LOOP else 0
            for back in range(0, n if LOOP else BLOCK, BLOCK):
                begin = last - back
                place = begin + column
                inside = alive[:, None] & (place < n)
                if LOOP:
                    x = read(X + start, place * s_n, inside) - m[:, None]
                    e = tl.exp(x)
                dx = e * of_p
                if not PROBABILITIES:
                    dx = tl.where(column == chosen - begin, of_t[:, None], dx)
                if SOFT:
                    if LOOP:
                        q = _soft(Q, WEIGHT, s_n, place, inside, n, PROBABILITIES, SMOOTHING, dtype)
                    soft_loss += tl.where(inside, q * (x - log_z[:, None]), 0.0)
                    dx -= share * q
                if PROBABILITIES:
                    dx = tl.where((x == 0) & certain[:, None], of_t[:, None], dx)
                if DX is not None:
                    dx = tl.where(counted[:, None], dx, 0.0)
                    write(DX + start, place * s_n, inside, dx)
            loss -= tl.sum(soft_loss, 1)
        loss = tl.where(counted, loss, 0.0)
        if REDUCE:
            losses += loss * share
        else:
            tl.store(LOSS + row, loss.to(LOSS.dtype.element_ty), alive)
    if REDUCE:
        tl.store(LOSS + tl.program_id(0), tl.sum(losses).to(LOSS.dtype.element_ty))


@kernel
def _backward(
    DY, X, TARGET, WEIGHT, TOTAL, LARGEST, LOG_SUM, SHARES, OTHERS, DX, DTARGET,
    rows, n, inner, tiles, s_outer, s_n, s_inner, ignore_index,
    PROBABILITIES: tl.constexpr, SMOOTHING: tl.constexpr, MEAN: tl.constexpr, PER_ROW: tl.constexpr,
    SEVERAL: tl.constexpr, WIDE: tl.constexpr, WIDE_COLUMNS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx and the gradient of class probabilities, from x and the statistics of its rows."""
    SOFT: tl.constexpr = PROBABILITIES or SMOOTHING > 0
    dtype: tl.constexpr = tl.float64 if X.dtype.element_ty == tl.float64 else tl.float32
    first = tl.program_id(0)
    for tile in range(first, tiles if SEVERAL else first + 1, tl.num_programs(0) if SEVERAL else 1):
        row, alive, column = tile_of(tile, rows, ROWS, BLOCK, WIDE, WIDE_COLUMNS)
        start = start_of(row, inner, s_outer, s_inner)
        Q = TARGET + start if PROBABILITIES else TARGET
        m = tl.load(LARGEST + row, alive, other=0.0)[:, None]
        log_z = tl.load(LOG_SUM + row, alive, other=0.0)[:, None]
        t, counted, w = class_of(TARGET, WEIGHT, row, alive, n, ignore_index, PROBABILITIES, dtype)
        hard, chosen = w * (1 - SMOOTHING), t.to(column.dtype)[:, None]
        dy = share_of(DY, TOTAL, row, alive, rows, PER_ROW, MEAN, dtype)[:, None]
        soft = tl.zeros((ROWS,), dtype)
        if PROBABILITIES:
            soft += tl.load(SHARES + row, alive, other=0.0)
        elif SOFT and DX is not None:
            u = tl.zeros((ROWS, BLOCK), dtype)
            for done in range(0, n, BLOCK):
                place = done + column
                inside = alive[:, None] & (place < n)
                u += _soft(Q, WEIGHT, s_n, place, inside, n, PROBABILITIES, SMOOTHING, dtype)
            soft += tl.sum(u, 1)
        log_p_t = _logit_of(X, start, t, s_n)[:, None] - m - log_z
        of_p = dy * (hard + soft)[:, None]
        of_t = dy * (tl.exp(log_p_t) * soft[:, None] + expm1(log_p_t) * hard[:, None])
        certain = log_z < 0.69  # nearly log 2, at which p is 1/2
        if PROBABILITIES:
            of_t = dy * tl.load(OTHERS + row, alive, other=0.0)[:, None] + of_p * expm1(-log_z)
        for done in range(0, n, BLOCK):
            place = done + column
            inside = alive[:, None] & (place < n)
            x = read(X + start, place * s_n, inside) - m
            log_p = x - log_z
            if DX is not None:
                dx = tl.exp(log_p) * of_p
                if not PROBABILITIES:
                    dx = tl.where(place == chosen, of_t, dx)
                if SOFT:
                    u = _soft(Q, WEIGHT, s_n, place, inside, n, PROBABILITIES, SMOOTHING, dtype)
                    dx -= dy * u
                if PROBABILITIES:
                    dx = tl.where((x == 0) & certain, of_t, dx)
                write(DX + start, place * s_n, inside, tl.where(counted[:, None], dx, 0.0))
            if DTARGET is not None:
                dt = dy * (SMOOTHING - 1) * log_p
                if WEIGHT is not None:
                    dt *= tl.load(WEIGHT + place, place < n, other=0.0).to(dtype)
                write(DTARGET + start, place * s_n, inside, dt)


def _dense(x: Tensor) -> Tensor:
    """``x`` in strides that ``empty_like`` preserves: without gaps or overlaps."""
    if x.is_contiguous():
        return x
    layout = torch.empty_like(x, device="meta").stride()
    return x if x.stride() == layout else torch.empty_like(x).copy_(x)


@planned
def plan(
    backward: bool, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype,
    count: int, probabilities: bool, reduction: int, ignore_index: int, smoothing: float,
    both: bool = False,
) -> Launch:  # fmt: skip
    """Of the rows of a dense (outer, C, inner), on ``count`` multiprocessors. ``both``: the loss of
    each row and dx."""
    outer, n, inner = shape
    named: dict[str, int] = {"PER_ROW": reduction == NONE}
    if not backward:
        few = reduction == MEAN and not probabilities and outer * inner <= FEW
        named = {"REDUCE": reduction != NONE, "ALL": FEW if few else 0}
    live = 4 if probabilities or smoothing > 0 else 2
    looped = n > row_kernels.row_config(n, inner, dtype, live).block
    if looped and (row_kernels.far(outer * n * inner) or named.get("ALL") or both):
        live = 4  # an offset of 64 bits takes two registers, the rows' weights or losses some more
    if probabilities and not backward and dtype == torch.float64:
        live = 8  # Q and T beside the rest, each number in two registers
    return over_rows(
        _backward if backward else _forward, shape, [strides], dtype, live, count, **named,
        ignore_index=ignore_index, MEAN=reduction == MEAN, PROBABILITIES=probabilities,
        SMOOTHING=smoothing,
    )  # fmt: skip


def _prepare(
    x: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int, few: int
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """x, target and weight as the kernels read them, and what a mean divides by, of more than
    ``few`` rows."""
    x = _dense(x)
    probabilities = target.is_floating_point()
    target = like(target, x) if probabilities else target.contiguous()
    weight = None if weight is None else weight.contiguous()
    if probabilities or reduction != MEAN or target.numel() <= few:
        return x, target, weight, None
    return x, target, weight, total_weight(x, target, weight, ignore_index)


def _four(statistics: Tensor | None) -> list[Tensor | None]:
    """m, log z, Q and T of each row; None for those that were not made."""
    made: list[Tensor | None] = [] if statistics is None else list(statistics)
    return made + [None] * (4 - len(made))


def forward(
    x: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int,
    smoothing: float, makes: int, loss: Tensor | None = None, dx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The loss, and what it ``makes`` for backward: nothing, dx for a dy of 1, or (m, log Σ
    e^(x-m)) of each row, and of probabilities (Q, T). Losses of rows and dx may go to memory that
    is given; dx may be x, since a program reads what it writes first."""
    x, target, weight, total = _prepare(x, target, weight, reduction, ignore_index, FEW)
    shape = (x.shape[0], *x.shape[2:])
    if makes == GRADIENT and dx is None:
        dx = torch.empty_like(x)
    count = 4 if target.is_floating_point() else 2
    statistics = row_kernels.partial_sums(x, count, *shape) if makes == STATISTICS else None
    saved = dx if dx is not None else statistics if statistics is not None else x.new_empty(0)
    if not x.numel():
        nothing = float("nan") if reduction == MEAN else 0.0
        return x.new_full(shape if reduction == NONE else (), nothing), saved
    v, of = view_of(x), (target.is_floating_point(), reduction, ignore_index, smoothing)
    both = dx is not None and reduction == NONE
    run = plan(False, v.shape, v.stride(), x.dtype, multiprocessors(x.device), *of, both)
    if loss is None:
        loss = x.new_empty(shape if reduction == NONE else ())
    in_one = reduction == NONE or run.programs == 1
    partial = loss if in_one else row_kernels.partial_sums(x, run.programs)
    run(v, target, weight, total, partial, dx, *_four(statistics))
    if not in_one:
        row_kernels.total(partial, loss)
    return loss, saved


def backward(
    dy: Tensor, x: Tensor, target: Tensor, weight: Tensor | None, statistics: Tensor,
    reduction: int, ignore_index: int, smoothing: float, need_x: bool, need_target: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dx and the gradient of class probabilities; an empty tensor for one that is not needed."""
    layout = target
    x, target, weight, total = _prepare(x, target, weight, reduction, ignore_index, -1)
    dx = torch.empty_like(x) if need_x else None
    dtarget = torch.empty_like(target) if need_target else None
    v, of = view_of(x), (target.is_floating_point(), reduction, ignore_index, smoothing)
    run = plan(True, v.shape, v.stride(), x.dtype, multiprocessors(x.device), *of)
    made = _four(statistics.contiguous())
    run(dy.contiguous(), v, target, weight, total, *made, DX=dx, DTARGET=dtarget)
    if dtarget is not None and dtarget.stride() != layout.stride():
        dtarget = torch.empty_like(layout).copy_(dtarget)
    nothing = x.new_empty(0)
    return nothing if dx is None else dx, nothing if dtarget is None else dtarget

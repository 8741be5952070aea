"""cross_entropy of a target that is spread over the classes, by probabilities or label smoothing:
its kernels, which ``cross_entropy.py`` launches.

Formulas: ``custom_backprop/formulas/cross_entropy.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .elementary import exp_below_0, expm1, log_sum
from .launch import kernel
from .nll import (
    at,
    class_of,
    largest_and_rest_of,
    largest_of,
    logit_of,
    share_of,
    store_sums,
    total_of,
)
from .rows import (
    lowest,
    online,
    online_rest,
    online_rest_of_rows,
    online_start,
    read,
    start_of,
    tile_of,
    write,
)


@triton.jit
def _class_of(
    TARGET, WEIGHT, row, alive, n, ignore_index, PROBABILITIES: tl.constexpr, dtype: tl.constexpr
):
    """:func:`class_of`; with PROBABILITIES every row counts and has no class."""
    if PROBABILITIES:
        t, counted, w = tl.full(row.shape, -1, tl.int64), alive, tl.zeros(row.shape, dtype)
    else:
        t, counted, w = class_of(TARGET, WEIGHT, row, alive, n, ignore_index, dtype)
    return t, counted, w


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


@kernel
def forward(
    X, TARGET, WEIGHT, TOTAL, LOSS, WEIGHTS, DX, LARGEST, LOG_SUM, SHARES, OTHERS,
    rows, n, inner, tiles, s_outer, s_n, s_inner, ignore_index,
    PROBABILITIES: tl.constexpr, SMOOTHING: tl.constexpr, MEAN: tl.constexpr, REDUCE: tl.constexpr,
    PARTS: tl.constexpr, SEVERAL: tl.constexpr, LOOP: tl.constexpr, WIDE: tl.constexpr,
    WIDE_COLUMNS: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The loss of each row, or their sum a program and that of their weights, by which a mean
    divides; dx for a dy of 1; m and log z = log Σ e^(x-m), and of probabilities Q and T.

    With q the target's share of a class and Q its sum, loss = -Σ q log p and dx = Q p - q. The
    class of a hard target is left out of z's sum, since 1 - p_t is the rest over z; of
    probabilities the largest x is, and out of T, the sum of q: nothing cancels.
    """
    dtype: tl.constexpr = tl.float64 if X.dtype.element_ty == tl.float64 else tl.float32
    share = tl.full((), 1, dtype)
    if MEAN and PROBABILITIES:
        share /= rows
    elif MEAN and DX is not None:
        share /= total_of(TARGET, WEIGHT, TOTAL, rows, n, ignore_index, PARTS, dtype)
    losses, weights = tl.zeros((ROWS,), dtype), tl.zeros((ROWS,), dtype)
    first = tl.program_id(0)
    for tile in range(first, tiles if SEVERAL else first + 1, tl.num_programs(0) if SEVERAL else 1):
        row, alive, column = tile_of(tile, rows, ROWS, BLOCK, WIDE, WIDE_COLUMNS)
        start = start_of(row, inner, s_outer, s_inner)
        Q = TARGET + start if PROBABILITIES else TARGET
        # what is read row by row, before what takes longest
        t, counted, w = _class_of(TARGET, WEIGHT, row, alive, n, ignore_index, PROBABILITIES, dtype)
        hard, chosen = w * (1 - SMOOTHING), t.to(column.dtype)[:, None]
        x_t = logit_of(X, start, t, s_n)
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
                m, z = online(m, z, at(x, column, chosen - done, float("-inf")), ALIGNED)
                u += _soft(Q, WEIGHT, s_n, place, inside, n, PROBABILITIES, SMOOTHING, dtype)
            m, rest = largest_and_rest_of(m, z, x_t)
        else:
            inside = alive[:, None] & (column < n)
            x = read(X + start, column * s_n, inside, float("-inf"))
            m = largest_of(x, x_t)
            x -= m[:, None]
            e = exp_below_0(x)
            apart = x == 0 if PROBABILITIES else column == chosen
            rest = tl.sum(tl.where(apart, 0.0, e), 1)
            if PROBABILITIES:
                rest += tl.sum(tl.where(apart, 1.0, 0.0), 1) - 1  # more than 0 if several are equal
            q = _soft(Q, WEIGHT, s_n, column, inside, n, PROBABILITIES, SMOOTHING, dtype)
            u = tl.where(apart, 0.0, q) if PROBABILITIES else q
            top = tl.where(apart, q, 0.0)
        soft = tl.sum(u, 1)
        e_t = exp_below_0(x_t - m)
        of_one = tl.full((ROWS,), 1, dtype) if PROBABILITIES else e_t
        z, log_z = rest + of_one, log_sum(rest, of_one)
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
        soft_loss = tl.zeros((ROWS, BLOCK), dtype)
        last = tl.cdiv(n, BLOCK) * BLOCK - BLOCK if LOOP else 0
        for back in range(0, n if LOOP else BLOCK, BLOCK):
            begin = last - back
            place = begin + column
            inside = alive[:, None] & (place < n)
            if LOOP:
                x = read(X + start, place * s_n, inside) - m[:, None]
                e = exp_below_0(x)
                q = _soft(Q, WEIGHT, s_n, place, inside, n, PROBABILITIES, SMOOTHING, dtype)
            soft_loss += tl.where(inside, q * (x - log_z[:, None]), 0.0)
            if DX is not None:
                dx = e * of_p
                if not PROBABILITIES:
                    dx = at(dx, column, chosen - begin, of_t[:, None])
                dx -= share * q
                if PROBABILITIES:
                    certain = (rest >= 0) & (rest < 1)
                    dx = tl.where((x == 0) & certain[:, None], of_t[:, None], dx)
                write(DX + start, place * s_n, inside, tl.where(counted[:, None], dx, 0.0))
        loss -= tl.sum(soft_loss, 1)
        loss = tl.where(counted, loss, 0.0)
        if REDUCE:
            losses += loss
            weights += w
        else:
            tl.store(LOSS + row, loss.to(LOSS.dtype.element_ty), alive)
    if REDUCE:
        store_sums(LOSS, WEIGHTS, losses, weights, rows, MEAN, PROBABILITIES)


@kernel
def backward(
    DY, X, TARGET, WEIGHT, TOTAL, DX, LARGEST, LOG_SUM, SHARES, OTHERS, DTARGET,
    rows, n, inner, tiles, s_outer, s_n, s_inner, ignore_index,
    PROBABILITIES: tl.constexpr, SMOOTHING: tl.constexpr, MEAN: tl.constexpr, PER_ROW: tl.constexpr,
    PARTS: tl.constexpr, SEVERAL: tl.constexpr, WIDE: tl.constexpr, WIDE_COLUMNS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx and the gradient of class probabilities, from x and the statistics of its rows."""
    dtype: tl.constexpr = tl.float64 if X.dtype.element_ty == tl.float64 else tl.float32
    first = tl.program_id(0)
    for tile in range(first, tiles if SEVERAL else first + 1, tl.num_programs(0) if SEVERAL else 1):
        row, alive, column = tile_of(tile, rows, ROWS, BLOCK, WIDE, WIDE_COLUMNS)
        start = start_of(row, inner, s_outer, s_inner)
        Q = TARGET + start if PROBABILITIES else TARGET
        m = tl.load(LARGEST + row, alive, other=0.0)[:, None]
        log_z = tl.load(LOG_SUM + row, alive, other=0.0)[:, None]
        t, counted, w = _class_of(TARGET, WEIGHT, row, alive, n, ignore_index, PROBABILITIES, dtype)
        hard, chosen = w * (1 - SMOOTHING), t.to(column.dtype)[:, None]
        dy = share_of(DY, TOTAL, row, alive, rows, PER_ROW, MEAN, PARTS, dtype)[:, None]
        soft = tl.zeros((ROWS,), dtype)
        if PROBABILITIES:
            soft += tl.load(SHARES + row, alive, other=0.0)
        elif DX is not None:
            u = tl.zeros((ROWS, BLOCK), dtype)
            for done in range(0, n, BLOCK):
                place = done + column
                inside = alive[:, None] & (place < n)
                u += _soft(Q, WEIGHT, s_n, place, inside, n, PROBABILITIES, SMOOTHING, dtype)
            soft += tl.sum(u, 1)
        log_p_t = logit_of(X, start, t, s_n)[:, None] - m - log_z
        of_p = dy * (hard + soft)[:, None]
        of_t = dy * (exp_below_0(log_p_t) * soft[:, None] + expm1(log_p_t) * hard[:, None])
        certain = log_z < 0.69  # nearly log 2, at which p is 1/2
        if PROBABILITIES:
            of_t = dy * tl.load(OTHERS + row, alive, other=0.0)[:, None] + of_p * expm1(-log_z)
        for done in range(0, n, BLOCK):
            place = done + column
            inside = alive[:, None] & (place < n)
            x = read(X + start, place * s_n, inside) - m
            log_p = x - log_z
            if DX is not None:
                dx = exp_below_0(log_p) * of_p
                if not PROBABILITIES:
                    dx = at(dx, column, chosen - done, of_t)
                dx -= dy * _soft(Q, WEIGHT, s_n, place, inside, n, PROBABILITIES, SMOOTHING, dtype)
                if PROBABILITIES:
                    dx = tl.where((x == 0) & certain, of_t, dx)
                write(DX + start, place * s_n, inside, tl.where(counted[:, None], dx, 0.0))
            if DTARGET is not None:
                dt = dy * (SMOOTHING - 1) * log_p
                if WEIGHT is not None:
                    dt *= tl.load(WEIGHT + place, place < n, other=0.0).to(dtype)
                write(DTARGET + start, place * s_n, inside, dt)

"""Triplet margin and InfoNCE: kernels on rows of vectors, and their launchers.

The sums of a row that is longer than a block are taken lane by lane, and the row is walked again
for what depends on them. Nothing is summed over rows here: losses leave row by row, in the
accumulator's dtype. Formulas: ``custom_backprop/formulas/contrastive.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .elementary import exp, expm1, half, log, log1p_positive, upcast
from .launch import Launch, accumulator, cdiv, kernel, multiprocessors, next_power_of_2, planned
from .loss import MEAN, NONE
from .pointwise import BLOCK
from .rows import (
    lowest,
    online_rest,
    online_rest_of_rows,
    over_rows,
    read,
    rows_of,
    start_of,
    tile_of,
    write,
)


@triton.jit
def _power(a, exponent: tl.constexpr, HALF: tl.constexpr):
    """a^p for a >= 0. In float64: the rounding of p log a is an error of p |log a| units of a^p,
    which is small enough for half precision alone."""
    if HALF:
        return exp(exponent * log(a, HALF), HALF)
    return tl.exp(exponent * tl.log(a.to(tl.float64))).to(a.dtype)


# below, one return for all branches: what follows a return in a branch Triton compiles as well,
# even 1 / ORDER where ORDER is 0


@triton.jit
def _gathered(total, v, ORDER: tl.constexpr, HALF: tl.constexpr):
    """What a norm is made of, lane by lane: Σ |v|^p, or for ORDER 0 max |v|."""
    a = tl.abs(v)
    if ORDER == 0:
        total = tl.where(a > total, a, tl.where(a == a, total, a))
    elif ORDER == 1:
        total += a
    elif ORDER == 2:
        total += v * v
    else:
        total += _power(a, ORDER, HALF)
    return total


@triton.jit
def _norm(total, ORDER: tl.constexpr, HALF: tl.constexpr):
    """‖v‖ of each row. A maximum passes over NaN, which a sum keeps."""
    norm = tl.sum(total, 1)
    if ORDER == 0:
        norm = tl.where(norm == norm, tl.max(total, 1), norm)
    elif ORDER == 2:
        norm = tl.sqrt(norm)
    elif ORDER != 1:
        norm = _power(norm, 1 / ORDER, HALF)
    return norm


@triton.jit
def _direction(v, d, ORDER: tl.constexpr, HALF: tl.constexpr):
    """∂d/∂v, for ORDER 0 before it is shared among the largest; 0 where d is 0."""
    u = tl.where(v > 0, 1.0, tl.where(v < 0, -1.0, 0.0)).to(v.dtype)
    if ORDER == 0:
        u = tl.where(tl.abs(v) == d, u, 0.0)
    elif ORDER == 2:
        u = v / tl.where(d == 0, float("inf"), d)
    elif ORDER != 1:
        share = tl.abs(v) / tl.where(d == 0, float("inf"), d)
        u = tl.where(v == 0, 0.0, u * _power(share, ORDER - 1, HALF))
    return u


@kernel
def _triplet_forward(
    A, P, N, D, LOSS, rows, n, tiles, a_row, p_row, n_row,
    MARGIN: tl.constexpr, ORDER: tl.constexpr, EPS: tl.constexpr, SWAP: tl.constexpr,
    SEVERAL: tl.constexpr, LOOP: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The distances and the loss of each row."""
    HALF: tl.constexpr = half(A)
    first = tl.program_id(0)
    for tile in range(first, tiles if SEVERAL else first + 1, tl.num_programs(0) if SEVERAL else 1):
        row, alive, column = tile_of(tile, rows, ROWS, BLOCK, WIDE, False)
        ap = tl.zeros((ROWS, BLOCK), D.dtype.element_ty)
        an = tl.zeros((ROWS, BLOCK), D.dtype.element_ty)
        pn = tl.zeros((ROWS, BLOCK), D.dtype.element_ty)
        for start in range(0, n if LOOP else BLOCK, BLOCK):
            place = start + column
            inside = alive[:, None] & (place < n)
            a = read(A, (row * a_row)[:, None] + place, inside)
            p = read(P, (row * p_row)[:, None] + place, inside)
            other = read(N, (row * n_row)[:, None] + place, inside)
            ap = _gathered(ap, tl.where(inside, a - p + EPS, 0.0), ORDER, HALF)
            an = _gathered(an, tl.where(inside, a - other + EPS, 0.0), ORDER, HALF)
            if SWAP:
                pn = _gathered(pn, tl.where(inside, p - other + EPS, 0.0), ORDER, HALF)
        d_ap, d_an = _norm(ap, ORDER, HALF), _norm(an, ORDER, HALF)
        tl.store(D + row, d_ap, alive)
        tl.store(D + rows + row, d_an, alive)
        if SWAP:
            d_pn = _norm(pn, ORDER, HALF)
            tl.store(D + 2 * rows + row, d_pn, alive)
            d_an = tl.where(d_pn < d_an, d_pn, tl.where(d_pn == d_pn, d_an, d_pn))
        h = d_ap - d_an + MARGIN
        tl.store(LOSS + row, tl.where(h < 0, 0.0, h).to(LOSS.dtype.element_ty), alive)


@kernel
def _triplet_backward(
    DY, A, P, N, D, DA, DP, DN, rows, n, tiles, a_row, p_row, n_row,
    MARGIN: tl.constexpr, ORDER: tl.constexpr, EPS: tl.constexpr, SWAP: tl.constexpr,
    PER_ROW: tl.constexpr, MEAN: tl.constexpr, SEVERAL: tl.constexpr, LOOP: tl.constexpr,
    WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradients that are wanted (else None). For ORDER 0 the row is first walked to count the
    largest."""
    HALF: tl.constexpr = half(A)
    first = tl.program_id(0)
    for tile in range(first, tiles if SEVERAL else first + 1, tl.num_programs(0) if SEVERAL else 1):
        row, alive, column = tile_of(tile, rows, ROWS, BLOCK, WIDE, False)
        d_ap = tl.load(D + row, alive, other=1.0)
        d_an = tl.load(D + rows + row, alive, other=1.0)
        d_pn = tl.load(D + 2 * rows + row, alive, other=1.0) if SWAP else d_an
        dy = upcast(tl.load(DY + row, alive, other=0.0) if PER_ROW else tl.load(DY))
        if MEAN:
            dy = dy / rows
        nearer = tl.where(d_pn < d_an, d_pn, d_an)
        of_ap = tl.where(d_ap - nearer + MARGIN >= 0, dy, 0.0)
        e = tl.where(d_an < d_pn, 1.0, tl.where(d_an > d_pn, 0.0, 0.5)).to(d_an.dtype)
        of_an = of_ap * e if SWAP else of_ap
        of_pn = of_ap - of_an
        a_start, p_start = A + (row * a_row)[:, None], P + (row * p_row)[:, None]
        n_start = N + (row * n_row)[:, None]
        if ORDER == 0:
            ap = tl.zeros((ROWS, BLOCK), d_an.dtype)
            an = tl.zeros((ROWS, BLOCK), d_an.dtype)
            pn = tl.zeros((ROWS, BLOCK), d_an.dtype)
            for start in range(0, n if LOOP else BLOCK, BLOCK):
                place = start + column
                inside = alive[:, None] & (place < n)
                a = read(a_start, place, inside)
                p = read(p_start, place, inside)
                other = read(n_start, place, inside)
                ap += tl.where(inside & (tl.abs(a - p + EPS) == d_ap[:, None]), 1.0, 0.0)
                an += tl.where(inside & (tl.abs(a - other + EPS) == d_an[:, None]), 1.0, 0.0)
                if SWAP:
                    pn += tl.where(inside & (tl.abs(p - other + EPS) == d_pn[:, None]), 1.0, 0.0)
            of_ap /= tl.sum(ap, 1)
            of_an /= tl.sum(an, 1)
            if SWAP:
                of_pn /= tl.sum(pn, 1)
        for start in range(0, n if LOOP else BLOCK, BLOCK):
            place = start + column
            inside = alive[:, None] & (place < n)
            a = read(a_start, place, inside)
            p = read(p_start, place, inside)
            other = read(n_start, place, inside)
            to_p = of_ap[:, None] * _direction(a - p + EPS, d_ap[:, None], ORDER, HALF)
            to_n = of_an[:, None] * _direction(a - other + EPS, d_an[:, None], ORDER, HALF)
            here = (row * n)[:, None] + place
            if DA is not None:
                write(DA, here, inside, to_p - to_n)
            if SWAP:
                between = of_pn[:, None] * _direction(p - other + EPS, d_pn[:, None], ORDER, HALF)
                to_p += between
                to_n += between
            if DP is not None:
                write(DP, here, inside, -to_p)
            if DN is not None:
                write(DN, here, inside, to_n)


@kernel
def _softmax(
    S, LOSS, LARGEST, LOG_SUM, rows, n, inner, tiles, s_outer, s_n, s_inner,
    TEMPERATURE: tl.constexpr, AMONG_KEYS: tl.constexpr, SEVERAL: tl.constexpr, WIDE: tl.constexpr,
    WIDE_COLUMNS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of each row of S / τ: m, log Σ e^(s-m), and the loss."""
    dtype: tl.constexpr = S.dtype.element_ty
    # a GPU's quick division is off by two units, which e^s would magnify
    SCALE: tl.constexpr = 1 / TEMPERATURE
    first = tl.program_id(0)
    for tile in range(first, tiles if SEVERAL else first + 1, tl.num_programs(0) if SEVERAL else 1):
        row, alive, column = tile_of(tile, rows, ROWS, BLOCK, WIDE, WIDE_COLUMNS)
        s_start = S + start_of(row, inner, s_outer, s_inner)
        m = tl.full((ROWS, BLOCK), lowest(dtype), dtype)
        rest = tl.full((ROWS, BLOCK), -1, dtype)
        for start in range(0, n, BLOCK):
            place = start + column
            inside = alive[:, None] & (place < n)
            x = read(s_start, place * s_n, inside, float("-inf")) * SCALE
            m, rest = online_rest(m, rest, x, True)
        m, rest = online_rest_of_rows(m, rest, True)
        certain = (rest >= 0) & (rest < 1)
        near = log1p_positive(tl.where(certain, rest, 0.0))
        log_z = tl.where(certain, near, tl.log(rest + 1))
        positive = (row * s_n if AMONG_KEYS else row * 0)[:, None]
        target = tl.sum(read(s_start, positive, alive[:, None]), 1) * SCALE
        tl.store(LOSS + row, log_z - (target - m), alive)
        if LARGEST is not None:
            tl.store(LARGEST + row, m, alive)
            tl.store(LOG_SUM + row, log_z, alive)


@triton.jit
def _less(log_p, is_positive):
    """p, or p - 1 of a positive."""
    return tl.where(is_positive, expm1(log_p), exp(log_p))


@kernel
def _slope(
    S, G, LARGEST, LOG_SUM, COLUMN_LARGEST, COLUMN_LOG_SUM, rows, n,
    TEMPERATURE: tl.constexpr, AMONG_KEYS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """G = (softmax(s) - I) / τ, a tile a program; of the mean of both softmaxes if there are
    statistics of columns. G may be S itself. P - 1 of a positive is e^log P - 1, which does not
    cancel."""
    tiles = tl.cdiv(n, BLOCK)
    row = (tl.program_id(0) // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    place = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)[None, :]
    alive = row < rows
    inside = alive[:, None] & (place < n)
    here = row[:, None] * n + place
    SCALE: tl.constexpr = 1 / TEMPERATURE
    s = read(S, here, inside) * SCALE
    m = tl.load(LARGEST + row, alive, other=0.0)[:, None]
    log_z = tl.load(LOG_SUM + row, alive, other=0.0)[:, None]
    is_positive = place == (row[:, None] if AMONG_KEYS else 0)
    slope = _less(s - m - log_z, is_positive)
    if COLUMN_LARGEST is not None:
        m = tl.load(COLUMN_LARGEST + place, place < n, other=0.0)
        log_z = tl.load(COLUMN_LOG_SUM + place, place < n, other=0.0)
        slope = (slope + _less(s - m - log_z, is_positive)) / 2
    write(G, here, inside, slope * SCALE)


def _reduced(loss: Tensor, reduction: int, dtype: torch.dtype) -> Tensor:
    if reduction != NONE:
        loss = loss.mean() if reduction == MEAN else loss.sum()
    return loss.to(dtype)


@planned
def plan_triplet(
    rows: int, n: int, strides: tuple[int, ...], dtype: torch.dtype, count: int,
    margin: float, order: float, eps: float, swap: bool, reduction: int | None,
) -> Launch:  # fmt: skip
    """The distances of rows in these three strides; or, of a loss in some reduction, their
    gradients."""
    named: dict[str, Any] = dict(zip(("a_row", "p_row", "n_row"), strides, strict=True))
    named.update(MARGIN=margin, ORDER=0.0 if order == math.inf else order, EPS=eps, SWAP=swap)
    if reduction is not None:
        named.update(PER_ROW=reduction == NONE, MEAN=reduction == MEAN)
    kernel = _triplet_forward if reduction is None else _triplet_backward
    layouts = [(s, 1, 1) for s in (*strides, n)]
    live = 16 if dtype == torch.float64 else 8
    return over_rows(kernel, (rows, n, 1), layouts, dtype, live, count, **named)


def _triplet(*of: Tensor, options: tuple[Any, ...]) -> tuple[Launch, list[Tensor]]:
    """The launch, and a, p and n as rows."""
    flat = [rows_of(t) for t in of]
    strides, a = tuple([t.stride(0) for t in flat]), flat[0]
    return plan_triplet(*a.shape, strides, a.dtype, multiprocessors(a.device), *options), flat


def triplet_forward(
    a: Tensor, p: Tensor, n: Tensor, margin: float, order: float, eps: float, swap: bool,
    reduction: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The loss, and the distances of each row."""
    run, flat = _triplet(a, p, n, options=(margin, order, eps, swap, None))
    d = a.new_empty((3 if swap else 2, *a.shape[:-1]), dtype=accumulator(a.dtype))
    loss = a.new_empty(a.shape[:-1], dtype=d.dtype)
    run(*flat, d, loss)
    return _reduced(loss, reduction, a.dtype), d


def triplet_backward(
    dy: Tensor, a: Tensor, p: Tensor, n: Tensor, d: Tensor, margin: float, order: float, eps: float,
    swap: bool, reduction: int, needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """da, dp and dn, contiguous; None for each that is not needed."""
    run, flat = _triplet(a, p, n, options=(margin, order, eps, swap, reduction))
    grads = [a.new_empty(a.shape) if need else None for need in needs]
    run(dy.contiguous(), *flat, d.contiguous(), *grads)
    return tuple(grads)


def _similarities(q: Tensor, k: Tensor, n: Tensor | None) -> Tensor:
    """q · k of each pair that is compared, in the accumulator's dtype: what the softmax makes of a
    rounded one could not be mended."""
    wide = accumulator(q.dtype)
    if q.is_cuda and q.dtype != wide and n is None:
        return torch.mm(q, k.t(), out_dtype=wide)
    q, k, n = (None if t is None else t.to(wide) for t in (q, k, n))  # type: ignore[assignment]
    if n is None:
        return torch.mm(q, k.t())
    of_negatives = torch.mm(q, n.t()) if n.dim() == 2 else torch.bmm(n, q.unsqueeze(2)).squeeze(2)
    return torch.cat([(q * k).sum(1, keepdim=True), of_negatives], 1)


@planned
def plan_softmax(
    shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, count: int,
    temperature: float, among_keys: bool,
) -> Launch:  # fmt: skip
    """The losses of rows (outer, n, inner)."""
    options = {"TEMPERATURE": temperature, "AMONG_KEYS": among_keys}
    return over_rows(_softmax, shape, [strides], dtype, 4, count, **options)


@planned
def plan_slope(
    rows: int, n: int, dtype: torch.dtype, temperature: float, among_keys: bool
) -> Launch:
    """The gradient of (rows, n) similarities."""
    block = min(next_power_of_2(max(n, 1)), BLOCK)
    return _slope.launch(
        cdiv(rows, BLOCK // block) * cdiv(n, block), rows=rows, n=n, TEMPERATURE=temperature,
        AMONG_KEYS=among_keys, ROWS=BLOCK // block, BLOCK=block,
        num_warps=8 if dtype.itemsize == 8 else 4,
    )  # fmt: skip


def info_nce(
    q: Tensor, k: Tensor, n: Tensor | None, temperature: float, symmetric: bool, reduction: int,
    makes_G: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The loss, and G if ``makes_G``: over the similarities, where their dtype is that of q."""
    s = _similarities(q, k, n)
    rows, options = len(s), (temperature, n is None)
    count = multiprocessors(s.device)
    losses: list[Tensor] = []
    statistics: list[Tensor | None] = []
    # columns are rows that lie side by side
    for v in (s.unsqueeze(2), s.unsqueeze(0))[: 1 + symmetric]:
        losses.append(s.new_empty(rows))
        statistics += [s.new_empty(rows), s.new_empty(rows)] if makes_G else [None, None]
        run = plan_softmax(v.shape, v.stride(), s.dtype, count, *options)
        run(v, losses[-1], *statistics[-2:])
    G = None
    if makes_G:
        G = s if s.dtype == q.dtype else q.new_empty(s.shape)
        columns = statistics[2:] if symmetric else (None, None)
        plan_slope(*s.shape, s.dtype, *options)(s, G, *statistics[:2], *columns)
    loss = (losses[0] + losses[1]) / 2 if symmetric else losses[0]
    return _reduced(loss, reduction, q.dtype), G

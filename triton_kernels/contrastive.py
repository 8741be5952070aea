"""Triplet margin, InfoNCE and the division by the norm: kernels on rows of vectors, and their
launchers.

Every kernel takes tiles of ROWS rows by BLOCK columns; where a row is longer than a block, its sums
are held lane by lane and the row is
walked again for what depends on them. Nothing is summed over rows here: losses leave row by row, in
the accumulator's dtype.
Formulas: ``custom_backprop/formulas/contrastive.py``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .elementary import exp, exp_minus, upcast
from .launch import accumulator, cdiv, launch, next_power_of_2
from .loss import MEAN, NONE


@triton.jit
def _tile(ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """(row numbers, columns of the first block)."""
    return tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)[None, :]


@triton.jit
def _power(a, exponent: tl.constexpr):
    """a^p for a >= 0. In float64: the rounding of p log a is an error of p |log a| units of a^p."""
    return tl.exp(exponent * tl.log(a.to(tl.float64))).to(a.dtype)


@triton.jit
def _load(X, row, x_row, place, inside):
    """A tile of X, 0 outside."""
    return upcast(tl.load(X + row[:, None] * x_row + place, inside, other=0.0))


# below, one return for all branches: what follows a return in a branch Triton compiles as well,
# even 1 / ORDER where ORDER is 0


@triton.jit
def _gathered(total, v, ORDER: tl.constexpr):
    """What a norm is made of, lane by lane: Σ |v|^p, or for ORDER 0 max |v|."""
    a = tl.abs(v)
    if ORDER == 0:
        total = tl.where(a > total, a, tl.where(a == a, total, a))
    elif ORDER == 1:
        total += a
    elif ORDER == 2:
        total += v * v
    else:
        total += _power(a, ORDER)
    return total


@triton.jit
def _norm(total, ORDER: tl.constexpr):
    """‖v‖ of each row. A maximum passes over NaN, which a sum keeps."""
    norm = tl.sum(total, 1)
    if ORDER == 0:
        norm = tl.where(norm == norm, tl.max(total, 1), norm)
    elif ORDER == 2:
        norm = tl.sqrt(norm)
    elif ORDER != 1:
        norm = _power(norm, 1 / ORDER)
    return norm


@triton.jit
def _direction(v, d, ORDER: tl.constexpr):
    """∂d/∂v, for ORDER 0 before it is shared among the largest; 0 where d is 0."""
    u = tl.where(v > 0, 1.0, tl.where(v < 0, -1.0, 0.0)).to(v.dtype)
    if ORDER == 0:
        u = tl.where(tl.abs(v) == d, u, 0.0)
    elif ORDER == 2:
        u = v / tl.where(d == 0, float("inf"), d)
    elif ORDER != 1:
        u = tl.where(
            v == 0, 0.0, u * _power(tl.abs(v) / tl.where(d == 0, float("inf"), d), ORDER - 1)
        )
    return u


@triton.jit
def _triplet_forward(
    A, P, N, D, LOSS, rows, width, a_row, p_row, n_row,
    MARGIN: tl.constexpr, ORDER: tl.constexpr, EPS: tl.constexpr, SWAP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The distances and the loss of each row."""
    row, column = _tile(ROWS, BLOCK)
    alive = row < rows
    ap = tl.zeros((ROWS, BLOCK), D.dtype.element_ty)
    an = tl.zeros((ROWS, BLOCK), D.dtype.element_ty)
    pn = tl.zeros((ROWS, BLOCK), D.dtype.element_ty)
    for start in range(0, width, BLOCK):
        place = start + column
        inside = alive[:, None] & (place < width)
        a = _load(A, row, a_row, place, inside)
        p = _load(P, row, p_row, place, inside)
        n = _load(N, row, n_row, place, inside)
        ap = _gathered(ap, tl.where(inside, a - p + EPS, 0.0), ORDER)
        an = _gathered(an, tl.where(inside, a - n + EPS, 0.0), ORDER)
        if SWAP:
            pn = _gathered(pn, tl.where(inside, p - n + EPS, 0.0), ORDER)
    d_ap = _norm(ap, ORDER)
    d_an = _norm(an, ORDER)
    tl.store(D + row, d_ap, alive)
    tl.store(D + rows + row, d_an, alive)
    if SWAP:
        d_pn = _norm(pn, ORDER)
        tl.store(D + 2 * rows + row, d_pn, alive)
        d_an = tl.where(d_pn < d_an, d_pn, tl.where(d_pn == d_pn, d_an, d_pn))
    h = d_ap - d_an + MARGIN
    tl.store(LOSS + row, tl.where(h < 0, 0.0, h).to(LOSS.dtype.element_ty), alive)


@triton.jit
def _triplet_backward(
    DY, A, P, N, D, DA, DP, DN, rows, width, a_row, p_row, n_row,
    MARGIN: tl.constexpr, ORDER: tl.constexpr, EPS: tl.constexpr, SWAP: tl.constexpr, PER_ROW: tl.constexpr, MEAN: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradients that have a place to go (else None). For ORDER 0 the row is first walked to
    count the largest."""
    row, column = _tile(ROWS, BLOCK)
    alive = row < rows
    d_ap = tl.load(D + row, alive, other=1.0)
    d_an = tl.load(D + rows + row, alive, other=1.0)
    d_pn = tl.load(D + 2 * rows + row, alive, other=1.0) if SWAP else d_an
    dy = upcast(tl.load(DY + row, alive, other=0.0) if PER_ROW else tl.load(DY))
    if MEAN:
        dy = dy / rows
    nearer = tl.where(d_pn < d_an, d_pn, d_an)
    of_ap = tl.where(d_ap - nearer + MARGIN >= 0, dy, 0.0)
    e = tl.where(d_an < d_pn, 1.0, tl.where(d_an > d_pn, 0.0, 0.5)).to(d_an.dtype) if SWAP else 1.0
    of_an = of_ap * e
    of_pn = of_ap - of_an
    if ORDER == 0:
        ap = tl.zeros((ROWS, BLOCK), d_an.dtype)
        an = tl.zeros((ROWS, BLOCK), d_an.dtype)
        pn = tl.zeros((ROWS, BLOCK), d_an.dtype)
        for start in range(0, width, BLOCK):
            place = start + column
            inside = alive[:, None] & (place < width)
            a = _load(A, row, a_row, place, inside)
            p = _load(P, row, p_row, place, inside)
            n = _load(N, row, n_row, place, inside)
            ap += tl.where(inside & (tl.abs(a - p + EPS) == d_ap[:, None]), 1.0, 0.0)
            an += tl.where(inside & (tl.abs(a - n + EPS) == d_an[:, None]), 1.0, 0.0)
            if SWAP:
                pn += tl.where(inside & (tl.abs(p - n + EPS) == d_pn[:, None]), 1.0, 0.0)
        of_ap /= tl.sum(ap, 1)
        of_an /= tl.sum(an, 1)
        if SWAP:
            of_pn /= tl.sum(pn, 1)
    for start in range(0, width, BLOCK):
        place = start + column
        inside = alive[:, None] & (place < width)
        a = _load(A, row, a_row, place, inside)
        p = _load(P, row, p_row, place, inside)
        n = _load(N, row, n_row, place, inside)
        to_p = of_ap[:, None] * _direction(a - p + EPS, d_ap[:, None], ORDER)
        to_n = of_an[:, None] * _direction(a - n + EPS, d_an[:, None], ORDER)
        here = row[:, None] * width + place
        if DA is not None:
            tl.store(DA + here, (to_p - to_n).to(DA.dtype.element_ty), inside)
        if SWAP:
            between = of_pn[:, None] * _direction(p - n + EPS, d_pn[:, None], ORDER)
            to_p += between
            to_n += between
        if DP is not None:
            tl.store(DP + here, (-to_p).to(DP.dtype.element_ty), inside)
        if DN is not None:
            tl.store(DN + here, to_n.to(DN.dtype.element_ty), inside)


@triton.jit
def _softmax(
    S, LOSS, LARGEST, LOG_SUM, rows, width, s_row, s_column,
    TEMPERATURE: tl.constexpr, AMONG_KEYS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of each row of S / τ: m, log Σ e^(s-m), and the loss. A row of S may be a column of it in
    memory."""
    row, column = _tile(ROWS, BLOCK)
    alive = row < rows
    dtype: tl.constexpr = S.dtype.element_ty
    # m and z of each lane by itself: x <= m adds e^(x-m) to z, x > m scales z by e^(m-x) and adds 1
    lowest: tl.constexpr = (
        -1.7976931348623157e308 if dtype == tl.float64 else -3.4028234663852886e38
    )
    m = tl.full((ROWS, BLOCK), lowest, dtype)
    z = tl.zeros((ROWS, BLOCK), dtype)
    SCALE: tl.constexpr = (
        1 / TEMPERATURE
    )  # a GPU's quick division is off by two units, which e^s would magnify
    for start in range(0, width, BLOCK):
        place = start + column
        inside = alive[:, None] & (place < width)
        x = (
            tl.load(
                S + row[:, None] * s_row + place.to(tl.int64) * s_column,
                inside,
                other=float("-inf"),
            )
            * SCALE
        )
        e = exp_minus(tl.abs(x - m))
        z = tl.where(x > m, z * e + 1, z + e)
        m = tl.where(x <= m, m, x)
    lane = m
    m = tl.max(lane, 1)
    log_z = tl.log(tl.sum(z * exp(lane - m[:, None]), 1))
    target = (
        tl.load(S + row * s_row + (row * s_column if AMONG_KEYS else 0), alive, other=0.0) * SCALE
    )
    tl.store(LOSS + row, log_z - (target - m), alive)
    if LARGEST is not None:
        tl.store(LARGEST + row, m, alive)
        tl.store(LOG_SUM + row, log_z, alive)


@triton.jit
def _slope(
    S, G, LARGEST, LOG_SUM, COLUMN_LARGEST, COLUMN_LOG_SUM, rows, width,
    TEMPERATURE: tl.constexpr, AMONG_KEYS: tl.constexpr, SYMMETRIC: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """G = (softmax(s) - I) / τ, a tile a program; of the mean of both softmaxes if SYMMETRIC. G may
    be S itself."""
    tiles = tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    place = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)[None, :]
    alive = row < rows
    inside = alive[:, None] & (place < width)
    here = row[:, None] * width + place
    SCALE: tl.constexpr = 1 / TEMPERATURE
    s = tl.load(S + here, inside, other=0.0) * SCALE
    m = tl.load(LARGEST + row, alive, other=0.0)[:, None]
    log_z = tl.load(LOG_SUM + row, alive, other=0.0)[:, None]
    p = exp(s - m - log_z)
    if SYMMETRIC:
        m = tl.load(COLUMN_LARGEST + place, place < width, other=0.0)
        log_z = tl.load(COLUMN_LOG_SUM + place, place < width, other=0.0)
        p = (p + exp(s - m - log_z)) / 2
    is_positive = place == (row[:, None] if AMONG_KEYS else 0)
    g = tl.where(is_positive, p - 1, p) * SCALE
    tl.store(G + here, g.to(G.dtype.element_ty), inside)


@triton.jit
def _unit_forward(
    X,
    Y,
    R,
    rows,
    width,
    x_row,
    EPS: tl.constexpr,
    LOOP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y = x / r and r = max(‖x‖, ε)."""
    row, column = _tile(ROWS, BLOCK)
    alive = row < rows
    inside = alive[:, None] & (column < width)
    x = _load(X, row, x_row, column, inside)
    square = x * x
    if LOOP:
        for start in range(BLOCK, width, BLOCK):
            more = _load(X, row, x_row, start + column, alive[:, None] & (start + column < width))
            square += more * more
    r = tl.sqrt(tl.sum(square, 1))
    r = tl.where(r < EPS, EPS, r)
    tl.store(R + row, r, alive)
    here = row[:, None] * width + column
    tl.store(Y + here, (x / r[:, None]).to(Y.dtype.element_ty), inside)
    if LOOP:
        for start in range(BLOCK, width, BLOCK):
            inside = alive[:, None] & (start + column < width)
            x = _load(X, row, x_row, start + column, inside)
            tl.store(Y + here + start, (x / r[:, None]).to(Y.dtype.element_ty), inside)


@triton.jit
def _unit_backward(
    DY, Y, R, DX, rows, width, dy_row, EPS: tl.constexpr, LOOP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """dx = (dy - y Σ y dy) / r."""
    row, column = _tile(ROWS, BLOCK)
    alive = row < rows
    inside = alive[:, None] & (column < width)
    dy = _load(DY, row, dy_row, column, inside)
    y = _load(Y, row, width, column, inside)
    product = dy * y
    if LOOP:
        for start in range(BLOCK, width, BLOCK):
            more = alive[:, None] & (start + column < width)
            product += _load(DY, row, dy_row, start + column, more) * _load(
                Y, row, width, start + column, more
            )
    r = tl.load(R + row, alive, other=1.0)
    along = tl.where(r > EPS, tl.sum(product, 1), 0.0)
    here = row[:, None] * width + column
    tl.store(DX + here, ((dy - y * along[:, None]) / r[:, None]).to(DX.dtype.element_ty), inside)
    if LOOP:
        for start in range(BLOCK, width, BLOCK):
            inside = alive[:, None] & (start + column < width)
            dy = _load(DY, row, dy_row, start + column, inside)
            y = _load(Y, row, width, start + column, inside)
            tl.store(
                DX + here + start,
                ((dy - y * along[:, None]) / r[:, None]).to(DX.dtype.element_ty),
                inside,
            )


def _shape(width: int, dtype: torch.dtype, side_by_side: int = 1, warps: int = 4) -> dict[str, Any]:
    """The tile: 1024 numbers a program, of ``side_by_side`` rows at least. Eight warps share those
    of float64, of two registers each."""
    block = min(next_power_of_2(max(width, 1)), 1024 // side_by_side)
    return {
        "ROWS": 1024 // block,
        "BLOCK": block,
        "num_warps": 8 if dtype == torch.float64 else warps,
    }


def _rows(t: Tensor) -> Tensor:
    """(..., D) as rows whose components lie side by side; rows that are one row in memory stay
    one."""
    flat = t.reshape(t.shape[:-1].numel(), t.shape[-1])
    return flat if flat.stride(1) == 1 or flat.shape[1] == 1 else flat.contiguous()


def _reduced(loss: Tensor, reduction: int, dtype: torch.dtype) -> Tensor:
    return (loss if reduction == NONE else loss.mean() if reduction == MEAN else loss.sum()).to(
        dtype
    )


def _norm_options(margin: float, order: float, eps: float, swap: bool) -> dict[str, Any]:
    return {
        "MARGIN": margin,
        "ORDER": 0.0 if order == math.inf else order,
        "EPS": eps,
        "SWAP": swap,
    }


def triplet_forward(
    a: Tensor,
    p: Tensor,
    n: Tensor,
    margin: float,
    order: float,
    eps: float,
    swap: bool,
    reduction: int,
) -> tuple[Tensor, Tensor]:
    """The loss, and the distances of each row."""
    flat, shape, wide = [_rows(t) for t in (a, p, n)], a.shape[:-1], accumulator(a.dtype)
    rows, width = flat[0].shape
    d = a.new_empty((3 if swap else 2, *shape), dtype=wide)
    loss = a.new_empty(shape, dtype=wide)
    tile, norm = _shape(width, a.dtype, warps=8), _norm_options(margin, order, eps, swap)
    launch(
        _triplet_forward, cdiv(rows, tile["ROWS"]), *flat, d, loss, rows, width, *(t.stride(0) for t in flat),
        **norm, **tile,
    )  # fmt: skip
    return _reduced(loss, reduction, a.dtype), d


def triplet_backward(
    dy: Tensor,
    a: Tensor,
    p: Tensor,
    n: Tensor,
    d: Tensor,
    margin: float,
    order: float,
    eps: float,
    swap: bool,
    reduction: int,
    needs: Any,
) -> tuple[Tensor, ...]:
    """da, dp and dn, contiguous; an empty tensor for each that is not needed."""
    flat = [_rows(t) for t in (a, p, n)]
    rows, width = flat[0].shape
    grads = [a.new_empty(a.shape) if need else None for need in needs]
    tile, norm = _shape(width, a.dtype, warps=8), _norm_options(margin, order, eps, swap)
    launch(
        _triplet_backward, cdiv(rows, tile["ROWS"]), dy.contiguous(), *flat, d, *grads, rows, width, *(t.stride(0) for t in flat),
        **norm, PER_ROW=reduction == NONE, MEAN=reduction == MEAN, **tile,
    )  # fmt: skip
    return tuple(a.new_empty(0) if g is None else g for g in grads)


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


def info_nce(
    q: Tensor,
    k: Tensor,
    n: Tensor | None,
    temperature: float,
    symmetric: bool,
    reduction: int,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """The loss, and G if ``keep`` (else an empty tensor): in the place of the similarities, where
    their dtype is that of q."""
    s = _similarities(q, k, n)
    rows, width = s.shape
    options: dict[str, Any] = {"TEMPERATURE": temperature, "AMONG_KEYS": n is None}
    statistics = s.new_empty((2, 2 if symmetric else 1, rows)) if keep else None
    losses = s.new_empty((2 if symmetric else 1, rows))
    for i, of in enumerate((s, s.t()) if symmetric else (s,)):
        tile = _shape(width, s.dtype, side_by_side=32 if i else 1)
        m, log_z = (None, None) if statistics is None else statistics[:, i]
        launch(
            _softmax,
            cdiv(rows, tile["ROWS"]),
            of,
            losses[i],
            m,
            log_z,
            rows,
            width,
            *of.stride(),
            **options,
            **tile,
        )
    G = q.new_empty(0)
    if statistics is not None:
        G = s if s.dtype == q.dtype else q.new_empty(s.shape)
        (m, *of_column), (log_z, *of_column_log) = statistics
        columns = (of_column[0], of_column_log[0]) if symmetric else (None, None)
        tile = _shape(width, s.dtype)
        programs = cdiv(rows, tile["ROWS"]) * cdiv(width, tile["BLOCK"])
        launch(
            _slope,
            programs,
            s,
            G,
            m,
            log_z,
            *columns,
            rows,
            width,
            **options,
            SYMMETRIC=symmetric,
            **tile,
        )
    return _reduced(losses.mean(0) if symmetric else losses[0], reduction, q.dtype), G


def unit_forward(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y, contiguous, and r."""
    flat = _rows(x)
    rows, width = flat.shape
    y, r = x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=accumulator(x.dtype))
    tile = _shape(width, x.dtype)
    launch(
        _unit_forward,
        cdiv(rows, tile["ROWS"]),
        flat,
        y,
        r,
        rows,
        width,
        flat.stride(0),
        EPS=eps,
        LOOP=width > tile["BLOCK"],
        **tile,
    )
    return y, r


def unit_backward(dy: Tensor, y: Tensor, r: Tensor, eps: float) -> Tensor:
    """dx, contiguous."""
    flat = _rows(dy)
    rows, width = flat.shape
    dx = y.new_empty(y.shape)
    tile = _shape(width, y.dtype)
    launch(
        _unit_backward,
        cdiv(rows, tile["ROWS"]),
        flat,
        y.contiguous(),
        r,
        dx,
        rows,
        width,
        flat.stride(0),
        EPS=eps,
        LOOP=width > tile["BLOCK"],
        **tile,
    )
    return dx

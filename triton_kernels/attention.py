"""Attention, block by block: the scores are never in memory.

A program of forward and of dq has a tile of queries and walks over the keys of its band; one of dk
and dv has a tile of keys and walks over the queries of all heads that they serve; one of a mask's
gradient has a tile of the mask and walks over what shares it. So each result is written once.

Scores are in units of log 2: 2^x is one instruction. Formulas:
``custom_backprop/formulas/attention.py``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dropout import words_at
from .elementary import upcast
from .launch import Launch, cdiv, kernel, next_power_of_2, planned
from .matmul import precision

#: the largest size of a head in a dtype: products of float32 and float64 have no tensor cores, and
#: those of wide heads run out of registers
LARGEST = {torch.float64: 64, torch.float32: 128, torch.bfloat16: 256, torch.float16: 256}

LOG2E = tl.constexpr(1 / math.log(2))


@triton.jit
def _exp2(x):
    """2^x. Of float64 there is no instruction, and e^x is exact."""
    return tl.exp(x / LOG2E) if x.dtype == tl.float64 else tl.exp2(x)


@triton.jit
def _rows(X, first, count, stride, SIZE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """(places, inside) of the rows from ``first`` on, of ``count`` rows of SIZE numbers."""
    row, column = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    inside = (row < count - first)[:, None]
    if SIZE < WIDTH:
        inside &= (column < SIZE)[None, :]
    start = first * tl.full((), stride, tl.int64)
    return X + start + row[:, None] * stride + column[None, :], inside


@triton.jit
def _load(X, first, count, stride, SIZE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Those rows, and zeros around them."""
    place, inside = _rows(X, first, count, stride, SIZE, ROWS, WIDTH)
    return tl.load(place, inside, other=0.0)


@triton.jit
def _store(X, first, count, stride, x, SIZE: tl.constexpr):
    place, inside = _rows(X, first, count, stride, SIZE, x.shape[0], x.shape[1])
    tl.store(place, x.to(X.dtype.element_ty), inside)


@triton.jit
def _head(X, batch, head, batch_stride, head_stride):
    """The first number of a head."""
    offset = batch * tl.full((), batch_stride, tl.int64) + head * tl.full((), head_stride, tl.int64)
    return X + offset


@triton.jit
def _biased(
    s, MASK, SLOPE, i, j, queries, keys, lowest, highest, mask_row, mask_column, scale,
    LOWEST: tl.constexpr, HIGHEST: tl.constexpr,
):  # fmt: skip
    """(c s + b) log2 e of queries i and keys j, -inf outside."""
    s *= tl.full((), scale * LOG2E, s.dtype)
    inside = (i < queries) & (j < keys)
    if MASK is not None:
        given = tl.load(MASK + (i.to(tl.int64) * mask_row + j.to(tl.int64) * mask_column), inside)
        if MASK.dtype.element_ty == tl.int1:
            inside &= given
        else:
            s += upcast(given) * tl.full((), LOG2E, s.dtype)
    if SLOPE is not None:
        slope = tl.load(SLOPE).to(s.dtype) * tl.full((), LOG2E, s.dtype)
        s -= slope * tl.abs(i - j + (keys - queries)).to(s.dtype)
    if LOWEST:
        inside &= j - i >= lowest
    if HIGHEST:
        inside &= j - i <= highest
    return tl.where(inside, s, float("-inf"))


@triton.jit
def _kept(SEED, row, at, keys, threshold, N: tl.constexpr):
    """Which of N scores from key ``at`` on dropout keeps, in each row of all heads' scores."""
    counter = row[:, None] * tl.cdiv(keys, 4) + (at // 4 + tl.arange(0, N // 4))[None, :]
    return words_at(tl.load(SEED), counter) >= threshold


@triton.jit
def _keys_of(
    first, keys, lowest, highest, LOWEST: tl.constexpr, HIGHEST: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr,
):  # fmt: skip
    """The keys that the queries from ``first`` on may attend to, from a multiple of N."""
    start, end = first * 0, keys
    if LOWEST:
        start = tl.maximum(first + lowest, 0) // N * N
    if HIGHEST:
        end = tl.minimum(first + M + highest, keys)
    return start, end


@kernel
def _forward(
    Q, K, V, MASK, SLOPES, SEED, Y, L,
    heads, group, queries, keys, lowest, highest, scale: tl.float64, threshold: tl.uint32,
    factor: tl.float64,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, y_batch, y_head, y_row,
    mask_batch, mask_head, mask_row, mask_column,
    LOWEST: tl.constexpr, HIGHEST: tl.constexpr, PRECISION: tl.constexpr, E: tl.constexpr,
    F: tl.constexpr, E_WIDTH: tl.constexpr, F_WIDTH: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """y and l of M queries."""
    wide: tl.constexpr = tl.float64 if Q.dtype.element_ty == tl.float64 else tl.float32
    tiles = tl.cdiv(queries, M)
    both = tl.program_id(0) // tiles
    first = tl.program_id(0) % tiles * M
    batch, head = both // heads, both % heads
    Q, Y = _head(Q, batch, head, q_batch, q_head), _head(Y, batch, head, y_batch, y_head)
    K = _head(K, batch, head // group, k_batch, k_head)
    V = _head(V, batch, head // group, v_batch, v_head)
    mask = None if MASK is None else _head(MASK, batch, head, mask_batch, mask_head)
    slope = None if SLOPES is None else SLOPES + head

    q = _load(Q, first, queries, q_row, E, M, E_WIDTH)
    i = first + tl.arange(0, M)
    statistic = both.to(tl.int64) * queries + i
    m = tl.full((M,), float("-inf"), wide)
    z = tl.zeros((M,), wide)
    y = tl.zeros((M, F_WIDTH), wide)
    start, end = _keys_of(first, keys, lowest, highest, LOWEST, HIGHEST, M, N)
    for at in range(start, end, N):
        k = _load(K, at, keys, k_row, E, N, E_WIDTH)
        v = _load(V, at, keys, v_row, F, N, F_WIDTH)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=wide)
        j = at + tl.arange(0, N)
        s = _biased(
            s, mask, slope, i[:, None], j[None, :], queries, keys, lowest, highest, mask_row,
            mask_column, scale, LOWEST, HIGHEST,
        )  # fmt: skip
        most = tl.maximum(m, tl.max(s, 1))
        # a row that has been all -inf so far stays 0
        shift = tl.where(most == float("-inf"), 0.0, most)
        p = _exp2(s - shift[:, None])
        shrink = _exp2(m - shift)
        z = z * shrink + tl.sum(p, 1)
        y *= shrink[:, None]
        if SEED is not None:
            p *= _kept(SEED, statistic, at, keys, threshold, N)
        y = tl.dot(p.to(v.dtype), v, y, input_precision=PRECISION, out_dtype=wide)
        m = most
    dead = m == float("-inf")
    z = tl.where(dead, 1.0, z)
    _store(Y, first, queries, y_row, y / z[:, None] * tl.full((), factor, wide), F)
    l = tl.where(dead, 0.0, m / tl.full((), LOG2E, wide)) + tl.log(z)
    tl.store(L + statistic, l, i < queries)


@kernel
def _backward_queries(
    DY, Q, K, V, MASK, SLOPES, SEED, Y, L, DELTA, DQ,
    heads, group, queries, keys, lowest, highest, scale: tl.float64, threshold: tl.uint32,
    factor: tl.float64,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, y_batch, y_head, y_row,
    dy_batch, dy_head, dy_row, dq_batch, dq_head, dq_row,
    mask_batch, mask_head, mask_row, mask_column,
    LOWEST: tl.constexpr, HIGHEST: tl.constexpr, PRECISION: tl.constexpr, E: tl.constexpr,
    F: tl.constexpr, E_WIDTH: tl.constexpr, F_WIDTH: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """dq of M queries; and Σ P dP, which the other kernels read.

    That is dy · y, but for r, what the rounding of y took, which is found here with the scores:
    dq = c (Σ_j P (dP - dy · y) k - r Σ_j P k).
    """
    wide: tl.constexpr = tl.float64 if Q.dtype.element_ty == tl.float64 else tl.float32
    tiles = tl.cdiv(queries, M)
    both = tl.program_id(0) // tiles
    first = tl.program_id(0) % tiles * M
    batch, head = both // heads, both % heads
    Q, Y = _head(Q, batch, head, q_batch, q_head), _head(Y, batch, head, y_batch, y_head)
    K = _head(K, batch, head // group, k_batch, k_head)
    V = _head(V, batch, head // group, v_batch, v_head)
    mask = None if MASK is None else _head(MASK, batch, head, mask_batch, mask_head)
    slope = None if SLOPES is None else SLOPES + head

    q = _load(Q, first, queries, q_row, E, M, E_WIDTH)
    dy = _load(_head(DY, batch, head, dy_batch, dy_head), first, queries, dy_row, F, M, F_WIDTH)
    y = _load(Y, first, queries, y_row, F, M, F_WIDTH)
    i = first + tl.arange(0, M)
    statistic = both.to(tl.int64) * queries + i
    l = tl.load(L + statistic, i < queries, other=0.0) * tl.full((), LOG2E, wide)
    delta = tl.sum(upcast(dy) * upcast(y), 1)
    rest = tl.zeros((M,), wide)
    dq = tl.zeros((M, E_WIDTH), wide)
    mean = tl.zeros((M, E_WIDTH), wide)
    start, end = _keys_of(first, keys, lowest, highest, LOWEST, HIGHEST, M, N)
    for at in range(start, end, N):
        k = _load(K, at, keys, k_row, E, N, E_WIDTH)
        v = _load(V, at, keys, v_row, F, N, F_WIDTH)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=wide)
        j = at + tl.arange(0, N)
        s = _biased(
            s, mask, slope, i[:, None], j[None, :], queries, keys, lowest, highest, mask_row,
            mask_column, scale, LOWEST, HIGHEST,
        )  # fmt: skip
        dp = tl.dot(dy, tl.trans(v), input_precision=PRECISION, out_dtype=wide)
        if SEED is not None:
            dp *= _kept(SEED, statistic, at, keys, threshold, N) * tl.full((), factor, wide)
        p = _exp2(s - l[:, None])
        ds = p * (dp - delta[:, None])
        rest += tl.sum(ds, 1)
        if DQ is not None:
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION, out_dtype=wide)
            mean = tl.dot(p.to(k.dtype), k, mean, input_precision=PRECISION, out_dtype=wide)
    tl.store(DELTA + statistic, delta + rest, i < queries)
    if DQ is not None:
        dq = (dq - rest[:, None] * mean) * tl.full((), scale, wide)
        _store(_head(DQ, batch, head, dq_batch, dq_head), first, queries, dq_row, dq, E)


@kernel
def _backward_keys(
    DY, Q, K, V, MASK, SLOPES, SEED, L, DELTA, DK, DV,
    heads, group, queries, keys, lowest, highest, scale: tl.float64, threshold: tl.uint32,
    factor: tl.float64,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, dy_batch, dy_head,
    dy_row, dk_batch, dk_head, dk_row, dv_batch, dv_head, dv_row,
    mask_batch, mask_head, mask_row, mask_column,
    LOWEST: tl.constexpr, HIGHEST: tl.constexpr, PRECISION: tl.constexpr, E: tl.constexpr,
    F: tl.constexpr, E_WIDTH: tl.constexpr, F_WIDTH: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """dk and dv of N keys. Scores are transposed here, as both products want them."""
    wide: tl.constexpr = tl.float64 if Q.dtype.element_ty == tl.float64 else tl.float32
    tiles = tl.cdiv(keys, N)
    both = tl.program_id(0) // tiles
    at = tl.program_id(0) % tiles * N
    batch, key_head = both // (heads // group), both % (heads // group)
    K, V = _head(K, batch, key_head, k_batch, k_head), _head(V, batch, key_head, v_batch, v_head)
    k = _load(K, at, keys, k_row, E, N, E_WIDTH)
    v = _load(V, at, keys, v_row, F, N, F_WIDTH)
    j = at + tl.arange(0, N)
    dk = tl.zeros((N, E_WIDTH), wide)
    dv = tl.zeros((N, F_WIDTH), wide)
    start, end = at * 0, queries
    if HIGHEST:
        start = tl.maximum(at - highest, 0) // M * M
    if LOWEST:
        end = tl.minimum(at + N - lowest, queries)
    steps = tl.maximum(tl.cdiv(end - start, M), 0)
    for step in range(group * steps):
        head = key_head * group + step // steps
        first = start + step % steps * M
        i = first + tl.arange(0, M)
        q = _load(_head(Q, batch, head, q_batch, q_head), first, queries, q_row, E, M, E_WIDTH)
        DYH = _head(DY, batch, head, dy_batch, dy_head)
        dy = _load(DYH, first, queries, dy_row, F, M, F_WIDTH)
        statistic = (batch * heads + head).to(tl.int64) * queries + i
        l = tl.load(L + statistic, i < queries, other=0.0) * tl.full((), LOG2E, wide)
        mask = None if MASK is None else _head(MASK, batch, head, mask_batch, mask_head)
        slope = None if SLOPES is None else SLOPES + head
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION, out_dtype=wide)
        s = _biased(
            s, mask, slope, i[None, :], j[:, None], queries, keys, lowest, highest, mask_row,
            mask_column, scale, LOWEST, HIGHEST,
        )  # fmt: skip
        p = _exp2(s - l[None, :])
        if SEED is not None:
            kept = tl.trans(_kept(SEED, statistic, at, keys, threshold, N))
        if DV is not None:
            dropped = p
            if SEED is not None:
                dropped *= kept
            dv = tl.dot(dropped.to(dy.dtype), dy, dv, input_precision=PRECISION, out_dtype=wide)
        if DK is not None:
            delta = tl.load(DELTA + statistic, i < queries, other=0.0)
            dp = tl.dot(v, tl.trans(dy), input_precision=PRECISION, out_dtype=wide)
            if SEED is not None:
                dp *= kept * tl.full((), factor, wide)
            ds = p * (dp - delta[None, :])
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION, out_dtype=wide)
    if DK is not None:
        DK = _head(DK, batch, key_head, dk_batch, dk_head)
        _store(DK, at, keys, dk_row, dk * tl.full((), scale, wide), E)
    if DV is not None:
        DV = _head(DV, batch, key_head, dv_batch, dv_head)
        _store(DV, at, keys, dv_row, dv * tl.full((), factor, wide), F)


@kernel
def _backward_mask(
    DY, Q, K, V, MASK, SLOPES, SEED, L, DELTA, DMASK,
    batches, heads, group, queries, keys, lowest, highest, scale: tl.float64, threshold: tl.uint32,
    factor: tl.float64,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, dy_batch, dy_head,
    dy_row, mask_batch, mask_head, mask_row, mask_column,
    LOWEST: tl.constexpr, HIGHEST: tl.constexpr, PRECISION: tl.constexpr, E: tl.constexpr,
    F: tl.constexpr, E_WIDTH: tl.constexpr, F_WIDTH: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    OF_BATCH: tl.constexpr, OF_HEAD: tl.constexpr,
):  # fmt: skip
    """A tile of db: the sum of ds over the heads, and the batches, that share the mask."""
    wide: tl.constexpr = tl.float64 if Q.dtype.element_ty == tl.float64 else tl.float32
    down, across = tl.cdiv(queries, M), tl.cdiv(keys, N)
    tile, both = tl.program_id(0) % (down * across), tl.program_id(0) // (down * across)
    first, at = tile // across * M, tile % across * N
    i, j = first + tl.arange(0, M), at + tl.arange(0, N)
    of_heads = heads if OF_HEAD else 1
    sharing = (1 if OF_HEAD else heads) * (1 if OF_BATCH else batches)
    db = tl.zeros((M, N), wide)
    for step in range(sharing):
        head = both % of_heads if OF_HEAD else step % heads
        batch = both // of_heads if OF_BATCH else step // (1 if OF_HEAD else heads)
        q = _load(_head(Q, batch, head, q_batch, q_head), first, queries, q_row, E, M, E_WIDTH)
        DYH = _head(DY, batch, head, dy_batch, dy_head)
        dy = _load(DYH, first, queries, dy_row, F, M, F_WIDTH)
        k = _load(_head(K, batch, head // group, k_batch, k_head), at, keys, k_row, E, N, E_WIDTH)
        v = _load(_head(V, batch, head // group, v_batch, v_head), at, keys, v_row, F, N, F_WIDTH)
        statistic = (batch * heads + head).to(tl.int64) * queries + i
        l = tl.load(L + statistic, i < queries, other=0.0) * tl.full((), LOG2E, wide)
        delta = tl.load(DELTA + statistic, i < queries, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=wide)
        s = _biased(
            s, _head(MASK, batch, head, mask_batch, mask_head),
            None if SLOPES is None else SLOPES + head, i[:, None], j[None, :], queries, keys,
            lowest, highest, mask_row, mask_column, scale, LOWEST, HIGHEST,
        )  # fmt: skip
        dp = tl.dot(dy, tl.trans(v), input_precision=PRECISION, out_dtype=wide)
        if SEED is not None:
            dp *= _kept(SEED, statistic, at, keys, threshold, N) * tl.full((), factor, wide)
        db += _exp2(s - l[:, None]) * (dp - delta[:, None])
    row = both.to(tl.int64) * queries + i
    place = row[:, None] * keys + j[None, :]
    tl.store(DMASK + place, db.to(DMASK.dtype.element_ty), (i < queries)[:, None] & (j < keys))


#: (M, N, warps, stages) in half precision, for heads of up to 64, 128 and 256 numbers: the largest
#: tiles of which nothing spills, on AMD's 64-wide warps either. An instruction of sm_90 multiplies
#: 64 rows, of queries or in "keys" of keys
TILES = {
    "forward": ((128, 64, 8, 2), (128, 64, 8, 2), (64, 32, 4, 1)),
    "queries": ((64, 64, 4, 2), (64, 32, 4, 1), (16, 32, 4, 1)),
    "keys": ((64, 64, 4, 2), (32, 64, 4, 1), (32, 16, 4, 1)),
}
#: the same where something is added to the scores, which takes registers
BIASED = {
    "forward": ((128, 32, 8, 2), (128, 32, 8, 2), (64, 16, 4, 1)),
    "queries": ((64, 32, 4, 2), (32, 32, 4, 1), (16, 16, 4, 1)),
    "keys": ((32, 64, 4, 2), (16, 64, 4, 1), (16, 16, 4, 1)),
    "mask": ((64, 32, 4, 2), (64, 16, 4, 1), (16, 32, 4, 1)),
}
#: and with dropout, whose words take more of them
DROPPED = BIASED | {
    "keys": ((16, 64, 4, 2), (16, 32, 4, 1), (16, 16, 4, 1)),
    "mask": ((32, 32, 4, 2), (64, 16, 4, 1), (16, 32, 4, 1)),
}

#: the seed, the least word that is kept, and what the kept are multiplied by; or None
Dropout = tuple[Tensor, int, float] | None


def config(
    which: str, width: int, dtype: torch.dtype, biased: bool, dropped: bool
) -> tuple[int, int, int, int]:
    """(M, N, warps, stages) of heads of ``width`` numbers."""
    if dtype == torch.float64:
        return (16, 16, 8, 1)
    if dtype == torch.float32:
        # a tile of dk and dv of 32 keys with dropout has 16 bytes on the stack of sm_80
        small = width > 64 or (dropped and which == "keys")
        return (16, 16 if small else 32, 8, 1)
    tiles = DROPPED if dropped else BIASED if biased else TILES
    return tiles[which][(width > 64) + (width > 128)]


KERNELS = {
    "forward": _forward,
    "queries": _backward_queries,
    "keys": _backward_keys,
    "mask": _backward_mask,
}


@planned
def plan(
    which: str, shape: tuple[int, ...], strides: tuple[tuple[str, tuple[int, ...]], ...],
    band: tuple[int | None, int | None], scale: float, dtype: torch.dtype, tf32: str,
    biased: bool, kept: tuple[int, float] | None, of: tuple[bool, bool] | None,
) -> Launch:  # fmt: skip
    """A launch of one kernel, for (B, H, K, L, S, E, F)."""
    B, H, K, L, S, E, F = shape
    widths = [max(16, next_power_of_2(n)) for n in (E, F)]
    M, N, warps, stages = config(which, max(widths), dtype, biased, kept is not None)
    threshold, factor = kept or (0, 1.0)
    named: dict[str, Any] = {
        f"{name}_{place}": stride
        for name, found in strides
        for place, stride in zip(("batch", "head", "row", "column"), found, strict=False)
    }
    programs = B * K * cdiv(S, N) if which == "keys" else B * H * cdiv(L, M)
    if of is not None:
        programs = (B if of[0] else 1) * (H if of[1] else 1) * cdiv(L, M) * cdiv(S, N)
        named.update(batches=B, OF_BATCH=of[0], OF_HEAD=of[1])
    lowest, highest = (None if n is None else min(max(n, -L), S) for n in band)
    return KERNELS[which].launch(
        programs, heads=H, group=H // K, queries=L, keys=S, scale=scale, lowest=lowest or 0,
        highest=highest or 0, threshold=threshold, factor=factor, LOWEST=lowest is not None,
        HIGHEST=highest is not None, PRECISION=tf32, E=E, F=F, E_WIDTH=widths[0],
        F_WIDTH=widths[1], M=M, N=N, num_warps=warps, num_stages=stages, **named,
    )  # fmt: skip


def _strides(**tensors: Tensor) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Of each tensor that is given: those of batches, heads and rows."""
    return tuple([(name, t.stride()[:3]) for name, t in tensors.items()])


def _of_mask(mask: Tensor | None) -> tuple[str, tuple[int, ...]]:
    """The strides of a mask, 0 where all share it."""
    if mask is None:
        return "mask", (0, 0, 0, 0)
    batch, head, row, column = mask.stride()
    return "mask", (
        batch if mask.shape[0] > 1 else 0,
        head if mask.shape[1] > 1 else 0,
        row,
        column,
    )


def _dense(t: Tensor) -> Tensor:
    """With the numbers of a row side by side."""
    return t if t.stride(3) == 1 else t.contiguous()


def _shape(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, ...]:
    """(B, H, K, L, S, E, F)."""
    return (*q.shape[:2], k.shape[1], q.shape[2], *k.shape[2:], v.shape[3])


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, slopes: Tensor | None, dropout: Dropout,
    lowest: int | None, highest: int | None, scale: float, y: Tensor, l: Tensor,
) -> None:  # fmt: skip
    """Writes y, of any strides but that of its rows' numbers, and l."""
    seed, kept = (None, None) if dropout is None else (dropout[0], dropout[1:])
    if not q.shape[:3].numel():
        return
    q, k, v = _dense(q), _dense(k), _dense(v)
    slopes = None if slopes is None else slopes.contiguous()
    strides = (*_strides(q=q, k=k, v=v, y=y), _of_mask(mask))
    biased = mask is not None or slopes is not None
    options = (lowest, highest), scale, q.dtype, precision(), biased, kept, None
    plan("forward", _shape(q, k, v), strides, *options)(q, k, v, mask, slopes, seed, y, l)


def backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, slopes: Tensor | None,
    dropout: Dropout, y: Tensor, l: Tensor, lowest: int | None, highest: int | None, scale: float,
    dq: Tensor | None, dk: Tensor | None, dv: Tensor | None, dmask: Tensor | None,
) -> None:  # fmt: skip
    """Writes those of the gradients that are given; dmask is contiguous."""
    seed, kept = (None, None) if dropout is None else (dropout[0], dropout[1:])
    dy, q, k, v, y, l = _dense(dy), _dense(q), _dense(k), _dense(v), _dense(y), l.contiguous()
    slopes = None if slopes is None else slopes.contiguous()
    shape, of_mask = _shape(q, k, v), _of_mask(mask)
    biased = mask is not None or slopes is not None
    options = (lowest, highest), scale, q.dtype, precision(), biased, kept
    delta = torch.empty_like(l)
    if l.numel():
        strides = _strides(q=q, k=k, v=v, y=y, dy=dy, dq=q if dq is None else dq)
        run = plan("queries", shape, (*strides, of_mask), *options, None)
        run(dy, q, k, v, mask, slopes, seed, y, l, delta, dq)
    if (dk is not None or dv is not None) and k.shape[:3].numel():
        given = {"dk": k if dk is None else dk, "dv": v if dv is None else dv}
        run = plan(
            "keys", shape, (*_strides(q=q, k=k, v=v, dy=dy, **given), of_mask), *options, None
        )
        run(dy, q, k, v, mask, slopes, seed, l, delta, dk, dv)
    if dmask is not None and dmask.numel():
        shared = dmask.shape[0] > 1, dmask.shape[1] > 1
        run = plan("mask", shape, (*_strides(q=q, k=k, v=v, dy=dy), of_mask), *options, shared)
        run(dy, q, k, v, mask, slopes, seed, l, delta, dmask)

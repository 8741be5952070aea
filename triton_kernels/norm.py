"""layer_norm and rms_norm, also of a sum: one kernel each way for all, on ``rows.py``.

Statistics are float32 (of float64, float64). Forward takes the mean out before it adds squares: a
row that fits a block is read once, a longer one is added up block by block.
Backward reads x and dy once: a few programs walk the rows, each with its sums of dw and db in
registers, and one more kernel adds those up. While a row waits for its own two sums, the next ones
are on their way to shared memory (``num_stages``). The sums of a row that is longer than a block
are computed first; or, on a GPU that has clusters, several blocks of threads share it. KIND and
formulas: ``custom_backprop/formulas/norm.py``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, cdiv, has_clusters, kernel, multiprocessors, planned
from .rows import (
    centred,
    centred_rows,
    column_sum,
    far,
    over_rows,
    partial_sums,
    read,
    row_config,
    stages_of,
    tile_of,
    write,
)

#: programs a multiprocessor that backward is cut into where it adds up over rows (more would mean
#: more sums to store), and the numbers that it needs for each element at once
RESIDENT, LIVE = 2, 4


@triton.jit
def _factor(WEIGHT, column, n, KIND: tl.constexpr):
    """What x̂ is multiplied by."""
    factor = 1.0
    if WEIGHT is not None:
        w = read(WEIGHT, column, column < n)
        factor = 1 + w if KIND == "gemma" else w
    return factor


@triton.jit
def _unit(X, MEAN, RSTD, row, exists, place, inside):
    """x̂."""
    x = read(X, place, inside)
    if MEAN is not None:
        x -= tl.load(MEAN + row, exists, other=0.0)[:, None]
    return x * tl.load(RSTD + row, exists, other=0.0)[:, None]


@triton.jit
def _input(X, RESIDUAL, place, inside):
    """x; or with a RESIDUAL the sum, rounded as it is stored."""
    x = read(X, place, inside)
    if RESIDUAL is not None:
        dtype: tl.constexpr = x.dtype
        x = (x + read(RESIDUAL, place, inside)).to(X.dtype.element_ty).to(dtype)
    return x


@kernel
def _forward(
    X, RESIDUAL, WEIGHT, BIAS, Y, SUM, MEAN, RSTD, rows, n, tiles,
    KIND: tl.constexpr, EPS: tl.constexpr, STAGES: tl.constexpr, SEVERAL: tl.constexpr,
    LOOP: tl.constexpr, WIDE: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """μ (where there is a MEAN) and r of each row, then y; of x, or of its SUM with a RESIDUAL."""
    dtype: tl.constexpr = tl.float64 if X.dtype.element_ty == tl.float64 else tl.float32
    LANES: tl.constexpr = BLOCK * X.dtype.element_ty.primitive_bitwidth // 128 if ALIGNED else BLOCK
    lane = (BLOCK // LANES) * tl.arange(0, LANES)[None, :]
    program = tl.program_id(0)
    last = tiles if SEVERAL else program + 1
    for tile in range(program, last, tl.num_programs(0) if SEVERAL else 1):
        row, exists, column = tile_of(tile, rows, ROWS, BLOCK, WIDE, False)
        first, alive = (row * n)[:, None], exists[:, None]
        mean = tl.zeros((ROWS,), dtype)
        if LOOP:
            means = tl.zeros((ROWS, LANES), dtype)
            squares = tl.zeros((ROWS, BLOCK if MEAN is None else LANES), dtype)
            for start in tl.range(0, n, BLOCK, num_stages=STAGES):
                inside = alive & (start + column < n)
                x = _input(X, RESIDUAL, first + start + column, inside)
                if MEAN is None:
                    squares += x * x
                else:
                    before = tl.full((), start // BLOCK, dtype)
                    there, share = lane < n - start, 1 / (before + 1)
                    means, squares = centred(means, squares, x, there, before, share)
            if MEAN is None:
                square = tl.sum(squares, 1)
            else:
                seen = (tl.cdiv(n - lane, BLOCK) * (BLOCK // LANES)).to(dtype)  # by each lane
                mean, square = centred_rows(means, squares, seen, n)
        else:
            inside = alive & (column < n)
            x = _input(X, RESIDUAL, first + column, inside)
            if SUM is not None:
                write(SUM + first, column, inside, x)
            if MEAN is not None:
                mean = tl.sum(x, 1) / n
                x = tl.where(inside, x - mean[:, None], 0.0)
            square = tl.sum(x * x, 1)
        rstd = 1 / tl.sqrt(square[:, None] / n + EPS)
        end = tl.cdiv(n, BLOCK) * BLOCK - BLOCK if LOOP else 0
        for back in range(0, n if LOOP else BLOCK, BLOCK):
            place = end - back + column
            inside = alive & (place < n)
            if LOOP:
                x = _input(X, RESIDUAL, first + place, inside)
                if SUM is not None:
                    write(SUM + first, place, inside, x)
                x -= mean[:, None]
            y = x * rstd
            if KIND == "llama":
                y = y.to(X.dtype.element_ty).to(dtype)
            y *= _factor(WEIGHT, place, n, KIND)
            if BIAS is not None:
                y += read(BIAS, place, place < n)
            write(Y + first, place, inside, y)
        if MEAN is not None:
            tl.store(MEAN + row, mean, exists)
        tl.store(RSTD + row[:, None], rstd, alive)


@kernel
def _row_sums(
    DY, X, WEIGHT, MEAN, RSTD, ALONG, TOTAL, rows, n, tiles,
    KIND: tl.constexpr, STAGES: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Σ g x̂ / n of each row, and Σ g / n where there is a MEAN."""
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row, exists, column = tile_of(tile, rows, ROWS, BLOCK, WIDE, False)
        first = (row * n)[:, None]
        along = tl.zeros((ROWS, BLOCK), ALONG.dtype.element_ty)
        total = tl.zeros((ROWS, BLOCK), ALONG.dtype.element_ty)
        for start in tl.range(0, n, BLOCK, num_stages=STAGES):
            place = start + column
            inside = exists[:, None] & (place < n)
            g = read(DY + first, place, inside) * _factor(WEIGHT, place, n, KIND)
            along += g * _unit(X + first, MEAN, RSTD, row, exists, place, inside)
            total += g
        tl.store(ALONG + row, tl.sum(along, 1) / n, exists)
        if MEAN is not None:
            tl.store(TOTAL + row, tl.sum(total, 1) / n, exists)


@kernel
def _backward(
    DY, DSUM, X, WEIGHT, MEAN, RSTD, ALONG, TOTAL, DX, PARTIAL, rows, n, tiles, blocks,
    KIND: tl.constexpr, NEED_WEIGHT: tl.constexpr, NEED_BIAS: tl.constexpr,
    STAGES: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx of some rows in one block of columns; and where there is a PARTIAL, their sums of dy x̂ and
    of dy. A row of several blocks has its own sums in ALONG and TOTAL. What DSUM holds is added to
    dx."""
    dtype: tl.constexpr = tl.float64 if X.dtype.element_ty == tl.float64 else tl.float32
    part, parts = tl.program_id(0) // blocks, tl.num_programs(0) // blocks
    # each thread adds up its own, so that no iteration waits for another's
    dw = tl.zeros((ROWS, BLOCK), dtype)
    db = tl.zeros((ROWS, BLOCK), dtype)
    column = (tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK))[None, :]
    factor = _factor(WEIGHT, tl.broadcast_to(column, (ROWS, BLOCK)), n, KIND)
    for tile in tl.range(part, tiles, parts, num_stages=STAGES):
        row, exists, _ = tile_of(tile, rows, ROWS, BLOCK, WIDE, False)
        first = (row * n)[:, None]
        inside = exists[:, None] & (column < n)
        dy = read(DY + first, column, inside)
        unit = _unit(X + first, MEAN, RSTD, row, exists, column, inside)
        if NEED_WEIGHT:
            dw += dy * unit
        if NEED_BIAS:
            db += dy
        if DX is not None:
            g = dy * factor
            if ALONG is None:
                along, total = tl.sum(g * unit, 1) / n, tl.sum(g, 1) / n
            else:
                along = tl.load(ALONG + row, exists, other=0.0)
                total = tl.load(TOTAL + row, exists, other=0.0)
            shift = along[:, None] * unit
            if MEAN is not None:
                shift += total[:, None]
            dx = (dy * factor - shift) * tl.load(RSTD + row, exists, other=0.0)[:, None]
            if DSUM is not None:
                dx += read(DSUM + first, column, inside)
            write(DX + first, column, inside, dx)
    if PARTIAL is not None:
        place = part.to(tl.int64) * n + column
        if NEED_WEIGHT:
            tl.store(PARTIAL + place, tl.sum(dw, 0)[None, :], column < n)
        if NEED_BIAS:
            second = parts.to(tl.int64) * n if NEED_WEIGHT else 0
            tl.store(PARTIAL + second + place, tl.sum(db, 0)[None, :], column < n)


def _where(x: Tensor) -> tuple[int, bool]:
    """The multiprocessors of a GPU, and whether it has clusters of blocks for rows like those of x:
    of other lengths each number has an address of its own, and a block has too few registers."""
    return multiprocessors(x.device), x.shape[-1] % 16 == 0 and has_clusters(x.device)


@planned
def plan_forward(
    rows: int, n: int, dtype: torch.dtype, count: int, clusters: bool, eps: float, kind: str
) -> Launch:
    """Of ``rows`` rows of ``n``, on ``count`` multiprocessors, with or without clusters."""
    named = {"KIND": kind, "EPS": eps, "STAGES": stages_of(dtype)}
    # in a loop over a row of odd length each number has its own mean and squares
    own = kind == "layer" and n % 16 and row_config(n, 1, dtype, LIVE).block < n
    live = LIVE if own else 2
    return over_rows(_forward, (rows, n, 1), [(n, 1, 1)], dtype, live, count, clusters, **named)


@planned
def plan_backward(
    rows: int, n: int, dtype: torch.dtype, count: int, clusters: bool, kind: str, of_weight: bool,
    of_bias: bool,
) -> tuple[Launch | None, Launch, int]:  # fmt: skip
    """The sums of rows that are longer than a block, the pass, and how many partial sums there
    are."""
    # in float32 a block of threads has too few registers for its share of a row
    c = row_config(n, 1, dtype, LIVE, clusters and dtype.itemsize == 2)
    row_sums, stages = None, stages_of(dtype)
    tile_m, tile_n, warps, programs = c.rows, c.block, c.num_warps, RESIDENT * count
    if n > tile_n:
        row_sums = over_rows(
            _row_sums, (rows, n, 1), [(n, 1, 1)], dtype, LIVE, count, KIND=kind, STAGES=stages
        )
        tile_m, tile_n, warps, programs = 8, 64 if dtype == torch.float64 else 128, 4, 8 * count
    tiles, blocks, sums = cdiv(rows, tile_m), cdiv(n, tile_n), of_weight or of_bias
    parts = min(tiles, cdiv(programs, blocks * c.num_ctas)) if sums else tiles
    run = _backward.launch(
        parts * blocks, rows=rows, n=n, tiles=tiles, blocks=blocks, KIND=kind,
        NEED_WEIGHT=of_weight, NEED_BIAS=of_bias, STAGES=stages, WIDE=far(rows * n), ROWS=tile_m,
        BLOCK=tile_n, num_warps=warps, num_ctas=c.num_ctas,
    )  # fmt: skip
    return row_sums, run, parts if sums else 0


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, kind: str,
    residual: Tensor | None = None, h: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
    """y, μ (of "layer") and r of x (..., n); or of x + ``residual``, written to ``h``."""
    x, residual = x.contiguous(), None if residual is None else residual.contiguous()
    weight, bias = [t if t is None else t.contiguous() for t in (weight, bias)]
    dtype = x.dtype
    if kind == "llama" and weight is not None:
        dtype = torch.promote_types(dtype, weight.dtype)
    y = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    rstd = partial_sums(x, *x.shape[:-1], 1)
    mean = torch.empty_like(rstd) if kind == "layer" else None
    if x.numel():
        run = plan_forward(rstd.numel(), x.shape[-1], x.dtype, *_where(x), eps, kind)
        run(x, residual, weight, bias, y, h, mean, rstd)
    return y, mean, rstd


def add_forward(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, kind: str
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """y, h = x + residual, μ (of "layer") and r."""
    h = torch.empty_like(x, memory_format=torch.contiguous_format)
    y, mean, rstd = forward(x, weight, bias, eps, kind, residual, h)
    return y, h, mean, rstd


def backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor | None, rstd: Tensor, kind: str,
    need_x: bool, need_weight: bool, need_bias: bool, dh: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """dx (plus ``dh``), dw and db; None for each that is not needed."""
    dy, x, rstd = dy.contiguous(), x.contiguous(), rstd.contiguous()
    dh = None if dh is None else dh.contiguous()
    weight = None if weight is None else weight.contiguous()
    mean = mean.contiguous() if mean is not None and kind == "layer" else None
    rows, n = rstd.numel(), x.shape[-1]
    dx = torch.empty_like(x) if need_x else None
    like = x if weight is None else weight
    made = like.new_empty if rows and n else like.new_zeros
    dw, db = [made(n) if need else None for need in (need_weight, need_bias)]
    if rows and n:
        row_sums, run, parts = plan_backward(
            rows, n, x.dtype, *_where(x), kind, need_weight, need_bias
        )
        partial = partial_sums(x, need_weight + need_bias, parts, n) if parts else None
        along = total = None
        if row_sums is not None and need_x:
            along, total = torch.empty_like(rstd), torch.empty_like(rstd)
            row_sums(dy, x, weight, mean, rstd, along, total)
        run(dy, dh, x, weight, mean, rstd, along, total, dx, partial)
        if partial is not None:
            column_sum(partial, *[g for g in (dw, db) if g is not None])
    return dx, dw, db


def add_backward(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor | None, mean: Tensor | None,
    rstd: Tensor, kind: str, need_x: bool, need_weight: bool, need_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """:func:`backward` of h, with dh."""
    return backward(dy, h, weight, mean, rstd, kind, need_x, need_weight, need_bias, dh)

"""layer_norm and rms_norm: one kernel each way for both, on ``rows.py``.

Statistics are of float32 (of float64, float64). Forward takes the mean out before it adds squares;
of rows that are read in a loop, block by block (Welford, 1962). Backward reads x and dy once: a few
programs walk the rows, each with its sums of dw and db in registers, which one more kernel adds up.
Formulas: ``custom_backprop/formulas/norm.py``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, cdiv, kernel, multiprocessors, planned
from .rows import column_sum, over_rows, partial_sums, read, row_config, tile_of, write

#: programs a multiprocessor that backward is cut into where it adds up over rows
RESIDENT = 2


@triton.jit
def _factor(WEIGHT, column, n, CASTING: tl.constexpr):
    """What x̂ is multiplied by."""
    w = read(WEIGHT, column, column < n)
    return 1 + w if CASTING == "gemma" else w


@triton.jit
def _value(unit, X, WEIGHT, BIAS, column, n, CASTING: tl.constexpr):
    """y of x̂."""
    if CASTING == "llama":
        unit = unit.to(X.dtype.element_ty).to(unit.dtype)
    y = unit if WEIGHT is None else unit * _factor(WEIGHT, column, n, CASTING)
    return y if BIAS is None else y + read(BIAS, column, column < n)


@kernel
def _forward(
    X, WEIGHT, BIAS, Y, MEAN, RSTD, rows, n, tiles,
    CASTING: tl.constexpr, EPS: tl.constexpr, SEVERAL: tl.constexpr, LOOP: tl.constexpr,
    WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """μ (where there is a MEAN) and r of each row, then y."""
    dtype: tl.constexpr = tl.float64 if X.dtype.element_ty == tl.float64 else tl.float32
    program = tl.program_id(0)
    last = tiles if SEVERAL else program + 1
    for tile in range(program, last, tl.num_programs(0) if SEVERAL else 1):
        row, exists, column = tile_of(tile, rows, ROWS, BLOCK, WIDE, False)
        first, alive = (row * n)[:, None], exists[:, None]
        mean = tl.zeros((ROWS, 1), dtype)
        if LOOP:
            means = tl.zeros((ROWS, BLOCK), dtype)
            squares = tl.zeros((ROWS, BLOCK), dtype)
            for start in range(0, n, BLOCK):
                inside = alive & (start + column < n)
                x = read(X + first, start + column, inside)
                d = tl.where(inside, x - means, 0.0)
                if MEAN is not None:
                    means += d / (start // BLOCK + 1)
                squares += d * tl.where(inside, x - means, 0.0)
            if MEAN is not None:
                count = (n - column + BLOCK - 1) // BLOCK  # what each lane has seen
                mean = tl.sum(means * count.to(dtype) / n, 1)[:, None]
                squares += count.to(dtype) * (means - mean) * (means - mean)
        else:
            inside = alive & (column < n)
            x = read(X + first, column, inside)
            if MEAN is not None:
                mean = tl.sum(x, 1)[:, None] / n
            d = tl.where(inside, x - mean, 0.0)
            squares = d * d
        rstd = 1 / tl.sqrt(tl.sum(squares, 1)[:, None] / n + EPS)
        if MEAN is not None:
            tl.store(MEAN + row[:, None], mean, alive)
        tl.store(RSTD + row[:, None], rstd, alive)
        if LOOP:
            end = tl.cdiv(n, BLOCK) * BLOCK - BLOCK
            for back in range(0, n, BLOCK):
                place = end - back + column
                inside = alive & (place < n)
                unit = (read(X + first, place, inside) - mean) * rstd
                write(Y + first, place, inside, _value(unit, X, WEIGHT, BIAS, place, n, CASTING))
        else:
            write(Y + first, column, inside, _value(d * rstd, X, WEIGHT, BIAS, column, n, CASTING))


@triton.jit
def _unit(X, MEAN, RSTD, row, exists, place, inside):
    """x̂."""
    x = read(X, place, inside)
    if MEAN is not None:
        x -= tl.load(MEAN + row, exists, other=0.0)[:, None]
    return x * tl.load(RSTD + row, exists, other=0.0)[:, None]


@triton.jit
def _gradient(g, unit, rstd, along, total, MEAN):
    """dx = r (g - Σ g / n - x̂ Σ g x̂ / n), with the sums over n in ``total`` and ``along``."""
    g -= unit * along
    return (g if MEAN is None else g - total) * rstd


@kernel
def _backward(
    DY, X, WEIGHT, MEAN, RSTD, DX, PARTIAL, rows, n, tiles,
    CASTING: tl.constexpr, NEED_WEIGHT: tl.constexpr, NEED_BIAS: tl.constexpr, LOOP: tl.constexpr,
    WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx; and where there is a PARTIAL, each program's sums of dy x̂ and of dy."""
    dtype: tl.constexpr = tl.float64 if X.dtype.element_ty == tl.float64 else tl.float32
    # each thread adds up its own, so that no iteration waits for another's
    dw = tl.zeros((ROWS, BLOCK), dtype)
    db = tl.zeros((ROWS, BLOCK), dtype)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row, exists, column = tile_of(tile, rows, ROWS, BLOCK, WIDE, False)
        first, alive = (row * n)[:, None], exists[:, None]
        rstd = tl.load(RSTD + row, exists, other=0.0)[:, None]
        if LOOP:
            along = tl.zeros((ROWS, BLOCK), dtype)
            total = tl.zeros((ROWS, BLOCK), dtype)
            for start in range(0, n, BLOCK):
                place = start + column
                inside = alive & (place < n)
                g = read(DY + first, place, inside)
                g = g if WEIGHT is None else g * _factor(WEIGHT, place, n, CASTING)
                along += g * _unit(X + first, MEAN, RSTD, row, exists, place, inside)
                total += g
            along, total = tl.sum(along, 1)[:, None] / n, tl.sum(total, 1)[:, None] / n
            end = tl.cdiv(n, BLOCK) * BLOCK - BLOCK
            for back in range(0, n, BLOCK):
                place = end - back + column
                inside = alive & (place < n)
                g = read(DY + first, place, inside)
                g = g if WEIGHT is None else g * _factor(WEIGHT, place, n, CASTING)
                unit = _unit(X + first, MEAN, RSTD, row, exists, place, inside)
                write(DX + first, place, inside, _gradient(g, unit, rstd, along, total, MEAN))
        else:
            inside = alive & (column < n)
            dy = read(DY + first, column, inside)
            unit = _unit(X + first, MEAN, RSTD, row, exists, column, inside)
            if DX is not None:
                g = dy if WEIGHT is None else dy * _factor(WEIGHT, column, n, CASTING)
                along, total = tl.sum(g * unit, 1)[:, None] / n, tl.sum(g, 1)[:, None] / n
                write(DX + first, column, inside, _gradient(g, unit, rstd, along, total, MEAN))
            if NEED_WEIGHT:
                dw += dy * unit
            if NEED_BIAS:
                db += dy
    if PARTIAL is not None:
        column = tl.arange(0, BLOCK)
        place = tl.program_id(0).to(tl.int64) * n + column
        if NEED_WEIGHT:
            tl.store(PARTIAL + place, tl.sum(dw, 0), column < n)
        if NEED_BIAS:
            second = tl.num_programs(0).to(tl.int64) * n if NEED_WEIGHT else 0
            tl.store(PARTIAL + second + place, tl.sum(db, 0), column < n)


@kernel
def _columns(
    DY, X, MEAN, RSTD, PARTIAL, m, n, rows,
    NEED_WEIGHT: tl.constexpr, NEED_BIAS: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """The sums of a range of rows and N columns a program, of rows too long for registers."""
    dtype: tl.constexpr = tl.float64 if X.dtype.element_ty == tl.float64 else tl.float32
    tiles = tl.cdiv(n, N)
    part, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    column = tile * N + tl.arange(0, N)
    dw = tl.zeros((M, N), dtype)
    db = tl.zeros((M, N), dtype)
    for start in range(0, rows, M):
        mine = start + tl.arange(0, M)
        row = part * rows + mine
        exists = (mine < rows) & (row < m)
        inside = exists[:, None] & (column < n)[None, :]
        place = row[:, None] * n + column[None, :]
        dy = read(DY, place, inside)
        if NEED_WEIGHT:
            dw += dy * _unit(X, MEAN, RSTD, row, exists, place, inside)
        if NEED_BIAS:
            db += dy
    place = part * n + column
    if NEED_WEIGHT:
        tl.store(PARTIAL + place, tl.sum(dw, 0), column < n)
    if NEED_BIAS:
        second = tl.num_programs(0).to(tl.int64) // tiles * n if NEED_WEIGHT else 0
        tl.store(PARTIAL + second + place, tl.sum(db, 0), column < n)


@planned
def plan_forward(
    rows: int, n: int, dtype: torch.dtype, count: int, eps: float, casting: str, takes_mean: bool
) -> Launch:
    """Of ``rows`` rows of ``n``, on ``count`` multiprocessors."""
    named, live = {"CASTING": casting, "EPS": eps}, 4 if takes_mean else 2
    return over_rows(_forward, (rows, n, 1), [(n, 1, 1)], dtype, live, count, **named)


@planned
def plan_backward(
    rows: int, n: int, dtype: torch.dtype, count: int, casting: str, of_weight: bool, of_bias: bool
) -> tuple[Launch, Launch | None, int]:
    """The pass over rows; that over columns, where rows are too long for the first to sum; and how
    many partial sums there are."""
    live, needs = 4, {"NEED_WEIGHT": of_weight, "NEED_BIAS": of_bias}
    sums = of_weight or of_bias
    fits = n <= row_config(n, 1, dtype, live).block
    named = {"CASTING": casting, **{need: wanted and fits for need, wanted in needs.items()}}
    # of a block of 2048 in a loop ptxas spills a register on sm_90
    live = live if fits else 2 * live
    run = over_rows(_backward, (rows, n, 1), [(n, 1, 1)], dtype, live, count, **named)
    if not sums:
        return run, None, 0
    if fits:
        parts = min(run.programs, RESIDENT * count)
        return Launch(run.func, parts, **run.keywords), None, parts
    tile_m, tile_n = 8, 64 if dtype == torch.float64 else 128
    tiles = cdiv(n, tile_n)
    parts = min(cdiv(rows, tile_m), cdiv(8 * count, tiles))
    numbers = {"m": rows, "n": n, "rows": cdiv(rows, parts)}
    return run, _columns.launch(parts * tiles, **numbers, **needs, M=tile_m, N=tile_n), parts


def _normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    casting: str,
    takes_mean: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """y, μ where it is taken out, and r of x (..., n)."""
    x = x.contiguous()
    weight, bias = (None if t is None else t.contiguous() for t in (weight, bias))
    dtype = x.dtype
    if weight is not None and casting == "llama":
        dtype = torch.promote_types(dtype, weight.dtype)
    y, rstd = x.new_empty(x.shape, dtype=dtype), partial_sums(x, *x.shape[:-1])
    mean = torch.empty_like(rstd) if takes_mean else None
    if x.numel():
        rows, n = rstd.numel(), x.shape[-1]
        run = plan_forward(rows, n, x.dtype, multiprocessors(x.device), eps, casting, takes_mean)
        run(x, weight, bias, y, mean, rstd)
    return y, mean, rstd


def _gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    casting: str,
    *needs: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx, dw and db; None for each that is not needed."""
    need_x, need_weight, need_bias = needs
    rows, n = x.shape[:-1].numel(), x.shape[-1]
    dx = x.new_empty(x.shape) if need_x else None
    dw, db = (
        (x if weight is None else weight).new_zeros(n) if need else None
        for need in (need_weight, need_bias)
    )
    if x.numel():
        dy, x, rstd = dy.contiguous(), x.contiguous(), rstd.contiguous()
        weight = None if weight is None else weight.contiguous()
        statistics = None if mean is None else mean.contiguous(), rstd
        key = rows, n, x.dtype, multiprocessors(x.device), casting, need_weight, need_bias
        run, of_columns, parts = plan_backward(*key)
        partial = partial_sums(x, need_weight + need_bias, parts, n) if parts else None
        if of_columns is None:
            run(dy, x, weight, *statistics, dx, partial)
        else:
            of_columns(dy, x, *statistics, partial)
            if need_x:
                run(dy, x, weight, *statistics, dx, None)
        if partial is not None:
            column_sum(partial, *[g for g in (dw, db) if g is not None])
    return dx, dw, db


def layer_norm_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None, Tensor]:
    """y, μ and r of x (..., n)."""
    return _normalize(x, weight, bias, eps, "torch", True)


def layer_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, *needs: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx, dw and db; None for each that is not needed."""
    return _gradients(dy, x, weight, mean, rstd, "torch", *needs)


def rms_norm_forward(
    x: Tensor, weight: Tensor | None, eps: float, casting: str
) -> tuple[Tensor, Tensor]:
    """y and r of x (..., n)."""
    y, _, rstd = _normalize(x, weight, None, eps, casting, False)
    return y, rstd


def rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, casting: str, *needs: bool
) -> tuple[Tensor | None, Tensor | None]:
    """dx and dw; None for each that is not needed."""
    return _gradients(dy, x, weight, None, rstd, casting, *needs, False)[:2]

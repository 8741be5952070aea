"""layer_norm and rms_norm: one kernel each way for both, on ``rows.py``.

Statistics are of float32 (of float64, float64). Forward takes the mean out before it adds squares,
block by block (Welford, 1962). Where a row fits a block, both of a kernel's loops are one step, and
the compiler reads the row once. Backward reads x and dy once: a few programs walk the rows, each
with its sums of dw and db in registers, which one more kernel adds up. KIND and formulas:
``custom_backprop/formulas/norm.py``.
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
def _weighted(t, WEIGHT, column, n, KIND: tl.constexpr):
    """t times what x̂ is multiplied by."""
    if WEIGHT is not None:
        w = read(WEIGHT, column, column < n)
        t = t * (1 + w if KIND == "gemma" else w)
    return t


@triton.jit
def _unit(X, MEAN, RSTD, row, exists, place, inside):
    """x̂."""
    x = read(X, place, inside)
    if MEAN is not None:
        x -= tl.load(MEAN + row, exists, other=0.0)[:, None]
    return x * tl.load(RSTD + row, exists, other=0.0)[:, None]


@kernel
def _forward(
    X, WEIGHT, BIAS, Y, MEAN, RSTD, rows, n, tiles,
    KIND: tl.constexpr, EPS: tl.constexpr, SEVERAL: tl.constexpr, LOOP: tl.constexpr,
    WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """μ (where there is a MEAN) and r of each row, then y."""
    dtype: tl.constexpr = tl.float64 if X.dtype.element_ty == tl.float64 else tl.float32
    program = tl.program_id(0)
    last = tiles if SEVERAL else program + 1
    for tile in range(program, last, tl.num_programs(0) if SEVERAL else 1):
        row, exists, column = tile_of(tile, rows, ROWS, BLOCK, WIDE, False)
        first, alive = (row * n)[:, None], exists[:, None]
        means = tl.zeros((ROWS, BLOCK), dtype)
        squares = tl.zeros((ROWS, BLOCK), dtype)
        for start in range(0, n if LOOP else BLOCK, BLOCK):
            inside = alive & (start + column < n)
            x = read(X + first, start + column, inside)
            d = tl.where(inside, x - means, 0.0)
            if MEAN is not None:
                means += d / (start // BLOCK + 1)
            squares += d * tl.where(inside, x - means, 0.0)
        mean = tl.zeros((ROWS, 1), dtype)
        if MEAN is not None:
            count = ((n - column + BLOCK - 1) // BLOCK).to(dtype)  # what each lane has seen
            mean = tl.sum(means * count, 1)[:, None] / n
            squares += count * (means - mean) * (means - mean)
        rstd = 1 / tl.sqrt(tl.sum(squares, 1)[:, None] / n + EPS)
        end = tl.cdiv(n, BLOCK) * BLOCK - BLOCK if LOOP else 0
        for back in range(0, n if LOOP else BLOCK, BLOCK):
            place = end - back + column
            inside = alive & (place < n)
            y = (read(X + first, place, inside) - mean) * rstd
            if KIND == "llama":
                y = y.to(X.dtype.element_ty).to(dtype)
            y = _weighted(y, WEIGHT, place, n, KIND)
            if BIAS is not None:
                y += read(BIAS, place, place < n)
            write(Y + first, place, inside, y)
        if MEAN is not None:
            tl.store(MEAN + row[:, None], mean, alive)
        tl.store(RSTD + row[:, None], rstd, alive)


@kernel
def _backward(
    DY, X, WEIGHT, MEAN, RSTD, DX, PARTIAL, rows, n, tiles,
    KIND: tl.constexpr, NEED_WEIGHT: tl.constexpr, NEED_BIAS: tl.constexpr, LOOP: tl.constexpr,
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
        along = tl.zeros((ROWS, BLOCK), dtype)
        total = tl.zeros((ROWS, BLOCK), dtype)
        for start in range(0, n if LOOP else BLOCK, BLOCK):
            place = start + column
            inside = alive & (place < n)
            dy = read(DY + first, place, inside)
            unit = _unit(X + first, MEAN, RSTD, row, exists, place, inside)
            g = _weighted(dy, WEIGHT, place, n, KIND)
            along += g * unit
            total += g
            if NEED_WEIGHT:
                dw += dy * unit
            if NEED_BIAS:
                db += dy
        if DX is not None:
            along, total = tl.sum(along, 1)[:, None] / n, tl.sum(total, 1)[:, None] / n
            rstd = tl.load(RSTD + row, exists, other=0.0)[:, None]
            end = tl.cdiv(n, BLOCK) * BLOCK - BLOCK if LOOP else 0
            for back in range(0, n if LOOP else BLOCK, BLOCK):
                place = end - back + column
                inside = alive & (place < n)
                g = _weighted(read(DY + first, place, inside), WEIGHT, place, n, KIND)
                g -= along * _unit(X + first, MEAN, RSTD, row, exists, place, inside)
                write(DX + first, place, inside, (g if MEAN is None else g - total) * rstd)
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
    rows: int, n: int, dtype: torch.dtype, count: int, eps: float, kind: str
) -> Launch:
    """Of ``rows`` rows of ``n``, on ``count`` multiprocessors."""
    named, live = {"KIND": kind, "EPS": eps}, 4 if kind == "layer" else 2
    return over_rows(_forward, (rows, n, 1), [(n, 1, 1)], dtype, live, count, **named)


@planned
def plan_backward(
    rows: int, n: int, dtype: torch.dtype, count: int, kind: str, of_weight: bool, of_bias: bool
) -> tuple[Launch, Launch | None, int]:
    """The pass over rows; that over columns, where rows are too long for the first to sum; and how
    many partial sums there are."""
    live, needs = 4, {"NEED_WEIGHT": of_weight, "NEED_BIAS": of_bias}
    fits = n <= row_config(n, 1, dtype, live).block
    named = {"KIND": kind, **{need: wanted and fits for need, wanted in needs.items()}}
    # of a block of 2048 in a loop ptxas spills a register on sm_90
    live = live if fits else 2 * live
    run = over_rows(_backward, (rows, n, 1), [(n, 1, 1)], dtype, live, count, **named)
    if not (of_weight or of_bias):
        return run, None, 0
    if fits:
        parts = min(run.programs, RESIDENT * count)
        return Launch(run.func, parts, **run.keywords), None, parts
    tile_m, tile_n = 8, 64 if dtype == torch.float64 else 128
    tiles = cdiv(n, tile_n)
    parts = min(cdiv(rows, tile_m), cdiv(8 * count, tiles))
    numbers = {"m": rows, "n": n, "rows": cdiv(rows, parts)}
    return run, _columns.launch(parts * tiles, **numbers, **needs, M=tile_m, N=tile_n), parts


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, kind: str
) -> tuple[Tensor, Tensor | None, Tensor]:
    """y, μ (of "layer") and r of x (..., n)."""
    x = x.contiguous()
    weight, bias = (t if t is None else t.contiguous() for t in (weight, bias))
    dtype = x.dtype
    if kind == "llama" and weight is not None:
        dtype = torch.promote_types(dtype, weight.dtype)
    y, rstd = x.new_empty(x.shape, dtype=dtype), partial_sums(x, *x.shape[:-1], 1)
    mean = torch.empty_like(rstd) if kind == "layer" else None
    if x.numel():
        run = plan_forward(rstd.numel(), x.shape[-1], x.dtype, multiprocessors(x.device), eps, kind)
        run(x, weight, bias, y, mean, rstd)
    return y, mean, rstd


def backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor | None, rstd: Tensor, kind: str,
    need_x: bool, need_weight: bool, need_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """dx, dw and db; None for each that is not needed."""
    dy, x, rstd = dy.contiguous(), x.contiguous(), rstd.contiguous()
    weight = None if weight is None else weight.contiguous()
    mean = mean.contiguous() if mean is not None and kind == "layer" else None
    rows, n = rstd.numel(), x.shape[-1]
    dx = torch.empty_like(x) if need_x else None
    dw, db = (
        (x if weight is None else weight).new_zeros(n) if need else None
        for need in (need_weight, need_bias)
    )
    if x.numel():
        count = multiprocessors(x.device)
        run, of_columns, parts = plan_backward(
            rows, n, x.dtype, count, kind, need_weight, need_bias
        )
        partial = partial_sums(x, need_weight + need_bias, parts, n) if parts else None
        if of_columns is not None:
            of_columns(dy, x, mean, rstd, partial)
        if of_columns is None or need_x:
            run(dy, x, weight, mean, rstd, dx, None if of_columns else partial)
        if partial is not None:
            column_sum(partial, *[g for g in (dw, db) if g is not None])
    return dx, dw, db

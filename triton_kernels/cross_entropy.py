"""nll_loss and cross_entropy: kernels and their launchers.

x is (N, C) or (N, C, D), reduced over C; a row is one (n, d), its number is n * D + d. Rows next to
each other then lie next to each other in memory where D > 1, and a tile of several rows reads whole
cache lines of either layout. Losses of rows meet in a partial sum a program
and one sum of those: no atomics, the same bits every time. Nothing is read by the host.
Formulas: ``custom_backprop/formulas/cross_entropy.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import like
from .launch import accumulator, bind, cdiv, kept, launch, multiprocessors, next_power_of_2

NONE, MEAN = 0, 1
GRADIENT, STATISTICS = 1, 2

#: rows a program where only one number of each is read
PICKED = 512

#: rows whose weights each program adds up for itself, rather than wait for another kernel
FEW = 1024


@triton.jit
def _class(
    TARGET, WEIGHT, row, alive, classes, ignore_index, HAS_WEIGHT: tl.constexpr, dtype: tl.constexpr
):
    """(t, whether it may be read, whether the row counts, w_t): 0 where the row is ignored, NaN
    where t is no class."""
    t = tl.load(TARGET + row, alive, other=0)
    counted = alive & (t != ignore_index)
    valid = counted & (t >= 0) & (t < classes)
    w = tl.where((t < 0) | (t >= classes), float("nan"), 1.0).to(
        dtype
    )  # by ``valid``, triton 3.6 stops where rows lie side by side
    if HAS_WEIGHT:
        w *= tl.load(WEIGHT + t, valid, other=0.0).to(dtype)
    return t, valid, counted, tl.where(counted, w, 0.0)


@triton.jit
def _nll(
    X, TARGET, WEIGHT, LOSS, TOTAL, rows, classes, inner, x_outer, x_class, x_inner, ignore_index,
    HAS_X: tl.constexpr, HAS_WEIGHT: tl.constexpr, REDUCE: tl.constexpr, HAS_TOTAL: tl.constexpr, dtype: tl.constexpr,
    WIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS rows a program: -w_t x_t of each, or their sum, and the sum of w_t."""
    program = tl.program_id(0).to(tl.int64 if WIDE else tl.int32)
    row = program * ROWS + tl.arange(0, ROWS)
    alive = row < rows
    t, valid, counted, w = _class(
        TARGET, WEIGHT, row, alive, classes, ignore_index, HAS_WEIGHT, dtype
    )
    if HAS_X:
        x = tl.load(
            X + row // inner * x_outer + row % inner * x_inner + t * x_class, valid, other=0.0
        ).to(dtype)
        loss = tl.where(counted, -w * x, 0.0)
        if REDUCE:
            tl.store(LOSS + program, tl.sum(loss))
        else:
            tl.store(LOSS + row, loss.to(LOSS.dtype.element_ty), alive)
    if HAS_TOTAL:
        tl.store(TOTAL + program, tl.sum(w))


@triton.jit
def _tile(
    tile,
    inner,
    outer_stride,
    inner_stride,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(row numbers, which exist, offsets of their first class, columns of a block): ROWS rows of
    one n."""
    tile += tl.full((), 0, tl.int64 if WIDE else tl.int32)
    tiles = tl.cdiv(inner, ROWS)
    n = tile // tiles
    d = tile % tiles * ROWS + tl.arange(0, ROWS)
    first = n * outer_stride + d * inner_stride
    return n * inner + d, d < inner, first[:, None], tl.arange(0, BLOCK).to(d.dtype)[None, :]


@triton.jit
def _share(
    DY,
    TOTAL,
    row,
    alive,
    rows,
    PER_ROW: tl.constexpr,
    MEAN: tl.constexpr,
    PROBABILITIES: tl.constexpr,
    dtype: tl.constexpr,
):
    """dy_r of rows that count."""
    dy = (
        tl.load(DY + row, alive, other=0.0).to(dtype)
        if PER_ROW
        else tl.full(row.shape, 1, dtype) * tl.load(DY).to(dtype)
    )
    if MEAN:
        dy /= rows * tl.full(row.shape, 1, dtype) if PROBABILITIES else tl.load(TOTAL).to(dtype)
    return dy


@triton.jit
def _soft(TARGET, WEIGHT, column, mask, classes, x_class, PROBABILITIES: tl.constexpr, HAS_WEIGHT: tl.constexpr, SMOOTHING: tl.constexpr,
          SHARE: tl.constexpr, dtype: tl.constexpr):  # fmt: skip
    """u of a block, 0 past its end; SHARE is s / C."""
    if PROBABILITIES:
        u = tl.load(TARGET + column * x_class, mask, other=0.0).to(dtype) * (1 - SMOOTHING) + SHARE
    else:
        u = tl.full(column.shape, SHARE, dtype)
    if HAS_WEIGHT:
        u *= tl.load(WEIGHT + column, column < classes, other=0.0).to(dtype)
    return tl.where(mask, u, 0.0)


@triton.jit
def _forward_tile(
    tile, total_weight, X, TARGET, WEIGHT, LOSS, DX, LARGEST, LOG_SUM, rows, classes, inner, x_outer, x_class, x_inner, ignore_index,
    PROBABILITIES: tl.constexpr, HAS_WEIGHT: tl.constexpr, SMOOTHING: tl.constexpr, SHARE: tl.constexpr, MEAN: tl.constexpr,
    REDUCE: tl.constexpr, NEED_DX: tl.constexpr, STATISTICS: tl.constexpr, dtype: tl.constexpr,
    WIDE: tl.constexpr, LOOP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The loss of ROWS rows, all of them read at once, or in a loop for m and z = Σ e^(x-m), and
    where dx or a soft loss is wanted in one
    more, backwards: it begins with what the first has read last, which is what the cache still
    holds."""
    SOFT: tl.constexpr = PROBABILITIES or SMOOTHING > 0
    lowest: tl.constexpr = (
        -1.7976931348623157e308 if dtype == tl.float64 else -3.4028234663852886e38
    )
    row, alive, first, column = _tile(tile, inner, x_outer, x_inner, WIDE, ROWS, BLOCK)
    # what is read row by row, before what takes longest
    counted = alive
    hard = tl.zeros((ROWS,), dtype)
    x_t = tl.zeros((ROWS,), dtype)
    chosen = tl.full((ROWS,), -1, column.dtype)
    if not PROBABILITIES:
        t, valid, counted, w = _class(
            TARGET, WEIGHT, row, alive, classes, ignore_index, HAS_WEIGHT, dtype
        )
        hard = w * (1 - SMOOTHING)
        x_t = tl.sum(
            tl.load(X + first + (t * x_class)[:, None], valid[:, None], other=0.0).to(dtype), 1
        )
        chosen = tl.where(valid, t, -1).to(column.dtype)
    share = tl.full((ROWS,), 1, dtype) / total_weight
    total = tl.zeros((ROWS, BLOCK), dtype)
    mass = hard
    if LOOP:
        # m and z of each lane by itself, so that no iteration waits for another warp. m starts at
        # the lowest finite number, not at -inf, and -inf adds e^-inf = 0 to z. One exponential
        # serves both cases: x <= m adds e^(x-m), x > m scales z by e^(m-x) and adds 1.
        lane = tl.full((ROWS, BLOCK), lowest, dtype)
        z = tl.zeros((ROWS, BLOCK), dtype)
        for start in range(0, classes, BLOCK):
            place = start + column
            mask = alive[:, None] & (place < classes)
            x = tl.load(X + first + place * x_class, mask, other=float("-inf")).to(dtype)
            e = tl.exp(-tl.abs(x - lane))
            z = tl.where(x > lane, z * e + 1, z + e)
            lane = tl.maximum(lane, x)
            if SOFT:
                total += _soft(
                    TARGET + first,
                    WEIGHT,
                    place,
                    mask,
                    classes,
                    x_class,
                    PROBABILITIES,
                    HAS_WEIGHT,
                    SMOOTHING,
                    SHARE,
                    dtype,
                )
        m = tl.max(lane, 1)
        log_z = tl.log(tl.sum(z * tl.exp(lane - m[:, None]), 1))
    else:
        mask = alive[:, None] & (column < classes)
        x = tl.load(X + first + column * x_class, mask, other=float("-inf")).to(dtype)
        m = tl.maximum(tl.max(x, 1), lowest)
        e = tl.exp(x - m[:, None])
        z = tl.sum(e, 1)
        log_z = tl.log(z)
        if SOFT:
            total = _soft(
                TARGET + first,
                WEIGHT,
                column,
                mask,
                classes,
                x_class,
                PROBABILITIES,
                HAS_WEIGHT,
                SMOOTHING,
                SHARE,
                dtype,
            )
    if SOFT:
        mass += tl.sum(total, 1)
    loss = hard * (log_z - (x_t - m))
    if STATISTICS:
        tl.store(LARGEST + row, m, alive)
        tl.store(LOG_SUM + row, log_z, alive)
    if not LOOP:
        if SOFT:
            loss -= tl.sum(tl.where(mask, total * (x - m[:, None] - log_z[:, None]), 0.0), 1)
        if NEED_DX:
            q = tl.where(column == chosen[:, None], (share * hard)[:, None], 0.0)
            if SOFT:
                q += share[:, None] * total
            dx = tl.where(counted[:, None], e * (share * mass / z)[:, None] - q, 0.0)
            tl.store(DX + first + column * x_class, dx.to(DX.dtype.element_ty), mask)
    elif SOFT or NEED_DX:
        soft_loss = tl.zeros((ROWS, BLOCK), dtype)
        last = tl.cdiv(classes, BLOCK) * BLOCK - BLOCK
        for back in range(0, classes, BLOCK):
            place = last - back + column
            mask = alive[:, None] & (place < classes)
            x = tl.load(X + first + place * x_class, mask, other=0.0).to(dtype)
            log_p = x - m[:, None] - log_z[:, None]
            q = tl.where(place == chosen[:, None], hard[:, None], 0.0)
            if SOFT:
                u = _soft(
                    TARGET + first,
                    WEIGHT,
                    place,
                    mask,
                    classes,
                    x_class,
                    PROBABILITIES,
                    HAS_WEIGHT,
                    SMOOTHING,
                    SHARE,
                    dtype,
                )
                soft_loss -= tl.where(mask, u * log_p, 0.0)
                q += u
            if NEED_DX:
                dx = tl.where(
                    counted[:, None], share[:, None] * (tl.exp(log_p) * mass[:, None] - q), 0.0
                )
                tl.store(DX + first + place * x_class, dx.to(DX.dtype.element_ty), mask)
        loss += tl.sum(soft_loss, 1)
    loss = tl.where(counted, loss, 0.0)
    if REDUCE:
        return loss * share if MEAN else loss
    tl.store(LOSS + row, loss.to(LOSS.dtype.element_ty), alive)
    return loss


@triton.jit
def _forward(
    X, TARGET, WEIGHT, TOTAL, LOSS, DX, LARGEST, LOG_SUM, rows, classes, inner, x_outer, x_class, x_inner, ignore_index, tiles,
    PROBABILITIES: tl.constexpr, HAS_WEIGHT: tl.constexpr, SMOOTHING: tl.constexpr, SHARE: tl.constexpr, MEAN: tl.constexpr,
    REDUCE: tl.constexpr, NEED_DX: tl.constexpr, STATISTICS: tl.constexpr, dtype: tl.constexpr, ALL: tl.constexpr,
    WIDE: tl.constexpr, LOOP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A tile a program; of single rows that are read in a loop several, one after the other, so
    that no more are under way than the cache holds until their second reading. What a mean divides
    by is read, or, of ALL rows at most, added up by each program itself."""
    total_weight = tl.full((), 1, dtype)
    if MEAN:
        if PROBABILITIES:
            total_weight *= rows
        elif ALL > 0:
            every = tl.arange(0, ALL)
            total_weight = tl.sum(
                _class(
                    TARGET, WEIGHT, every, every < rows, classes, ignore_index, HAS_WEIGHT, dtype
                )[3]
            )
        else:
            total_weight = tl.load(TOTAL).to(dtype)
    if LOOP and ROWS == 1:
        total = tl.zeros((ROWS,), dtype)
        for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
            loss = _forward_tile(
                tile, total_weight, X, TARGET, WEIGHT, LOSS, DX, LARGEST, LOG_SUM, rows, classes, inner, x_outer, x_class, x_inner,
                ignore_index, PROBABILITIES, HAS_WEIGHT, SMOOTHING, SHARE, MEAN, REDUCE, NEED_DX, STATISTICS, dtype,
                WIDE, LOOP, ROWS, BLOCK,
            )  # fmt: skip
            if REDUCE:
                total += loss
    else:
        total = _forward_tile(
            tl.program_id(0), total_weight, X, TARGET, WEIGHT, LOSS, DX, LARGEST, LOG_SUM, rows, classes, inner, x_outer, x_class, x_inner,
            ignore_index, PROBABILITIES, HAS_WEIGHT, SMOOTHING, SHARE, MEAN, REDUCE, NEED_DX, STATISTICS, dtype,
            WIDE, LOOP, ROWS, BLOCK,
        )  # fmt: skip
    if REDUCE:
        tl.store(LOSS + tl.program_id(0), tl.sum(total))


@triton.jit
def _backward(
    DY, X, TARGET, WEIGHT, TOTAL, LARGEST, LOG_SUM, DX, DTARGET, rows, classes, inner, x_outer, x_class, x_inner, ignore_index,
    PROBABILITIES: tl.constexpr, HAS_WEIGHT: tl.constexpr, SMOOTHING: tl.constexpr, SHARE: tl.constexpr, MEAN: tl.constexpr,
    PER_ROW: tl.constexpr, NEED_DX: tl.constexpr, NEED_DTARGET: tl.constexpr, dtype: tl.constexpr,
    WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The same tiles, from x and the statistics of its rows."""
    SOFT: tl.constexpr = PROBABILITIES or SMOOTHING > 0
    row, alive, first, column = _tile(tl.program_id(0), inner, x_outer, x_inner, WIDE, ROWS, BLOCK)
    X += first
    Q = TARGET + first if PROBABILITIES else TARGET
    m, log_z = (
        tl.load(LARGEST + row, alive, other=0.0)[:, None],
        tl.load(LOG_SUM + row, alive, other=0.0)[:, None],
    )
    counted = alive
    mass = tl.zeros((ROWS,), dtype)
    hard = tl.zeros((ROWS, 1), dtype)
    chosen = tl.full((ROWS, 1), -1, column.dtype)
    if not PROBABILITIES:
        t, valid, counted, w = _class(
            TARGET, WEIGHT, row, alive, classes, ignore_index, HAS_WEIGHT, dtype
        )
        mass = w * (1 - SMOOTHING)
        hard = mass[:, None]
        chosen = tl.where(valid, t, -1).to(column.dtype)[:, None]
    dy = _share(DY, TOTAL, row, alive, rows, PER_ROW, MEAN, PROBABILITIES, dtype)[:, None]
    if SOFT and NEED_DX:
        total = tl.zeros((ROWS, BLOCK), dtype)
        for start in range(0, classes, BLOCK):
            place = start + column
            mask = alive[:, None] & (place < classes)
            total += _soft(
                Q,
                WEIGHT,
                place,
                mask,
                classes,
                x_class,
                PROBABILITIES,
                HAS_WEIGHT,
                SMOOTHING,
                SHARE,
                dtype,
            )
        mass += tl.sum(total, 1)
    for start in range(0, classes, BLOCK):
        place = start + column
        mask = alive[:, None] & (place < classes)
        log_p = tl.load(X + place * x_class, mask, other=0.0).to(dtype) - m - log_z
        if NEED_DX:
            q = tl.where(place == chosen, hard, 0.0)
            if SOFT:
                q += _soft(
                    Q,
                    WEIGHT,
                    place,
                    mask,
                    classes,
                    x_class,
                    PROBABILITIES,
                    HAS_WEIGHT,
                    SMOOTHING,
                    SHARE,
                    dtype,
                )
            dx = tl.where(counted[:, None], dy * (tl.exp(log_p) * mass[:, None] - q), 0.0)
            tl.store(DX + first + place * x_class, dx.to(DX.dtype.element_ty), mask)
        if NEED_DTARGET:
            dt = dy * (SMOOTHING - 1) * log_p
            if HAS_WEIGHT:
                dt *= tl.load(WEIGHT + place, place < classes, other=0.0).to(dtype)
            tl.store(DTARGET + first + place * x_class, dt.to(DTARGET.dtype.element_ty), mask)


@triton.jit
def _nll_backward(
    DY, TARGET, WEIGHT, TOTAL, DX, rows, classes, inner, x_outer, x_class, x_inner, ignore_index,
    HAS_WEIGHT: tl.constexpr, MEAN: tl.constexpr, PER_ROW: tl.constexpr, dtype: tl.constexpr,
    WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx = -w_t dy where c = t, 0 elsewhere: ROWS rows a program."""
    row, alive, first, column = _tile(tl.program_id(0), inner, x_outer, x_inner, WIDE, ROWS, BLOCK)
    t, valid, counted, w = _class(
        TARGET, WEIGHT, row, alive, classes, ignore_index, HAS_WEIGHT, dtype
    )
    dy = _share(DY, TOTAL, row, alive, rows, PER_ROW, MEAN, False, dtype)
    hard = tl.where(counted, -w * dy, 0.0)
    # a class out of range makes all of its row NaN
    other = tl.where(counted & (valid == 0), hard, 0.0)[:, None]
    chosen = tl.where(valid, t, -1).to(column.dtype)[:, None]
    for start in range(0, classes, BLOCK):
        place = start + column
        dx = tl.where(place == chosen, hard[:, None], other)
        tl.store(
            DX + first + place * x_class,
            dx.to(DX.dtype.element_ty),
            alive[:, None] & (place < classes),
        )


#: elements that a program holds at once: 32 a thread at 16 warps, the most that 64-wide warps allow
#: (of 64 ptxas spills some registers)
HELD = 16384

#: elements of a block where a row is read in a loop, of each of x, m and z; and programs a
#: multiprocessor: with half as many, too little is under way to hide the memory's latency (1.4 TB/s
#: in place of 1.9 on an H200, with dx, of rows of 131072). Two of twice as many elements and warps
#: do as well, but of 16 warps ptxas spills some registers
LOOPED, RESIDENT = 4096, 4

#: the same where rows lie side by side and each element needs an address of its own
SIDE_BY_SIDE = 2048


def _view(x: Tensor) -> Tensor:
    """x as (outer, C, inner): (N, C) is (1, C, N)."""
    return x if x.dim() == 3 else x.t().unsqueeze(0)


@dataclass(frozen=True)
class Config:
    """``rows`` rows by ``block`` classes at a time."""

    rows: int
    block: int
    num_warps: int


def config(classes: int, inner: int, dtype: torch.dtype, last: bool, tensors: int) -> Config:
    """The tile of rows of ``classes``, which lie one behind the other if ``last``, else ``inner``
    of them side by side; ``tensors`` of them are read."""
    words = (
        4 if dtype == torch.float64 else 1
    )  # a number takes two registers, and its exponential many more
    block = next_power_of_2(classes)
    if not last:
        rows = min(64, next_power_of_2(inner))
        block = min(block, SIDE_BY_SIDE // max(dtype.itemsize // 4, 1) // rows)
        return Config(
            rows, block, min(max(rows * block * max(dtype.itemsize // 4, 1) // 256, 1), 8)
        )
    if block > HELD // tensors // words:
        return Config(1, LOOPED // tensors // words, 8)
    rows = min(max(1024 // words // block, 1), next_power_of_2(inner))
    return Config(rows, block, min(max(rows * block * words * tensors // 1024, 1), 16))


@lru_cache(maxsize=4096)
def _tiles(
    shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, soft: bool
) -> tuple[int, dict[str, Any], tuple[int, ...]]:
    """(tiles, the kernels' last constexprs and options, their numbers but for ignore_index) of a
    dense x (outer, C, inner)."""
    outer, classes, inner = shape
    wide = _wide(shape, strides)
    c = config(classes, inner, dtype, strides[1] <= strides[2], 2 if soft else 1)
    block = (
        c.block // 2 if wide and classes > c.block else c.block
    )  # an address of 64 bits takes two registers
    options = {
        "WIDE": wide,
        "LOOP": classes > block,
        "ROWS": c.rows,
        "BLOCK": block,
        "num_warps": c.num_warps,
    }
    return outer * cdiv(inner, c.rows), options, (outer * inner, classes, inner, *strides)


def _wide(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether offsets need int64: half of what int32 holds, as the masked end of the last tile
    needs room too."""
    return sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) >= 2**30


def _run(
    kernel: Any,
    x: Tensor,
    before: tuple[Any, ...],
    ignore_index: int,
    soft: bool,
    **constexprs: Any,
) -> None:
    """One of the kernels that take a tile of x, a dense (outer, C, inner), a program."""
    tiles, options, numbers = _tiles(x.shape, x.stride(), x.dtype, soft)
    options = {name: value for name, value in options.items() if name != "LOOP"}
    launch(
        kernel,
        tiles,
        *before,
        *numbers,
        ignore_index,
        **constexprs,
        dtype=_dtype(x.dtype),
        **options,
    )


@lru_cache(maxsize=4096)
def _forward_of(
    shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, count: int,
    probabilities: bool, weighted: bool, smoothing: float, reduction: int, keep: int,
) -> tuple[Callable[..., None], int, tuple[int, ...], int]:  # fmt: skip
    """(launcher, programs, the kernel's numbers up to ignore_index, tiles) of forward, on ``count``
    multiprocessors."""
    tiles, options, numbers = _tiles(shape, strides, dtype, probabilities or smoothing > 0)
    counted = reduction == MEAN and not probabilities and numbers[0] <= FEW
    run = _bound_forward(
        probabilities,
        weighted,
        smoothing,
        smoothing / shape[1],
        reduction,
        keep,
        dtype == torch.float64,
        counted,
        *options.values(),
    )
    return (
        run,
        min(tiles, RESIDENT * count) if options["LOOP"] and options["ROWS"] == 1 else tiles,
        numbers,
        tiles,
    )


@kept
def _bound_forward(
    probabilities: bool, weighted: bool, smoothing: float, share: float, reduction: int, keep: int, double: bool, counted: bool,
    wide: bool, loop: bool, rows: int, block: int, warps: int,
) -> Callable[..., None]:  # fmt: skip
    return bind(
        _forward, 8, 8, PROBABILITIES=probabilities, HAS_WEIGHT=weighted, SMOOTHING=smoothing, SHARE=share,
        MEAN=reduction == MEAN, REDUCE=reduction != NONE, NEED_DX=keep == GRADIENT, STATISTICS=keep == STATISTICS,
        dtype=tl.float64 if double else tl.float32, ALL=FEW if counted else 0, WIDE=wide, LOOP=loop, ROWS=rows, BLOCK=block,
        num_warps=warps,
    )  # fmt: skip


def _dtype(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


def _dense(x: Tensor) -> Tensor:
    """``x`` in strides that ``empty_like`` keeps: without gaps or overlaps."""
    if x.is_contiguous():
        return x
    layout = torch.empty_like(x, device="meta").stride()
    return x if x.stride() == layout else torch.empty_like(x).copy_(x)


def _sum(partial: Tensor) -> Tensor:
    """The second stage."""
    return partial.view(()) if partial.numel() == 1 else partial.sum()


def _pick(
    x: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    classes: int,
    dtype: torch.dtype,
    reduction: int,
    ignore_index: int,
) -> Any:
    """(losses of the rows or their sum, Σ w_t for a mean) of nll_loss; of ``x`` None the second
    alone."""
    rows = target.numel()
    wide = accumulator(dtype)
    programs = cdiv(rows, PICKED)
    total = target.new_empty(programs, dtype=wide) if reduction == MEAN else None
    loss, strides, far = None, (0, 0, 0), rows >= 2**30
    if x is not None:
        loss = (
            target.new_empty(target.shape, dtype=dtype)
            if reduction == NONE
            else target.new_empty(programs, dtype=wide)
        )
        v = _view(x)
        strides, far = v.stride(), far or _wide(v.shape, v.stride())
    run = _bound_pick(x is not None, weight is not None, reduction, dtype == torch.float64, far)
    run(
        programs,
        x,
        target,
        weight,
        loss,
        total,
        rows,
        classes,
        target.shape[-1],
        *strides,
        ignore_index,
    )
    return loss if reduction == NONE or loss is None else _sum(
        loss
    ), None if total is None else _sum(total)


@kept
def _bound_pick(
    has_x: bool, weighted: bool, reduction: int, double: bool, wide: bool
) -> Callable[..., None]:
    return bind(
        _nll, 5, 7, HAS_X=has_x, HAS_WEIGHT=weighted, REDUCE=reduction != NONE, HAS_TOTAL=reduction == MEAN,
        dtype=tl.float64 if double else tl.float32, WIDE=wide, ROWS=PICKED, num_warps=8 if double else 4,
    )  # fmt: skip


def nll_forward(
    x: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """The loss, and Σ w_t (for a mean; else any number)."""
    weight = None if weight is None else weight.contiguous()
    loss, total = _pick(
        x, target.contiguous(), weight, x.shape[1], x.dtype, reduction, ignore_index
    )
    if total is None:
        return loss.to(x.dtype), x.new_empty(())
    return (loss / total).to(x.dtype), total.to(x.dtype)


def nll_backward(
    dy: Tensor,
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    total: Tensor,
    reduction: int,
    ignore_index: int,
) -> Tensor:
    """dx, contiguous."""
    dx = x.new_empty(x.shape)
    weight = None if weight is None else weight.contiguous()
    before = dy.contiguous(), target.contiguous(), weight, total, dx
    options = {
        "HAS_WEIGHT": weight is not None,
        "MEAN": reduction == MEAN,
        "PER_ROW": reduction == NONE,
    }
    _run(_nll_backward, _view(dx), before, ignore_index, False, **options)
    return dx


def _prepare(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    few: int = -1,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """x and what the kernels want beside it: target, weight, and of more than ``few`` rows their
    total."""
    x = _dense(x)
    probabilities = target.is_floating_point()
    target = like(target, x) if probabilities else target.contiguous()
    weight = None if weight is None else weight.contiguous()
    counted = reduction == MEAN and not probabilities and target.numel() > few
    return (
        x,
        target,
        weight,
        _pick(None, target, weight, x.shape[1], x.dtype, reduction, ignore_index)[1]
        if counted
        else None,
    )


def forward(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    smoothing: float,
    keep: int,
) -> tuple[Tensor, Tensor]:
    """The loss, and what ``keep`` says: nothing, dx for a dy of 1, or (m, log Σ e^(x-m)) of each
    row."""
    x, target, weight, total = _prepare(x, target, weight, reduction, ignore_index, FEW)
    shape = (x.shape[0], *x.shape[2:])
    wide = accumulator(x.dtype)
    dx = torch.empty_like(x) if keep == GRADIENT else None
    statistics = x.new_empty((2, *shape), dtype=wide) if keep == STATISTICS else None
    v = _view(x)
    run, programs, numbers, tiles = _forward_of(
        v.shape,
        v.stride(),
        x.dtype,
        multiprocessors(x.device),
        target.is_floating_point(),
        weight is not None,
        smoothing,
        reduction,
        keep,
    )
    partial = None if reduction == NONE else x.new_empty(programs, dtype=wide)
    loss = x.new_empty(shape) if partial is None else partial
    m, log_sum = (None, None) if statistics is None else statistics
    run(programs, v, target, weight, total, loss, dx, m, log_sum, *numbers, ignore_index, tiles)
    if partial is not None:
        loss = (
            _sum(partial).to(x.dtype)
            if x.numel()
            else x.new_full((), float("nan") if reduction == MEAN else 0.0)
        )
    return loss, dx if dx is not None else statistics if statistics is not None else x.new_empty(0)


def backward(
    dy: Tensor, x: Tensor, target: Tensor, weight: Tensor | None, statistics: Tensor, reduction: int, ignore_index: int,
    smoothing: float, need_x: bool, need_target: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dx and the gradient of class probabilities; an empty tensor for one that is not needed."""
    layout = target
    x, target, weight, total = _prepare(x, target, weight, reduction, ignore_index)
    dx = torch.empty_like(x) if need_x else None
    dtarget = torch.empty_like(target) if need_target else None
    v, probabilities = _view(x), target.is_floating_point()
    _run(
        _backward, v, (dy.contiguous(), v, target, weight, total, *statistics, dx, dtarget), ignore_index, probabilities or smoothing > 0,
        PROBABILITIES=probabilities, HAS_WEIGHT=weight is not None, SMOOTHING=smoothing, SHARE=smoothing / x.shape[1],
        MEAN=reduction == MEAN, PER_ROW=reduction == NONE, NEED_DX=need_x, NEED_DTARGET=need_target,
    )  # fmt: skip
    nothing = x.new_empty(0)
    if dtarget is not None and dtarget.stride() != layout.stride():
        dtarget = torch.empty_like(layout).copy_(dtarget)
    return nothing if dx is None else dx, nothing if dtarget is None else dtarget

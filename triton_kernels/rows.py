"""What kernels on rows share: the tile and its size, the online softmax, sums in two stages.

A tensor is seen as (outer, n, inner), and row number o * inner + i is the n elements at (o, i).
Where inner > 1, rows of neighbouring numbers are neighbours in memory, so that a tile of several
reads whole cache lines. A row that fits a tile is read once, that of one block of threads or, where
the GPU has clusters, of up to 16; a longer one is read in a loop, and again for what depends on its
sums, backwards: from what the cache still has of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import elementary
from .launch import Kernel, Launch, accumulator, cdiv, kernel, next_power_of_2, planned

#: programs a multiprocessor where a row is read in a loop: with half as many, too few loads are
#: under way to hide the memory's latency (1.6 TB/s instead of 2.2 on an H200, softmax forward of
#: rows of 131072)
RESIDENT = 4

#: numbers of a row for each block of a cluster, 16 a thread, so that two blocks or more fit a
#: multiprocessor: the longest row without a cluster. Half as many where more than two numbers of
#: each element are live; twice as many of rows too long for 16 blocks
SHARED = 8192


@dataclass(frozen=True)
class RowConfig:
    """``rows`` rows by ``block`` columns a tile."""

    rows: int
    block: int
    num_warps: int
    num_ctas: int = 1


def row_config(
    n: int, inner: int, dtype: torch.dtype, live: int | tuple[int, int], clusters: bool = False,
    heavy: bool = False,
) -> RowConfig:  # fmt: skip
    """The tile for rows of ``n``, ``inner`` of them side by side, in a kernel that needs ``live``
    numbers of ``dtype`` for each element at once, or so many in rows of up to :data:`SHARED` and so
    many in longer ones. With ``clusters`` several blocks of threads may share a row. A row of a
    ``heavy`` kernel has work of its own, which its threads repeat: they are half as many, or one
    where rows lie side by side."""
    if isinstance(live, tuple):
        live = live[n > SHARED]
    # at 16 warps, the most that 64-wide warps allow, 64 numbers a thread, half of its registers.
    # One of float64 takes two and its exponential many more; side by side each has an address too
    double, side_by_side = dtype == torch.float64, inner > 1
    most = 32768 // live // (4 if double else 1) // (4 if side_by_side else 1)
    block = next_power_of_2(max(n, 1))
    share = SHARED // (2 if live > 2 else 1)
    if clusters and not (double or side_by_side) and share < block <= min(16 * most, 32 * SHARED):
        share = max(share, block // 16)
        return RowConfig(1, block, min(share // (1024 if heavy else 512), 16), block // share)
    if heavy and side_by_side:  # a thread has some of them to itself, element after element
        return RowConfig(128, 1, 1)
    heavy = heavy and 512 <= block <= most
    # short rows: enough of them for two 128-bit accesses a thread at 4 warps, or for four at one.
    # Side by side: enough to fill a cache line of 128 bytes
    numbers = min(1024 if heavy else 2048, most)
    rows = max(numbers // block, min(next_power_of_2(inner), 128 // dtype.itemsize))
    looped = rows * block > most
    if looped:
        block = most // 4 // rows
    # elements a thread: one 128-bit access at least. Side by side in a loop there are two places;
    # where one number is live there is room for more loads under way
    a_thread = 16 // (2 if double or side_by_side else 1) // (2 if live > 2 else 1)
    if looped and side_by_side:
        a_thread //= 2
    elif heavy or (looped and live == 1 and not double):
        a_thread *= 2
    a_thread = max(a_thread, 16 // dtype.itemsize)
    return RowConfig(rows, block, min(max(rows * block // (32 * a_thread), 1), 16))


def stages_of(dtype: torch.dtype) -> int:
    """``num_stages`` of a loop that waits for sums: two blocks are loaded ahead, or one of numbers
    of 32 bits: 32 KB and more to a multiprocessor while it computes."""
    return 3 if dtype.itemsize == 2 else 2


def far(extent: int) -> bool:
    """Whether offsets up to ``extent`` need int64: from half of what int32 represents, as the
    masked end of the last tile needs room too."""
    return extent >= 2**30


def over_rows(
    kernel: Kernel, shape: tuple[int, ...], strides: Sequence[tuple[int, ...]], dtype: torch.dtype,
    live: int | tuple[int, int], count: int, clusters: bool = False, heavy: bool = False, /,
    **named: Any,
) -> Launch:  # fmt: skip
    """The launch of a kernel that walks rows: its programs, and those of the numbers and constexprs
    below that it has.

    Args:
        shape: (outer, n, inner).
        strides: of each layout that is read or written; the first are s_outer, s_n and s_inner.
        live, clusters, heavy: see :func:`row_config`.
        count: multiprocessors.
        named: the kernel's own numbers and constexprs.
    """
    outer, n, inner = shape
    c = row_config(n, inner, dtype, live, clusters, heavy)
    columns = max((n - 1) * s[1] for s in strides)
    extent = max((outer - 1) * s[0] + (inner - 1) * s[2] for s in strides) + columns
    # an offset of 64 bits takes two registers
    block = max(c.block // 2, 1) if far(columns) and n > c.block else c.block
    tiles = cdiv(outer * inner, c.rows)
    # no more rows at once than the cache holds until their second reading
    several = n > block and c.rows == 1
    programs = min(tiles, RESIDENT * count) if several else tiles
    shared = {
        "rows": outer * inner, "n": n, "inner": inner, "tiles": tiles,
        **dict(zip(("s_outer", "s_n", "s_inner"), strides[0], strict=True)),
        "SEVERAL": several, "LOOP": n > block, "WIDE": far(extent), "WIDE_COLUMNS": far(columns),
        # whether a thread reads neighbouring numbers at once
        "ALIGNED": all(s[1] == 1 and s[0] % 16 == 0 for s in strides),
        "ROWS": c.rows, "BLOCK": block,
    }  # fmt: skip
    taken = {k: v for k, v in shared.items() if k in kernel.numbers + kernel.constexprs}
    return kernel.launch(programs, num_warps=c.num_warps, num_ctas=c.num_ctas, **taken, **named)


def rows_of(t: Tensor) -> Tensor:
    """(..., D) as rows whose components lie side by side; rows that are one row in memory stay
    one."""
    flat = t.reshape(t.shape[:-1].numel(), t.shape[-1])
    return flat if flat.stride(1) == 1 or flat.shape[1] == 1 else flat.contiguous()


@triton.jit
def tile_of(
    tile, rows, ROWS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr, COLUMNS: tl.constexpr
):
    """(numbers of the tile's rows, which of them exist, columns of its first block); in int64 if
    WIDE, and if the COLUMNS are."""
    row = tile * tl.full((), ROWS, tl.int64 if WIDE else tl.int32) + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK).to(tl.int64 if COLUMNS else tl.int32)
    return row, row < rows, column[None, :]


@triton.jit
def start_of(row, inner, outer_stride, inner_stride):
    """The offset of each row's first element."""
    return (row // inner * outer_stride + row % inner * inner_stride)[:, None]


@triton.jit
def read(X, place, inside, other=0.0):
    """A block in the accumulator's dtype."""
    return elementary.upcast(tl.load(X + place, inside, other=other))


@triton.jit
def write(Y, place, inside, y):
    """y over a block of Y."""
    tl.store(Y + place, y.to(Y.dtype.element_ty), inside)


@triton.jit
def lowest(dtype: tl.constexpr):
    """The lowest finite number."""
    value: tl.constexpr = -1.7976931348623157e308 if dtype == tl.float64 else -3.4028234663852886e38
    return tl.full((), value, dtype)


@triton.jit
def online_start(X, ROWS: tl.constexpr, BLOCK: tl.constexpr, dtype: tl.constexpr):
    """(m, z) of no numbers yet, for :func:`online`. A lane takes several numbers of a block of X;
    of rows side by side one, as a thread's others are of other rows."""
    at_once: tl.constexpr = 1 if ROWS > 1 else 128 // X.dtype.element_ty.primitive_bitwidth
    m = tl.full((ROWS, BLOCK // at_once), lowest(dtype), dtype)
    return m, tl.zeros((ROWS, BLOCK // at_once), dtype)


@triton.jit
def online(m, z, x, ALIGNED: tl.constexpr):
    """(max(m, x), Σ e^(x-m) so far) of each lane by itself, so that no iteration waits for another
    warp. m starts at the lowest number and z at 0: x = -inf then adds e^-inf = 0."""
    rows: tl.constexpr = x.shape[0]
    lanes: tl.constexpr = m.shape[1]
    at_once: tl.constexpr = x.shape[1] // lanes
    # those that a thread has: neighbours, if it reads them at once
    axis: tl.constexpr = 2 if ALIGNED else 1
    x = tl.reshape(x, (rows, lanes, at_once) if ALIGNED else (rows, at_once, lanes))
    largest = tl.maximum(m, tl.max(x, axis))
    e = _term(x - tl.expand_dims(largest, axis))
    return largest, z * _term(m - largest) + tl.sum(e, axis)


@triton.jit
def _term(x):
    """e^x for x <= 0, in a sum that is at least 1."""
    return elementary.exp_below_0(x, x.dtype != tl.float64)


@triton.jit
def online_of_rows(m, z):
    """(m, z) of each row from those of its lanes."""
    largest = tl.max(m, 1)
    return largest, tl.sum(z * _term(m - largest[:, None]), 1)


@triton.jit
def online_rest(m, rest, x, EXACT: tl.constexpr):
    """:func:`online` with z - 1 in place of z: the sum without the largest itself, beside whose 1
    it could be lost. It starts at -1."""
    d = tl.abs(x - m)
    e = elementary.exp_minus(d) if EXACT else tl.exp(-d)
    return tl.maximum(m, x), tl.where(x > m, (rest + 1) * e, rest + e)


@triton.jit
def online_rest_of_rows(m, rest, EXACT: tl.constexpr):
    """(m, z - 1) of each row from those of its lanes."""
    largest = tl.max(m, 1)
    d = m - largest[:, None]
    e = elementary.exp(d) if EXACT else tl.exp(d)
    ties = tl.sum(tl.where(d == 0, 1.0, 0.0), 1)
    return largest, tl.sum(tl.where(d == 0, rest, (rest + 1) * e), 1) + (ties - 1)


@triton.jit
def centred(mean, squares, x, there, before, share):
    """(μ, Σ (x - μ)²) of each lane with one block more, if it is ``there``; it had seen so many
    blocks ``before``, of which one is now this ``share``. A lane takes several neighbours at once:
    their own mean first, then the squares of what they are above it, and both are merged with those
    so far (Chan, Golub and LeVeque, 1979)."""
    lanes: tl.constexpr = mean.shape[1]
    at_once: tl.constexpr = x.shape[1] // lanes
    own = x
    if at_once > 1:
        x = tl.reshape(x, (x.shape[0], lanes, at_once))
        own = tl.sum(x, 2) * (1 / at_once)
        d = x - tl.expand_dims(own, 2)
        squares += tl.sum(d * d, 2)
    above = tl.where(there, own - mean, 0.0)
    return mean + above * share, squares + above * above * (at_once * before * share)


@triton.jit
def centred_rows(mean, squares, seen, n):
    """(μ, Σ (x - μ)²) of each row of ``n`` from those of its lanes, which have ``seen`` so many. A
    sum of far means rounds by more than their mean may: what it has lost is a second sum."""
    of_row = tl.sum(mean * seen, 1) / n
    d = mean - of_row[:, None]
    lost = tl.sum(d * seen, 1) / n
    d -= lost[:, None]
    return of_row + lost, tl.sum(squares + seen * d * d, 1)


@kernel
def _total(PARTIAL, WEIGHT, OUT, TOTAL, parts, n, MEAN: tl.constexpr, BLOCK: tl.constexpr):
    """Σ partial by one program; of a mean over n, or over Σ weight, which may go to TOTAL."""
    offsets = tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), PARTIAL.dtype.element_ty)
    weights = tl.zeros((BLOCK,), PARTIAL.dtype.element_ty)
    for start in range(0, parts, BLOCK):
        inside = start + offsets < parts
        sums += tl.load(PARTIAL + start + offsets, inside, other=0.0)
        if WEIGHT is not None:
            weights += tl.load(WEIGHT + start + offsets, inside, other=0.0)
    total = tl.sum(sums)
    if WEIGHT is not None:
        weight = tl.sum(weights)
        if TOTAL is not None:
            tl.store(TOTAL, weight.to(TOTAL.dtype.element_ty))
        total = total / weight
    elif MEAN:
        total = total / n
    tl.store(OUT, total.to(OUT.dtype.element_ty))


@planned
def _plan_total(parts: int, n: int | None) -> Launch:
    block = min(next_power_of_2(parts), 8192)
    warps = min(max(block // 256, 1), 8)
    return _total.launch(1, parts=parts, n=n or 0, MEAN=bool(n), BLOCK=block, num_warps=warps)


def total(
    partial: Tensor, out: Tensor, n: int | None = None, weight: Tensor | None = None,
    total_weight: Tensor | None = None,
) -> None:  # fmt: skip
    """The second stage of a sum: Σ partial in ``out``; over ``n`` for a mean, or over Σ ``weight``,
    which goes to ``total_weight`` if there is one."""
    _plan_total(partial.numel(), n)(partial, weight, out, total_weight)


@kernel
def _column_sum(PARTIAL, OUT, SECOND, parts, n, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Σ over the parts of (parts, n), COLUMNS columns a program; then those of a SECOND sum."""
    tiles = tl.cdiv(n, COLUMNS)
    which, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.arange(0, ROWS)
    sums = tl.zeros((ROWS, COLUMNS), PARTIAL.dtype.element_ty)
    PARTIAL += which.to(tl.int64) * parts * n
    for start in range(0, parts, ROWS):
        part = (start + row)[:, None]
        inside = (part < parts) & (column < n)[None, :]
        sums += tl.load(PARTIAL + part.to(tl.int64) * n + column[None, :], inside, other=0.0)
    total = tl.sum(sums, 0)
    if which == 0:
        tl.store(OUT + column, total.to(OUT.dtype.element_ty), column < n)
    elif SECOND is not None:
        tl.store(SECOND + column, total.to(SECOND.dtype.element_ty), column < n)


@planned
def _plan_column_sum(sums: int, parts: int, n: int) -> Launch:
    columns = min(next_power_of_2(n), 32)
    rows = min(next_power_of_2(parts), 4096 // columns)
    warps = min(max(rows * columns // 512, 1), 8)
    return _column_sum.launch(
        sums * cdiv(n, columns), parts=parts, n=n, ROWS=rows, COLUMNS=columns, num_warps=warps
    )


def column_sum(partial: Tensor, out: Tensor, second: Tensor | None = None) -> None:
    """The second stage of a sum over rows: Σ over the parts of ``partial`` (sums, parts, n), of
    which there are one or two, in tensors of ``n`` elements each."""
    _plan_column_sum(*partial.shape)(partial, out, second)


def partial_sums(like: Tensor, *shape: int) -> Tensor:
    """Room for a first stage."""
    return like.new_empty(shape, dtype=accumulator(like.dtype))

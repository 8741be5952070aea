"""group_norm, instance_norm and batch_norm: the same kernels for all three. (Groups that fit a
block are read once, by ``group_norm.py``.)

x is seen as (N, C, S) with any strides. A *cell* is some of a channel's numbers: a part of one
sample, or for batch_norm a part of all samples. Forward takes (μ, Σ (x - μ)²) of each cell, merges
the cells of a group, and normalises; backward takes Σ dy x̂ and Σ dy of each cell, merges them into
a group's sums and into dw and db, and makes dx. So x is read twice and y written once; x and dy are
read twice and dx written once. Where the statistics are constants one pass makes dx and the sums.

A *span* is what groups are cut from: a sample, or for batch_norm the batch. It is walked in tiles
of BLOCK numbers of CHANNELS channels, of which a cell takes ``size``. Formulas:
``custom_backprop/formulas/channel_norm.py``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import group_norm
from .launch import Kernel, Launch, cdiv, kernel, multiprocessors, next_power_of_2, planned
from .rows import centred, centred_rows, column_sum, far, partial_sums, read, stages_of, write

#: programs a multiprocessor that spans are cut into, where there are fewer of them
RESIDENT = 4


@triton.jit
def _cell(channels, length, size, chunks, blocks, group, CHANNELS: tl.constexpr):
    """(number of the part, its first tile and the one past its last, channels, the row of each
    among the statistics)."""
    part = tl.program_id(0) // blocks
    span = part // chunks
    first = span * length + part % chunks * size
    last = tl.minimum(first + size, (span + 1) * length)
    channel = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    return part, first, last, channel, span * (channels // group) + channel // group


@triton.jit
def _tile(
    tile, channel, channels, inner, per, s_n, s_c, s_s, WIDE: tl.constexpr, BLOCK: tl.constexpr
):
    """(offsets, which of them exist) of a tile, of which a sample has ``per``."""
    n, s = tile // per, tile % per * BLOCK + tl.arange(0, BLOCK)
    inside = (channel < channels)[:, None] & (s < inner)[None, :]
    if WIDE:
        n, s, channel = n.to(tl.int64), s.to(tl.int64), channel.to(tl.int64)
    return n * s_n + channel[:, None] * s_c + s[None, :] * s_s, inside


@triton.jit
def _before(tile, inner, per, BLOCK: tl.constexpr):
    """How many of a channel's numbers lie before a tile."""
    return tile // per * inner + tile % per * BLOCK


@triton.jit
def _seen(first, tile, per):
    """In how many tiles, from the ``first`` to the one before this, a lane was; and one that the
    last of a sample is too short for."""
    return tile - first, tile - first - (tile // per - first // per)


@triton.jit
def _of_channel(T, place, exists, other):
    """A number a row of the tile; ``other`` where there is no T."""
    t = tl.full(place.shape, other, tl.float32)
    if T is not None:
        t = read(T, place, exists)
    return t[:, None]


@triton.jit
def _rstd(RSTD, place, exists, EPS: tl.constexpr):
    """r; with an EPS, of a variance."""
    r = read(RSTD, place, exists)
    return (r if EPS is None else 1 / tl.sqrt(r + EPS))[:, None]


@kernel
def _moments(
    X, PARTIAL, channels, inner, per, length, size, chunks, blocks, group, parts, s_n, s_c, s_s,
    STAGES: tl.constexpr, WIDE: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
    AT_ONCE: tl.constexpr,
):  # fmt: skip
    """μ and Σ (x - μ)² of each cell."""
    LANES: tl.constexpr = BLOCK // AT_ONCE
    dtype: tl.constexpr = PARTIAL.dtype.element_ty
    part, first, last, channel, _ = _cell(channels, length, size, chunks, blocks, group, CHANNELS)
    means = tl.zeros((CHANNELS, LANES), dtype)
    squares = tl.zeros((CHANNELS, LANES), dtype)
    lane = AT_ONCE * tl.arange(0, LANES)[None, :]
    always = (per - 1) * BLOCK + lane < inner
    for tile in tl.range(first, last, num_stages=STAGES):
        place, inside = _tile(tile, channel, channels, inner, per, s_n, s_c, s_s, WIDE, BLOCK)
        most, least = _seen(first, tile, per)
        most, least = most.to(dtype), least.to(dtype)
        means, squares = centred(
            means, squares, read(X, place, inside), tile % per * BLOCK + lane < inner,
            tl.where(always, most, least), tl.where(always, 1 / (most + 1), 1 / (least + 1)),
        )  # fmt: skip
    most, least = _seen(first, last, per)
    seen = (tl.where(always, most, least) * AT_ONCE).to(dtype)
    n = _before(last, inner, per, BLOCK) - _before(first, inner, per, BLOCK)
    mean, squares = centred_rows(means, squares, seen, n)
    cell, exists = part.to(tl.int64) * channels + channel, channel < channels
    tl.store(PARTIAL + cell, mean, exists)
    tl.store(PARTIAL + parts.to(tl.int64) * channels + cell, squares, exists)


@triton.jit
def _cells_of(row, start, rows, channels, chunks, group, CELLS: tl.constexpr):
    """(numbers of the parts, channels, which exist) of some cells of each of these groups."""
    k = start + tl.arange(0, CELLS)[None, :]
    groups = channels // group
    part = (row // groups * chunks)[:, None] + k // group
    channel = (row % groups * group)[:, None] + k % group
    return part, channel, (row < rows)[:, None] & (k < chunks * group)


@triton.jit
def _count(part, inner, per, length, size, chunks, BLOCK: tl.constexpr):
    """How many of a channel's numbers the cells of these parts have."""
    first = part % chunks * size
    last = tl.minimum(first + size, length)
    return _before(last, inner, per, BLOCK) - _before(first, inner, per, BLOCK)


@kernel
def _statistics(
    PARTIAL, MEAN, RSTD, VARIANCE, rows, n, channels, inner, per, length, size, chunks, group,
    parts, EPS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    """μ and r of each group from its cells; and where there is a VARIANCE, the unbiased one. A sum
    of far means rounds by more than their mean may: what it has lost is a second sum."""
    dtype: tl.constexpr = PARTIAL.dtype.element_ty
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    sums = tl.zeros((ROWS, CELLS), dtype)
    for start in range(0, chunks * group, CELLS):
        part, channel, inside = _cells_of(row, start, rows, channels, chunks, group, CELLS)
        count = _count(part, inner, per, length, size, chunks, BLOCK)
        place = part.to(tl.int64) * channels + channel
        sums += tl.load(PARTIAL + place, inside, other=0.0) * count.to(dtype)
    mean = tl.sum(sums, 1)[:, None] / n
    squares = tl.zeros((ROWS, CELLS), dtype)
    rest = tl.zeros((ROWS, CELLS), dtype)
    for start in range(0, chunks * group, CELLS):
        part, channel, inside = _cells_of(row, start, rows, channels, chunks, group, CELLS)
        count = _count(part, inner, per, length, size, chunks, BLOCK)
        place = part.to(tl.int64) * channels + channel
        d = tl.load(PARTIAL + place, inside, other=0.0) - mean
        of_cell = tl.where(inside, d * count.to(dtype), 0.0)
        rest += of_cell
        squares += d * of_cell
        place += parts.to(tl.int64) * channels
        squares += tl.load(PARTIAL + place, inside, other=0.0)
    lost = tl.sum(rest, 1) / n
    square, of_lost = tl.sum(squares, 1), lost * lost * n
    square = tl.where(square < of_lost, 0.0, square - of_lost)
    tl.store(MEAN + row, tl.sum(mean, 1) + lost, row < rows)
    tl.store(RSTD + row, 1 / tl.sqrt(square / n + EPS), row < rows)
    if VARIANCE is not None:
        tl.store(VARIANCE + row, square / tl.maximum(n - 1, 1), row < rows)


@kernel
def _normalise(
    X, WEIGHT, BIAS, MEAN, RSTD, Y, channels, inner, per, length, size, chunks, blocks, group,
    s_n, s_c, s_s,
    EPS: tl.constexpr, STAGES: tl.constexpr, WIDE: tl.constexpr, CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """y."""
    _, first, last, channel, row = _cell(channels, length, size, chunks, blocks, group, CHANNELS)
    exists = channel < channels
    mean, rstd = read(MEAN, row, exists)[:, None], _rstd(RSTD, row, exists, EPS)
    weight = _of_channel(WEIGHT, channel, exists, 1.0)
    bias = _of_channel(BIAS, channel, exists, 0.0)
    for tile in tl.range(first, last, num_stages=STAGES):
        place, inside = _tile(tile, channel, channels, inner, per, s_n, s_c, s_s, WIDE, BLOCK)
        write(Y, place, inside, (read(X, place, inside) - mean) * rstd * weight + bias)


@kernel
def _sums(
    DY, X, WEIGHT, MEAN, RSTD, PARTIAL, DX, channels, inner, per, length, size, chunks, blocks,
    group, parts, s_n, s_c, s_s,
    EPS: tl.constexpr, WIDE: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Σ dy x̂ and Σ dy of each cell; and where there is a DX, that of constant statistics."""
    dtype: tl.constexpr = tl.float64 if X.dtype.element_ty == tl.float64 else tl.float32
    part, first, last, channel, row = _cell(channels, length, size, chunks, blocks, group, CHANNELS)
    exists = channel < channels
    mean, rstd = read(MEAN, row, exists)[:, None], _rstd(RSTD, row, exists, EPS)
    scale = rstd * _of_channel(WEIGHT, channel, exists, 1.0)
    dw = tl.zeros((CHANNELS, BLOCK), dtype)
    db = tl.zeros((CHANNELS, BLOCK), dtype)
    for tile in range(first, last):  # no more registers are left on sm_100
        place, inside = _tile(tile, channel, channels, inner, per, s_n, s_c, s_s, WIDE, BLOCK)
        dy = read(DY, place, inside)
        if PARTIAL is not None:
            db += dy
            dw += dy * (read(X, place, inside) - mean)
        if DX is not None:
            write(DX, place, inside, dy * scale)
    if PARTIAL is not None:
        cell = part.to(tl.int64) * channels + channel
        tl.store(PARTIAL + cell, tl.sum(dw * rstd, 1), exists)
        tl.store(PARTIAL + parts.to(tl.int64) * channels + cell, tl.sum(db, 1), exists)


@kernel
def _sums_of_groups(
    PARTIAL, WEIGHT, ALONG, TOTAL, rows, n, channels, chunks, group, parts,
    ROWS: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    """Σ g x̂ / n and Σ g / n of each group from the sums of its cells."""
    dtype: tl.constexpr = PARTIAL.dtype.element_ty
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    along = tl.zeros((ROWS, CELLS), dtype)
    total = tl.zeros((ROWS, CELLS), dtype)
    for start in range(0, chunks * group, CELLS):
        part, channel, inside = _cells_of(row, start, rows, channels, chunks, group, CELLS)
        place = part.to(tl.int64) * channels + channel
        a = tl.load(PARTIAL + place, inside, other=0.0)
        b = tl.load(PARTIAL + parts.to(tl.int64) * channels + place, inside, other=0.0)
        if WEIGHT is not None:
            weight = read(WEIGHT, channel, inside)
            a, b = a * weight, b * weight
        along += a
        total += b
    tl.store(ALONG + row, tl.sum(along, 1) / n, row < rows)
    tl.store(TOTAL + row, tl.sum(total, 1) / n, row < rows)


@kernel
def _input(
    DY, X, WEIGHT, MEAN, RSTD, ALONG, TOTAL, DX, channels, inner, per, length, size, chunks, blocks,
    group, s_n, s_c, s_s,
    STAGES: tl.constexpr, WIDE: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx."""
    _, first, last, channel, row = _cell(channels, length, size, chunks, blocks, group, CHANNELS)
    exists = channel < channels
    mean, rstd = read(MEAN, row, exists)[:, None], read(RSTD, row, exists)[:, None]
    along, total = read(ALONG, row, exists)[:, None], read(TOTAL, row, exists)[:, None]
    weight = _of_channel(WEIGHT, channel, exists, 1.0)
    for tile in tl.range(first, last, num_stages=STAGES):
        place, inside = _tile(tile, channel, channels, inner, per, s_n, s_c, s_s, WIDE, BLOCK)
        unit = (read(X, place, inside) - mean) * rstd
        g = read(DY, place, inside) * weight
        write(DX, place, inside, rstd * (g - total - unit * along))


class Plan(NamedTuple):
    """The launches of one shape, and the sizes of what they write."""

    moments: Launch
    statistics: Launch
    normalise: Launch
    sums: Launch
    sums_of_groups: Launch
    input: Launch
    parts: int
    rows: int


@planned
def plan(
    shape: tuple[int, int, int], strides: tuple[int, int, int], groups: int, dtype: torch.dtype,
    count: int, eps: float | None, frozen: bool
) -> Plan:  # fmt: skip
    """Of x (N, C, S) in memory of these strides on ``count`` multiprocessors; ``groups``: of a
    sample, or 0: a channel is one, over the batch. If ``frozen``, variances are given."""
    (samples, channels, inner), (s_n, s_c, s_s) = shape, strides
    spans, group = (samples, channels // groups) if groups else (1, 1)
    most, a_thread = (1024, 8) if dtype == torch.float64 else (2048, 16)
    # a tile runs along whichever is contiguous
    if s_c == 1 and channels > 1:
        wide = min(next_power_of_2(channels), 128 // dtype.itemsize)
        block = min(next_power_of_2(inner), most // wide)
    else:
        block = min(next_power_of_2(inner), most)
    wide = min(next_power_of_2(channels), most // block)
    # neighbours that a thread reads at once
    at_once = 16 // dtype.itemsize if s_s == 1 and inner % 16 == 0 else 1
    per, blocks = cdiv(inner, block), cdiv(channels, wide)
    length = per if groups else samples * per
    size = cdiv(length, min(length, cdiv(RESIDENT * count, spans * blocks)))
    chunks = cdiv(length, size)
    parts, rows = spans * chunks, spans * (channels // group)
    cells = min(next_power_of_2(chunks * group), 128)
    tall = min(next_power_of_2(rows), 512 // cells, 64)
    warps = max(wide * block // (32 * a_thread), 1)
    wide_offsets = far(samples * channels * inner)  # of two registers: none are left to load ahead
    named: dict[str, Any] = {
        "channels": channels, "inner": inner, "per": per, "length": length, "size": size,
        "chunks": chunks, "blocks": blocks, "group": group, "parts": parts, "rows": rows,
        "n": inner * group * (1 if groups else samples), "s_n": s_n, "s_c": s_c, "s_s": s_s,
        "EPS": eps, "STAGES": 1 if wide_offsets else stages_of(dtype), "WIDE": wide_offsets,
        "CHANNELS": wide, "BLOCK": block, "AT_ONCE": at_once, "ROWS": tall, "CELLS": cells,
    }  # fmt: skip

    def launch(kernel: Kernel, programs: int, warps: int, **own: Any) -> Launch:
        taken = {k: v for k, v in named.items() if k in kernel.numbers + kernel.constexprs}
        return kernel.launch(programs, num_warps=warps, **{**taken, **own})

    # a division of float64 is a call, across which few registers live
    few, of_rows = max(tall * cells // 128, 1), cdiv(rows, tall)
    given = eps if frozen else None  # r is given else
    return Plan(
        launch(_moments, parts * blocks, warps),
        launch(_statistics, of_rows, few),
        launch(_normalise, parts * blocks, warps, EPS=given),
        launch(_sums, parts * blocks, warps, EPS=given),
        launch(_sums_of_groups, of_rows, few),
        launch(_input, parts * blocks, warps),
        parts,
        rows,
    )


def _without_gaps(t: Tensor, last: bool) -> Tensor:
    return t.movedim(1, -1).contiguous().movedim(-1, 1) if last else t.contiguous()


def _dense(x: Tensor) -> tuple[Tensor, bool]:
    """x (N, C, *) without gaps in memory, and whether its channels are last there."""
    last = x.dim() > 3 and not x.is_contiguous() and x.movedim(1, -1).is_contiguous()
    return _without_gaps(x, last), last


def _sizes(x: Tensor) -> tuple[int, int, int]:
    """(N, C, S)"""
    return x.shape[0], x.shape[1], x.shape[2:].numel()


def _read_once(x: Tensor, last: bool, groups: int) -> bool:
    """Whether each of its groups lies in one piece, as none of a batch does, nor where channels
    are last; and fits a block."""
    _, channels, inner = _sizes(x)
    return groups > 0 and not last and group_norm.fits(channels // groups, inner, x.dtype)


def _plan(
    x: Tensor, last: bool, groups: int, eps: float | None = None, frozen: bool = False
) -> Plan:
    """The plan of x (N, C, *), whose channels may be the last in memory."""
    samples, channels, inner = _sizes(x)
    numbers, runs_along_channels = channels * inner, last or inner == 1
    if runs_along_channels and not groups:  # a sample continues the one before
        samples, inner = 1, samples * inner
    strides = (numbers, 1, channels) if runs_along_channels else (numbers, inner, 1)
    shape, count = (samples, channels, inner), multiprocessors(x.device)
    return plan(shape, strides, groups, x.dtype, count, eps, frozen)


def _contiguous(*tensors: Any) -> Any:
    """What has one number a channel or a group."""
    return [None if t is None else t.contiguous() for t in tensors]


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float,
    variance: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y, μ and r; and the unbiased variance, in ``variance``."""
    shape = (x.shape[0], groups) if groups else x.shape[1:2]
    mean, rstd = partial_sums(x, *shape), partial_sums(x, *shape)
    if not x.numel():
        return torch.empty_like(x), mean.zero_(), rstd.zero_()
    x, last = _dense(x)
    y, parameters = torch.empty_like(x), _contiguous(weight, bias)
    if _read_once(x, last, groups):
        whole = group_norm.plan_forward(*_sizes(x), groups, x.dtype, eps)
        whole(x, *parameters, y, mean, rstd)
        return y, mean, rstd
    run = _plan(x, last, groups, eps)
    partial = partial_sums(x, 2, run.parts, x.shape[1])
    run.moments(x, partial)
    run.statistics(partial, mean, rstd, variance)
    run.normalise(x, *parameters, mean, rstd, y)
    return y, mean, rstd


def backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, groups: int,
    need_x: bool, need_weight: bool, need_bias: bool, eps: float | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """dx, dw and db; None for each that is not needed. With an ``eps``, μ and r are constants, and
    ``rstd`` is a variance."""
    frozen, like = eps is not None, x if weight is None else weight
    some = x.numel() > 0
    made = like.new_empty if some else like.new_zeros
    dw, db = (made(x.shape[1]) if need else None for need in (need_weight, need_bias))
    if not some:
        return torch.empty_like(x) if need_x else None, dw, db
    x, last = _dense(x)
    dy, dx = _without_gaps(dy, last), torch.empty_like(x) if need_x else None
    weight, mean, rstd = _contiguous(weight, mean, rstd)
    partial, sums = None, need_weight or need_bias
    if _read_once(x, last, groups):
        count = multiprocessors(x.device)
        once, parts = group_norm.plan_backward(*_sizes(x), groups, x.dtype, count, sums)
        partial = partial_sums(x, 2, parts, x.shape[1]) if sums else None
        once(dy, x, weight, mean, rstd, dx, partial)
    else:
        run = _plan(x, last, groups, eps, frozen)
        if sums or not frozen:
            partial = partial_sums(x, 2, run.parts, x.shape[1])
        run.sums(dy, x, weight, mean, rstd, partial, dx if frozen else None)
        if need_x and not frozen:
            along, total = partial_sums(x, run.rows), partial_sums(x, run.rows)
            run.sums_of_groups(partial, weight, along, total)
            run.input(dy, x, weight, mean, rstd, along, total, dx)
    if sums and partial is not None:
        wanted = slice(0 if need_weight else 1, 2 if need_bias else 1)
        column_sum(partial[wanted], *[g for g in (dw, db) if g is not None])
    return dx, dw, db


def batch_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, and of each channel μ, the unbiased variance and r."""
    variance = torch.zeros_like(partial_sums(x, x.shape[1]))
    y, mean, rstd = forward(x, weight, bias, 0, eps, variance)
    return y, mean, variance, rstd


def batch_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, *needs: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx, dw and db; None for each that is not needed."""
    return backward(dy, x, weight, mean, rstd, 0, *needs)


def batch_input(
    dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, along: Tensor,
    total: Tensor,
) -> Tensor:  # fmt: skip
    """dx, given Σ g x̂ / n and Σ g / n, which may be of more samples than there are here."""
    if not x.numel():
        return torch.empty_like(x)
    x, last = _dense(x)
    dy, dx = _without_gaps(dy, last), torch.empty_like(x)
    _plan(x, last, 0).input(dy, x, *_contiguous(weight, mean, rstd, along, total), dx)
    return dx


def frozen_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, variance: Tensor,
    eps: float,
) -> Tensor:  # fmt: skip
    """y, in one pass."""
    if not x.numel():
        return torch.empty_like(x)
    x, last = _dense(x)
    y = torch.empty_like(x)
    _plan(x, last, 0, eps, True).normalise(x, *_contiguous(weight, bias, mean, variance), y)
    return y


def frozen_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, variance: Tensor, eps: float,
    need_x: bool, need_weight: bool, need_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """dx, dw and db, in one pass; None for each that is not needed."""
    return backward(dy, x, weight, mean, variance, 0, need_x, need_weight, need_bias, eps)

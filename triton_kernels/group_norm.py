"""group_norm and instance_norm of groups that fit a block: x is read once, and in backward dy too.

A group is a row of C / G channels of S numbers, side by side in memory. A tile is ROWS such rows,
and each line of it is a channel: (ROWS * GROUP, BLOCK), GROUP and BLOCK the powers of 2 from C / G
and S on. So a sum along a line is a channel's, which dw and db need, and the sum of a row's lines
is a group's. Longer groups: ``channel_norm.py``. Formulas:
``custom_backprop/formulas/channel_norm.py``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from .launch import Launch, cdiv, kernel, next_power_of_2, planned
from .rows import far, read, row_config, write

#: programs that backward is cut into where it adds up over samples, as many as a multiprocessor has
#: at once; and the numbers that it needs for each element at once
RESIDENT, LIVE = 6, 4


@triton.jit
def _tile(
    tile, rows, group, inner,
    WIDE: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(numbers of the lines' channels among those of all samples, which of them exist, offsets,
    which of these exist)."""
    line, s = tl.arange(0, ROWS * GROUP), tl.arange(0, BLOCK)
    row = tile * tl.full((), ROWS, tl.int64 if WIDE else tl.int32) + line // GROUP
    cell, exists = row * group + line % GROUP, (row < rows) & (line % GROUP < group)
    return cell, exists, cell[:, None] * inner + s[None, :], exists[:, None] & (s < inner)[None, :]


@triton.jit
def _of_group(t, ROWS: tl.constexpr, GROUP: tl.constexpr):
    """Σ over the lines of each row, for each of its lines."""
    total = tl.sum(tl.reshape(t, (ROWS, GROUP)), 1)[:, None]
    return tl.reshape(tl.broadcast_to(total, (ROWS, GROUP)), (ROWS * GROUP,))


@kernel
def _forward(
    X, WEIGHT, BIAS, Y, MEAN, RSTD, rows, channels, group, inner,
    EPS: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """y, and μ and r of each group."""
    cell, exists, place, inside = _tile(
        tl.program_id(0), rows, group, inner, WIDE, ROWS, GROUP, BLOCK
    )
    n, channel, first = group * inner, cell % channels, exists & (cell % group == 0)
    x = read(X, place, inside)
    mean = _of_group(tl.sum(x, 1), ROWS, GROUP) / n
    d = tl.where(inside, x - mean[:, None], 0.0)
    rstd = 1 / tl.sqrt(_of_group(tl.sum(d * d, 1), ROWS, GROUP) / n + EPS)
    y = d * rstd[:, None]
    if WEIGHT is not None:
        y *= read(WEIGHT, channel, exists)[:, None]
    if BIAS is not None:
        y += read(BIAS, channel, exists)[:, None]
    write(Y, place, inside, y)
    tl.store(MEAN + cell // group, mean, first)
    tl.store(RSTD + cell // group, rstd, first)


@kernel
def _backward(
    DY, X, WEIGHT, MEAN, RSTD, DX, PARTIAL, rows, channels, group, inner, tiles,
    WIDE: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx; and Σ dy x̂ and Σ dy of the channels in each line, whose rows are so many apart that they
    are the same channel of several samples."""
    dtype: tl.constexpr = tl.float64 if X.dtype.element_ty == tl.float64 else tl.float32
    program, n = tl.program_id(0), group * inner
    dw = tl.zeros((ROWS * GROUP,), dtype)
    db = tl.zeros((ROWS * GROUP,), dtype)
    for tile in range(program, tiles, tl.num_programs(0)):
        cell, exists, place, inside = _tile(tile, rows, group, inner, WIDE, ROWS, GROUP, BLOCK)
        rstd = read(RSTD, cell // group, exists)
        unit = (read(X, place, inside) - read(MEAN, cell // group, exists)[:, None]) * rstd[:, None]
        dy = read(DY, place, inside)
        along, total = tl.sum(dy * unit, 1), tl.sum(dy, 1)
        dw += along
        db += total
        if DX is not None:
            if WEIGHT is not None:
                weight = read(WEIGHT, cell % channels, exists)
                dy, along, total = dy * weight[:, None], along * weight, total * weight
            along = _of_group(along, ROWS, GROUP) / n
            total = _of_group(total, ROWS, GROUP) / n
            dx = (dy - total[:, None] - unit * along[:, None]) * rstd[:, None]
            write(DX, place, inside, dx)
    if PARTIAL is not None:
        cell, _, _, _ = _tile(program, rows, group, inner, WIDE, ROWS, GROUP, BLOCK)
        sums = tl.num_programs(0).to(tl.int64) * ROWS * group
        exists = tl.arange(0, ROWS * GROUP) % GROUP < group
        tl.store(PARTIAL + cell, dw, exists)
        tl.store(PARTIAL + sums + cell, db, exists)


@planned
def fits(group: int, inner: int, dtype: torch.dtype) -> bool:
    """Whether groups of so many channels of ``inner`` numbers are read once."""
    numbers = next_power_of_2(group) * next_power_of_2(inner)
    return row_config(numbers, 1, dtype, LIVE).block == numbers


def _named(samples: int, channels: int, inner: int, groups: int, dtype: torch.dtype) -> Any:
    """What both launches take, and the number of tiles."""
    group, rows = channels // groups, samples * groups
    wide, block = next_power_of_2(group), next_power_of_2(inner)
    c = row_config(wide * block, 1, dtype, LIVE)
    return cdiv(rows, c.rows), {
        "rows": rows, "channels": channels, "group": group, "inner": inner,
        "WIDE": far(rows * group * inner), "ROWS": c.rows, "GROUP": wide, "BLOCK": block,
        "num_warps": c.num_warps,
    }  # fmt: skip


@planned
def plan_forward(
    samples: int, channels: int, inner: int, groups: int, dtype: torch.dtype, eps: float
) -> Launch:
    """Of x (N, C, S)."""
    tiles, named = _named(samples, channels, inner, groups, dtype)
    return _forward.launch(tiles, EPS=eps, **named)


@planned
def plan_backward(
    samples: int, channels: int, inner: int, groups: int, dtype: torch.dtype, count: int, sums: bool
) -> tuple[Launch, int]:
    """On ``count`` multiprocessors; and how many partial sums a channel has, if ``sums`` are
    wanted."""
    tiles, named = _named(samples, channels, inner, groups, dtype)
    programs, rows = tiles, named["ROWS"]
    if sums:  # tiles that begin at the same group of a sample are a multiple of these apart
        apart = groups // math.gcd(groups, rows)
        programs = min(cdiv(tiles, apart), cdiv(RESIDENT * count, apart)) * apart
    return _backward.launch(programs, tiles=tiles, **named), programs * rows // groups

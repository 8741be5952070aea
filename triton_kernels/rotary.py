"""rotary_embedding: one kernel, forward and backward.

x is (batch, heads, seq, dim), with any strides. A program reads the cosines and sines of a tile of
positions once, and turns the rows of several heads by them: while it does one, the next is on its
way to shared memory (``num_stages``). Formula: ``custom_backprop/formulas/rotary.py``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, cdiv, kernel, multiprocessors, next_power_of_2, planned
from .rows import RESIDENT, read, write


@triton.jit
def _start(image, heads, batch_stride, head_stride):
    """The offset of one head of one batch."""
    batch, head = image // heads, image % heads
    return batch.to(tl.int64) * batch_stride + head.to(tl.int64) * head_stride


@kernel
def _rotate(
    X, COS, SIN, POSITIONS, Y, offset, seq, half, dim, count, heads, members, splits, p_batch,
    x_batch, x_head, x_row, x_column, y_batch, y_head, y_row, y_column,
    INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y = x turned by ±φ. A group is the heads that share positions; every ``splits``-th of its
    members is turned by one program."""
    tiles = tl.cdiv(seq, ROWS)
    row = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    alive = (row < seq)[:, None]
    row = row.to(tl.int64)
    split = tl.program_id(0) // tiles % splits
    group = tl.program_id(0) // tiles // splits
    position = row
    if POSITIONS is not None:
        position = tl.load(POSITIONS + group.to(tl.int64) * p_batch + row, row < seq, other=0)
    position = (position.to(tl.int64) + offset)[:, None]
    row = row[:, None]
    known = (position >= 0) & (position < count)
    for start in range(0, half, BLOCK):
        pair = start + tl.arange(0, BLOCK)[None, :]
        inside = alive & (pair < half)
        cos = read(COS, position * half + pair, inside & known, float("nan"))
        sin = read(SIN, position * half + pair, inside & known, float("nan"))
        if INVERSE:
            sin = -sin
        for member in tl.range(split, members, splits, num_stages=2):
            x = X + _start(group * members + member, heads, x_batch, x_head)
            y = Y + _start(group * members + member, heads, y_batch, y_head)
            if INTERLEAVED:
                column = 2 * start + tl.arange(0, 2 * BLOCK)[None, :]
                both = alive & (column < 2 * half)
                ab = read(x, row * x_row + column * x_column, both)
                a, b = tl.split(tl.reshape(ab, (ROWS, BLOCK, 2)))
                ab = tl.join(a * cos - b * sin, a * sin + b * cos)
                write(y, row * y_row + column * y_column, both, tl.reshape(ab, (ROWS, 2 * BLOCK)))
            else:
                a = read(x, row * x_row + pair * x_column, inside)
                b = read(x, row * x_row + (pair + half) * x_column, inside)
                write(y, row * y_row + pair * y_column, inside, a * cos - b * sin)
                write(y, row * y_row + (pair + half) * y_column, inside, a * sin + b * cos)
    for start in range(2 * half, dim, BLOCK):
        column = start + tl.arange(0, BLOCK)[None, :]
        inside = alive & (column < dim)
        for member in tl.range(split, members, splits, num_stages=2):
            x = X + _start(group * members + member, heads, x_batch, x_head)
            y = Y + _start(group * members + member, heads, y_batch, y_head)
            write(
                y, row * y_row + column * y_column, inside,
                read(x, row * x_row + column * x_column, inside),
            )  # fmt: skip


@planned
def plan(
    shape: tuple[int, ...], x_strides: tuple[int, ...], y_strides: tuple[int, ...],
    table: tuple[int, int], p_batch: int, interleaved: bool, inverse: bool, dtype: torch.dtype,
    count: int,
) -> Launch:  # fmt: skip
    """Of x and y with these strides. Where ``p_batch`` is 0, all batches share the positions."""
    batch, heads, seq, dim = shape
    # pairs: one 128-bit access to each half. Where each number has an address of its own, a thread
    # has registers for a quarter as many
    a_thread = max(16 // dtype.itemsize // (4 if table[1] % 16 else 1), 1)
    block = min(next_power_of_2(table[1]), 128 * a_thread)
    tile = min(next_power_of_2(seq), 128 * a_thread // block)
    groups = batch if p_batch else 1
    members, tiles = batch * heads // groups, cdiv(seq, tile)
    # to read the tables again for each head would be half as much traffic as x and y
    splits = min(cdiv(members, 8), cdiv(RESIDENT * count, tiles * groups))
    names = ("batch", "head", "row", "column")
    return _rotate.launch(
        tiles * groups * splits, seq=seq, half=table[1], dim=dim, count=table[0], heads=heads,
        members=members, splits=splits, p_batch=p_batch, INTERLEAVED=interleaved, INVERSE=inverse,
        ROWS=tile, BLOCK=block, num_warps=max(tile * block // (32 * a_thread), 1),
        **dict(zip([f"x_{n}" for n in names], x_strides, strict=True)),
        **dict(zip([f"y_{n}" for n in names], y_strides, strict=True)),
    )  # fmt: skip


def _view(t: Tensor) -> Tensor:
    """(batch, heads, seq, dim) of at most these."""
    return t if t.dim() == 4 else t.unsqueeze(1) if t.dim() == 3 else t[None, None]


def rotate(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, offset: int, interleaved: bool,
    inverse: bool,
) -> Tensor:  # fmt: skip
    """y, with the strides of x where they are dense."""
    y = torch.empty_like(x)
    if x.numel():
        v, to = _view(x), _view(y)
        p_batch = 0
        if positions is not None:
            positions = positions.contiguous()
            p_batch = positions.stride(0) if positions.dim() == 2 and positions.shape[0] > 1 else 0
        run = plan(
            v.shape, v.stride(), to.stride(), cos.shape, p_batch, interleaved, inverse, x.dtype,
            multiprocessors(x.device),
        )  # fmt: skip
        run(v, cos.contiguous(), sin.contiguous(), positions, to, offset=offset)
    return y

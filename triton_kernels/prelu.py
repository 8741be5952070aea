"""The parametric ReLU: one elementwise pass each way, dw by a sum in two stages along the second.

A dense tensor of any order of dimensions is, as it lies in memory, (outer, channels, inner) with
inner the stride of the channels. A step takes O x C x I elements of it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, cdiv, kernel, multiprocessors, next_power_of_2, planned
from .pointwise import BLOCK, block_for, like
from .rows import column_sum, partial_sums, read, write


@triton.jit
def _tile(step, tile, outer, channels, inner, O: tl.constexpr, C: tl.constexpr, I: tl.constexpr):
    """(channel, offset, inside) of step ``step`` through outer x inner, for the channels of
    ``tile``: O x (C I) elements."""
    steps = tl.cdiv(inner, I)
    o = (step // steps).to(tl.int64) * O + tl.arange(0, O)
    c = tile * C + tl.arange(0, C * I) // I
    i = (step % steps).to(tl.int64) * I + tl.arange(0, C * I) % I
    inside = (o < outer)[:, None] & ((c < channels) & (i < inner))[None, :]
    return c, (o * channels * inner)[:, None] + (c.to(tl.int64) * inner + i)[None, :], inside


@kernel
def _forward(
    X, W, Y, outer, channels, inner, tiles, O: tl.constexpr, C: tl.constexpr, I: tl.constexpr
):
    """y = x where x > 0, else w x."""
    step, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    c, place, inside = _tile(step, tile, outer, channels, inner, O, C, I)
    w = read(W, c, c < channels)[None, :]
    x = read(X, place, inside)
    write(Y, place, inside, tl.where(x > 0, x, w * x))


@kernel
def _backward(
    DY, X, W, DX, PARTIAL, outer, channels, inner, tiles, steps,
    NEED_X: tl.constexpr, NEED_W: tl.constexpr, O: tl.constexpr, C: tl.constexpr, I: tl.constexpr,
):  # fmt: skip
    """dx = dy where x > 0, else w dy, over ``steps`` steps; and Σ dy x [x <= 0] of these steps in
    PARTIAL[part]."""
    part, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    wide = tl.float64 if X.dtype.element_ty == tl.float64 else tl.float32
    sums = tl.zeros((O, C * I), dtype=wide)
    for step in range(part * steps, part * steps + steps):
        c, place, inside = _tile(step, tile, outer, channels, inner, O, C, I)
        dy = read(DY, place, inside)
        x = read(X, place, inside)
        if NEED_X:
            w = read(W, c, c < channels)[None, :]
            write(DX, place, inside, tl.where(x > 0, dy, w * dy))
        if NEED_W:
            sums += tl.where(x > 0, 0.0, dy * x)
    if NEED_W:
        c = tile * C + tl.arange(0, C)
        of_channels = tl.sum(tl.reshape(tl.sum(sums, 0), (C, I)), 1)
        tl.store(PARTIAL + part.to(tl.int64) * channels + c, of_channels, c < channels)


def _view(dense: Tensor, weight: Tensor) -> tuple[int, int, int]:
    """(outer, channels, inner)."""
    if weight.numel() == 1:
        return 1, 1, dense.numel()
    channels, inner = dense.shape[1], dense.stride(1)
    return dense.numel() // (channels * inner), channels, inner


@planned
def plan(
    backward: bool, outer: int, channels: int, inner: int, dtype: torch.dtype, count: int,
    need_x: bool, need_w: bool,
) -> Launch:  # fmt: skip
    """A pass over (outer, channels, inner), on ``count`` multiprocessors: 128 elements or more in a
    line, as far as the shape has them, and a block in all: in backward, which reads two tensors, a
    smaller one."""
    block = BLOCK if backward else block_for(dtype)
    i = min(next_power_of_2(inner), block)
    c = min(next_power_of_2(channels), max(1, 128 // i))
    o = min(next_power_of_2(outer), block // (c * i))
    tiles, all_steps = cdiv(channels, c), cdiv(outer, o) * cdiv(inner, i)
    numbers = {"outer": outer, "channels": channels, "inner": inner, "tiles": tiles}
    if not backward:
        return _forward.launch(tiles * all_steps, **numbers, O=o, C=c, I=i)
    steps = cdiv(all_steps, cdiv(4 * count, tiles)) if need_w else 1
    parts = cdiv(all_steps, steps)
    return _backward.launch(
        parts * tiles, **numbers, steps=steps, NEED_X=need_x, NEED_W=need_w, O=o, C=c, I=i
    )


def forward(x: Tensor, weight: Tensor) -> Tensor:
    """y in the dtype of x, and in its strides if they have neither gaps nor overlaps."""
    y = torch.empty_like(x)
    if y.numel():
        run = plan(False, *_view(y, weight), x.dtype, multiprocessors(x.device), False, False)
        run(like(x, y), weight.contiguous(), y)
    return y


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, need_x: bool, need_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """dx in the strides of x, dw in the weight's shape; None for one that is not needed."""
    dx = torch.empty_like(x)
    if x.numel() == 0:
        return dx, torch.zeros_like(weight)
    count = multiprocessors(x.device)
    run = plan(True, *_view(dx, weight), x.dtype, count, need_x, need_weight)
    partial = dw = None
    if need_weight:
        parts = run.programs // run.numbers["tiles"]
        dw = torch.empty_like(weight)
        partial = partial_sums(dx, 1, parts, run.numbers["channels"])
    run(like(dy, dx), like(x, dx), weight.contiguous(), dx if need_x else None, partial)
    if partial is not None and dw is not None:
        column_sum(partial, dw)
    return dx if need_x else None, dw

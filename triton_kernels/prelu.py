"""The parametric ReLU: one elementwise pass each way, dw by a sum in two stages along the second.

A dense tensor of any order of dimensions is, as it lies in memory, (outer, channels, inner) with
inner the stride of the channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import BLOCK, like
from .elementary import upcast
from .launch import accumulator, cdiv, launch, multiprocessors, next_power_of_2


@triton.jit
def _tile(step, tile, outer, channels, inner, O: tl.constexpr, C: tl.constexpr, I: tl.constexpr):
    """(channel, offset, inside) of step ``step`` through outer x inner, for the channels of
    ``tile``: O x (C I) elements."""
    steps = tl.cdiv(inner, I)
    o = (step // steps).to(tl.int64) * O + tl.arange(0, O)
    c = tile * C + tl.arange(0, C * I) // I
    i = (step % steps) * I + tl.arange(0, C * I) % I
    inside = (o < outer)[:, None] & ((c < channels) & (i < inner))[None, :]
    return c, (o * channels * inner)[:, None] + (c.to(tl.int64) * inner + i)[None, :], inside


@triton.jit
def _forward(
    X, W, Y, outer, channels, inner, tiles, O: tl.constexpr, C: tl.constexpr, I: tl.constexpr
):
    """y = x where x > 0, else w x."""
    c, place, inside = _tile(
        tl.program_id(0) // tiles, tl.program_id(0) % tiles, outer, channels, inner, O, C, I
    )
    w = upcast(tl.load(W + c, c < channels, other=0.0))
    x = upcast(tl.load(X + place, inside, other=0.0))
    tl.store(Y + place, tl.where(x > 0, x, w[None, :] * x).to(Y.dtype.element_ty), inside)


@triton.jit
def _backward(
    DY, X, W, DX, PARTIAL, outer, channels, inner, tiles, steps,
    NEED_X: tl.constexpr, NEED_W: tl.constexpr, O: tl.constexpr, C: tl.constexpr, I: tl.constexpr,
):  # fmt: skip
    """dx = dy where x > 0, else w dy, over ``steps`` steps; and Σ dy x [x <= 0] of these steps in
    PARTIAL[part]."""
    part, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    wide = tl.float64 if X.dtype.element_ty == tl.float64 else tl.float32
    total = tl.zeros((O, C * I), dtype=wide)
    for step in range(part * steps, part * steps + steps):
        c, place, inside = _tile(step, tile, outer, channels, inner, O, C, I)
        dy = upcast(tl.load(DY + place, inside, other=0.0))
        x = upcast(tl.load(X + place, inside, other=0.0))
        if NEED_X:
            w = upcast(tl.load(W + c, c < channels, other=0.0))
            tl.store(
                DX + place, tl.where(x > 0, dy, w[None, :] * dy).to(DX.dtype.element_ty), inside
            )
        if NEED_W:
            total += tl.where(x > 0, 0.0, dy * x)
    if NEED_W:
        c = tile * C + tl.arange(0, C)
        sums = tl.sum(tl.reshape(tl.sum(total, 0), (C, I)), 1)
        tl.store(PARTIAL + part.to(tl.int64) * channels + c, sums, c < channels)


@dataclass(frozen=True)
class Plan:
    """How a dense tensor is walked: its view (outer, channels, inner), and the tile of O x C x I
    elements of one step."""

    outer: int
    channels: int
    inner: int
    O: int
    C: int
    I: int

    @property
    def tiles(self) -> int:
        return cdiv(self.channels, self.C)

    @property
    def steps(self) -> int:
        return cdiv(self.outer, self.O) * cdiv(self.inner, self.I)


def plan(dense: Tensor, weight: Tensor) -> Plan:
    """128 elements or more in a line, as far as the shape has them, and BLOCK in all."""
    if weight.numel() == 1:
        channels, inner = 1, dense.numel()
    else:
        channels, inner = dense.shape[1], dense.stride(1)
    outer = dense.numel() // (channels * inner)
    i = min(next_power_of_2(inner), BLOCK)
    c = min(next_power_of_2(channels), max(1, 128 // i))
    return Plan(outer, channels, inner, min(next_power_of_2(outer), BLOCK // (c * i)), c, i)


def forward(x: Tensor, weight: Tensor) -> Tensor:
    """y in the dtype of x, and in its strides if they have neither gaps nor overlaps."""
    y = torch.empty_like(x)
    if y.numel() == 0:
        return y
    p = plan(y, weight)
    launch(
        _forward, p.tiles * p.steps, like(x, y), weight.contiguous(), y, p.outer, p.channels, p.inner, p.tiles, O=p.O, C=p.C, I=p.I
    )  # fmt: skip
    return y


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, need_x: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    """dx in the strides of x, dw in the weight's shape; an empty tensor for one that is not
    needed."""
    dx = torch.empty_like(x)
    if x.numel() == 0:
        return dx, torch.zeros_like(weight)
    p = plan(dx, weight)
    dy, x = like(dy, dx), like(x, dx)
    parts = min(p.steps, cdiv(4 * multiprocessors(x.device), p.tiles)) if need_weight else p.steps
    steps = cdiv(p.steps, parts)
    partial = (
        dy.new_empty(cdiv(p.steps, steps), p.channels, dtype=accumulator(dy.dtype))
        if need_weight
        else None
    )
    launch(
        _backward, cdiv(p.steps, steps) * p.tiles, dy, x, weight.contiguous(), dx if need_x else None, partial,
        p.outer, p.channels, p.inner, p.tiles, steps, NEED_X=need_x, NEED_W=need_weight, O=p.O, C=p.C, I=p.I,
    )  # fmt: skip
    dw = (
        weight.new_empty(0)
        if partial is None
        else partial.sum(0).to(weight.dtype).view(weight.shape)
    )
    return dx if need_x else dx.new_empty(0), dw

"""Softmax, softmin and log-softmax along any dimension: one kernel each way, and their launchers.

A tensor is seen as (outer, n, inner), reduced over n; a row is one (outer, inner), its number is outer index * inner + inner index. Rows next
to each other then lie next to each other in memory where inner > 1, and a tile of several rows reads whole cache lines of any dimension.
Formulas: ``custom_backprop/formulas/softmax.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import cdiv, launch, next_power_of_2


@triton.jit
def _place(row, inner, outer_stride, inner_stride):
    """The offset of a row's first element."""
    return (row // inner) * outer_stride + (row % inner) * inner_stride


@triton.jit
def _value(x, m, z, LOG: tl.constexpr):
    """y of x, with m = max x and z = Σ e^(x-m)."""
    return x - m - tl.log(z) if LOG else tl.exp(x - m) / z


@triton.jit
def _forward(
    X, Y, rows, n, inner, x_outer, x_n, x_inner,
    LOG: tl.constexpr, NEGATE: tl.constexpr, LOOP: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS rows a program, n <= BLOCK at once, or in a loop: one reading for m and z, and one, backwards, for y.

    The second reading begins with what the first read last, which is what the cache still holds of a row that is larger than its share.
    """
    row = tl.program_id(0).to(tl.int64 if WIDE else tl.int32) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK).to(row.dtype)
    dtype: tl.constexpr = tl.float64 if Y.dtype.element_ty == tl.float64 else tl.float32
    X += _place(row, inner, x_outer, x_inner)[:, None]
    Y += _place(row, inner, n * inner, 1)[:, None]
    alive = (row < rows)[:, None]
    if LOOP:
        # m and z of each lane by itself, so that no iteration waits for another warp. m starts at the lowest finite number, not at -inf, and
        # -inf adds e^-inf = 0 to z; one exponential serves both cases: x <= m adds e^(x-m), x > m scales z by e^(m-x) and adds 1.
        lowest: tl.constexpr = -1.7976931348623157e308 if dtype == tl.float64 else -3.4028234663852886e38
        m = tl.full((ROWS, BLOCK), lowest, dtype)
        z = tl.zeros((ROWS, BLOCK), dtype)
        for start in range(0, n, BLOCK):
            place = (start + column)[None, :]
            x = tl.load(X + place * x_n, alive & (place < n), other=float("inf") if NEGATE else float("-inf")).to(Y.dtype.element_ty).to(dtype)
            x = -x if NEGATE else x
            e = tl.exp(-tl.abs(x - m))
            z = tl.where(x > m, z * e + 1, z + e)
            m = tl.maximum(m, x)
        lane = m
        m = tl.max(lane, 1)[:, None]
        z = tl.sum(z * tl.exp(lane - m), 1)[:, None]
        last = tl.cdiv(n, BLOCK) * BLOCK - BLOCK
        for back in range(0, n, BLOCK):
            place = (last - back + column)[None, :]
            inside = alive & (place < n)
            x = tl.load(X + place * x_n, inside, other=0.0).to(Y.dtype.element_ty).to(dtype)
            x = -x if NEGATE else x
            tl.store(Y + place * inner, _value(x, m, z, LOG).to(Y.dtype.element_ty), inside)
    else:
        place = column[None, :]
        inside = alive & (place < n)
        x = tl.load(X + place * x_n, inside, other=float("inf") if NEGATE else float("-inf")).to(Y.dtype.element_ty).to(dtype)
        x = -x if NEGATE else x
        m = tl.max(x, 1)[:, None]
        z = tl.sum(tl.exp(x - m), 1)[:, None]
        tl.store(Y + place * inner, _value(x, m, z, LOG).to(Y.dtype.element_ty), inside)


@triton.jit
def _term(dy, y, LOG: tl.constexpr):
    """What backward sums over a row: dy, or y dy."""
    return dy if LOG else y * dy


@triton.jit
def _gradient(dy, y, total, LOG: tl.constexpr, NEGATE: tl.constexpr):
    """dx, given the row's sum."""
    dx = dy - tl.exp(y) * total if LOG else y * (dy - total)
    return -dx if NEGATE else dx


@triton.jit
def _backward(
    DY, Y, DX, rows, n, inner, dy_outer, dy_n, dy_inner,
    LOG: tl.constexpr, NEGATE: tl.constexpr, LOOP: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The same for dx: a sum over the row, then dx."""
    row = tl.program_id(0).to(tl.int64 if WIDE else tl.int32) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK).to(row.dtype)
    dtype: tl.constexpr = tl.float64 if Y.dtype.element_ty == tl.float64 else tl.float32
    DY += _place(row, inner, dy_outer, dy_inner)[:, None]
    dense = _place(row, inner, n * inner, 1)[:, None]
    Y += dense
    DX += dense
    alive = (row < rows)[:, None]
    if LOOP:
        total = tl.zeros((ROWS, BLOCK), dtype)
        for start in range(0, n, BLOCK):
            place = (start + column)[None, :]
            inside = alive & (place < n)
            dy = tl.load(DY + place * dy_n, inside, other=0.0).to(dtype)
            y = 0.0 if LOG else tl.load(Y + place * inner, inside, other=0.0).to(dtype)
            total += _term(dy, y, LOG)
        total = tl.sum(total, 1)[:, None]
        last = tl.cdiv(n, BLOCK) * BLOCK - BLOCK
        for back in range(0, n, BLOCK):
            place = (last - back + column)[None, :]
            inside = alive & (place < n)
            dy = tl.load(DY + place * dy_n, inside, other=0.0).to(dtype)
            y = tl.load(Y + place * inner, inside, other=0.0).to(dtype)
            tl.store(DX + place * inner, _gradient(dy, y, total, LOG, NEGATE).to(DX.dtype.element_ty), inside)
    else:
        place = column[None, :]
        inside = alive & (place < n)
        dy = tl.load(DY + place * dy_n, inside, other=0.0).to(dtype)
        y = tl.load(Y + place * inner, inside, other=0.0).to(dtype)
        total = tl.sum(_term(dy, y, LOG), 1)[:, None]
        tl.store(DX + place * inner, _gradient(dy, y, total, LOG, NEGATE).to(DX.dtype.element_ty), inside)


@dataclass(frozen=True)
class Config:
    """``rows`` rows by ``block`` columns a program."""

    rows: int
    block: int
    num_warps: int


#: float32 numbers that a program may hold: 64 a thread at 16 warps (the most that fit 64-wide warps too), half of a thread's registers
HELD = 32768


def config(n: int, inner: int, dtype: torch.dtype, tensors: int) -> Config:
    """The tile for rows of ``n``, ``inner`` of them side by side, in a kernel that reads ``tensors`` tensors and computes in ``dtype``."""
    held = HELD // 2 if dtype == torch.float64 else HELD
    block = next_power_of_2(n)
    # short rows: 2048 elements a program, 16 a thread. Side by side: enough of them to fill a cache line of 128 bytes
    rows = max(2048 // block, min(next_power_of_2(inner), 128 // dtype.itemsize))
    if rows * block * tensors > held:
        # 32 elements a thread, of x, m and z or of y, dy and their sum. Few and large programs: the fewer rows are under way, the more of
        # each is still in the cache at its second reading
        block = held // 2 // rows
    return Config(rows, block, min(max(rows * block // 512, 1), 16))


def _view(t: Tensor, dim: int) -> Tensor:
    """``t`` as (outer, n, inner). Copied where its strides allow no such view, and where its rows interleave: their memory runs along outer."""
    v = t.reshape(t.shape[:dim].numel(), t.shape[dim], t.shape[dim + 1 :].numel())
    return v.contiguous() if v.shape[2] == 1 and v.stride(1) > max(v.stride(0), 1) else v


def _launch(kernel: Any, name: str, read: Tensor, others: tuple[Tensor, ...], dtype: torch.dtype, tensors: int) -> None:
    """One kernel on ``read`` (outer, n, inner), of any strides, and on ``others``, which are contiguous."""
    outer, n, inner = read.shape
    c = config(n, inner, dtype, tensors)
    extent = max(read.numel(), sum((size - 1) * stride for size, stride in zip(read.shape, read.stride(), strict=True)))
    launch(
        kernel, cdiv(outer * inner, c.rows), read, *others, outer * inner, n, inner, *read.stride(),
        LOG=name == "log_softmax", NEGATE=name == "softmin", LOOP=n > c.block,
        WIDE=extent >= 2**30,  # half of what int32 holds: the masked end of the last tile needs room too
        ROWS=c.rows, BLOCK=c.block, num_warps=c.num_warps,
    )  # fmt: skip


def forward(name: str, x: Tensor, dim: int, dtype: torch.dtype | None) -> Tensor:
    """y, contiguous, of x cast to ``dtype``."""
    y = x.new_empty(x.shape, dtype=dtype)
    if x.numel():
        _launch(_forward, name, _view(x, dim), (y,), y.dtype, 1)
    return y


def backward(name: str, dy: Tensor, y: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """dx, contiguous, in ``dtype``."""
    dx = y.new_empty(y.shape, dtype=dtype)
    if y.numel():
        _launch(_backward, name, _view(dy, dim), (y.contiguous(), dx), y.dtype, 2)
    return dx

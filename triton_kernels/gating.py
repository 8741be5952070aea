"""Gates y = f(a) b: one pass each way, on rows of a and b with strides of their own.

The halves of a tensor along a dimension are such rows, so that no half is copied and dx is written
in place. Formulas: ``custom_backprop/formulas/gating.py``.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import DEVICE_FUNCTIONS, SAVES_OUTPUT
from .elementary import half
from .launch import Launch, cdiv, kernel, next_power_of_2, planned
from .pointwise import grid
from .rows import read, write


@triton.jit
def _tile(rows, n, blocks, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """(rows in int64, columns, inside) of a program's tile."""
    row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return row[:, None], column[None, :], (row < rows)[:, None] & (column < n)[None, :]


@kernel
def _forward(
    A, B, Y, rows, n, blocks, a_row, b_row,
    F: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y = f(a) b."""
    row, column, inside = _tile(rows, n, blocks, ROWS, BLOCK)
    y = F(read(A, row * a_row + column, inside), P, Q, half(A))
    write(Y, row * n + column, inside, y * read(B, row * b_row + column, inside))


@kernel
def _backward(
    DY, A, B, DA, DB, rows, n, blocks, a_row, b_row, da_row,
    F: tl.constexpr, D: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, OF_OUTPUT: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """da = dy b f'(a) and db = dy f(a), each where it is wanted."""
    row, column, inside = _tile(rows, n, blocks, ROWS, BLOCK)
    dy = read(DY, row * n + column, inside)
    a = read(A, row * a_row + column, inside)
    y = F(a, P, Q, half(A))
    if DA is not None:
        b = read(B, row * b_row + column, inside)
        write(DA, row * da_row + column, inside, dy * b * D(y if OF_OUTPUT else a, P, Q, half(A)))
    if DB is not None:
        write(DB, row * da_row + column, inside, dy * y)


@planned
def plan(
    backward: bool, f: str, rows: int, n: int, strides: tuple[int, ...], dtype: torch.dtype
) -> Launch:
    """Of (rows, n), with the strides of the rows of a, b and their gradients."""
    of_block = grid(rows * n, dtype)
    size, warps = of_block["BLOCK"], of_block["num_warps"]
    block = min(next_power_of_2(n), size)
    tile, blocks = min(next_power_of_2(rows), size // block), cdiv(n, block)
    value, derivative, p, q = (*DEVICE_FUNCTIONS[f], None, None)[:4]
    named: dict[str, Any] = {"F": value, "P": p, "Q": q, "ROWS": tile, "BLOCK": block}
    if backward:
        named.update(D=derivative, OF_OUTPUT=f in SAVES_OUTPUT, da_row=strides[2])
    return (_backward if backward else _forward).launch(
        cdiv(rows, tile) * blocks, rows=rows, n=n, blocks=blocks, a_row=strides[0],
        b_row=strides[1], **named, num_warps=warps,
    )  # fmt: skip


def _views(x: Tensor, b: Tensor | None, dim: int, gate_first: bool) -> tuple[Tensor, Tensor]:
    """a and b as rows, of contiguous tensors."""
    if b is not None:
        return x.view(1, -1), b.view(1, -1)
    first, second = x.view(x.shape[:dim].numel(), -1).chunk(2, 1)
    return (first, second) if gate_first else (second, first)


def forward(x: Tensor, b: Tensor | None, dim: int, gate_first: bool, f: str) -> Tensor:
    """y, contiguous."""
    x, b = x.contiguous(), None if b is None else b.contiguous()
    shape = list(x.shape)
    if b is None:
        shape[dim] //= 2
    y = x.new_empty(shape)
    if y.numel():
        a, b = _views(x, b, dim, gate_first)
        plan(False, f, *a.shape, (a.stride(0), b.stride(0)), x.dtype)(a, b, y)
    return y


def backward(
    dy: Tensor, x: Tensor, b: Tensor | None, dim: int, gate_first: bool, f: str,
    need_a: bool, need_b: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """da and db, or dx of halves; None for what is not needed."""
    dy, x, b = dy.contiguous(), x.contiguous(), None if b is None else b.contiguous()
    dx = torch.empty_like(x) if need_a else None
    db = torch.empty_like(b) if need_b and b is not None else None
    if dy.numel():
        a, value = _views(x, b, dim, gate_first)
        to_a, to_b = dx, db
        if dx is not None and b is None:
            to_a, to_b = _views(dx, None, dim, gate_first)
        strides = a.stride(0), value.stride(0), a.stride(0)
        plan(True, f, *a.shape, strides, x.dtype)(dy, a, value, to_a, to_b)
    return dx, db


def backward_(dy: Tensor, a: Tensor, b: Tensor, f: str) -> tuple[Tensor, Tensor]:
    """da, written over dy, which is contiguous and the caller's own, and db."""
    a, b = a.contiguous(), b.contiguous()
    db, n = torch.empty_like(b), dy.numel()
    if n:
        plan(True, f, 1, n, (n, n, n), dy.dtype)(dy, a, b, dy, db)
    return dy, db

"""The linear layer: launchers around the products, and one pass for dz and the column sums of db.

The products are the vendor's unless ``ours``: on an H100 that was the faster one by a quarter or
more, and with the activation in our epilogue still (``python -m benchmarks.products``).

An activation is a pass of its own over the product, in place where the derivative needs y alone.
``torch._addmm_activation`` would save that pass for relu, by cuBLASLt's epilogue. It is not called:
cuBLASLt documents max(x, 0), and not that NaN stays NaN as in torch's relu. The same benchmark
shows on a card what it saves, and whether it loses NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from . import activation as activations
from .elementary import half
from .launch import Launch, cdiv, kernel, multiprocessors, planned
from .matmul import product
from .rows import column_sum, partial_sums, read, write


@kernel
def _columns(
    DY, SAVED, DZ, PARTIAL, m, n, rows,
    NEED_BIAS: tl.constexpr, F: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """dz = dy f'(saved) for a range of rows and N columns a program, and the sum of dz over that
    range in PARTIAL[range]."""
    tiles_n = tl.cdiv(n, N)
    part = (tl.program_id(0) // tiles_n).to(tl.int64)
    column = (tl.program_id(0) % tiles_n) * N + tl.arange(0, N)
    wide = tl.float64 if DY.dtype.element_ty == tl.float64 else tl.float32
    # each thread adds up its own, so that no iteration waits for another's
    sums = tl.zeros((M, N), dtype=wide)
    for first in range(0, rows, M):
        mine = first + tl.arange(0, M)
        row = part * rows + mine
        inside = ((mine < rows) & (row < m))[:, None] & (column < n)[None, :]
        place = row[:, None] * n + column[None, :]
        dz = read(DY, place, inside)
        if F is not None:
            dz *= F(read(SAVED, place, inside), A, B, half(SAVED))
            write(DZ, place, inside, dz)
        if NEED_BIAS:
            sums += tl.where(inside, dz, 0.0)
    if NEED_BIAS:
        total = tl.sum(sums, 0)
        tl.store(PARTIAL + part * n + column, total.to(PARTIAL.dtype.element_ty), column < n)


#: rows whose columns are added up by one program: of more rows several programs leave partial sums,
#: for which one more kernel is launched
ALONE = 256


@planned
def plan(
    m: int, n: int, double: bool, count: int, need_bias: bool, activation: str | None,
    *parameters: float,
) -> tuple[Launch, int]:  # fmt: skip
    """The pass over (m, n), on ``count`` multiprocessors, and how many ranges of rows it has."""
    block_m, block_n = 16, 64 if double else 128
    tiles = cdiv(n, block_n)
    parts = 1 if m <= ALONE else min(cdiv(m, block_m), cdiv(8 * count, tiles))
    run = _columns.launch(
        parts * tiles, m=m, n=n, rows=cdiv(m, parts), NEED_BIAS=need_bias, M=block_m, N=block_n,
        **activations.constants(activation, 1, parameters),
    )  # fmt: skip
    return run, parts


def columns(
    dy: Tensor, saved: Tensor | None, activation: str | None, parameters: tuple[float, ...],
    need_bias: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(dz, db) of dy (m, n) in one pass: dz = dy f'(saved), db = Σ_rows dz (None unless it is
    needed). Without an activation dz is dy."""
    m, n = dy.shape
    dy = dy.contiguous()
    dz = dy if activation is None else torch.empty_like(dy)
    if not (m and n):
        return dz, dy.new_zeros(n) if need_bias else None
    double, count = dy.dtype == torch.float64, multiprocessors(dy.device)
    run, parts = plan(m, n, double, count, need_bias, activation, *parameters)
    db = dy.new_empty(n) if need_bias else None
    partial = partial_sums(dy, 1, parts, n) if need_bias and parts > 1 else None
    run(dy, saved, None if activation is None else dz, db if partial is None else partial)
    if db is not None and partial is not None:
        column_sum(partial, db)
    return dz, db


def _rows_of(t: Tensor) -> Tensor:
    """(..., n) as (rows, n)."""
    return t if t.dim() == 2 else t.reshape(t.shape[:-1].numel(), t.shape[-1])


def _vendors(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """torch's linear, which for inputs that are not 2-D would return a view where there is a
    bias."""
    if x.dim() == 2 or bias is None:
        return torch.nn.functional.linear(x, weight, bias)
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    torch.addmm(bias, _rows_of(x), weight.t(), out=_rows_of(y))
    return y


def _product(x: Tensor, y: Tensor, ours: bool, shape: Sequence[int]) -> Tensor:
    """x y in the shape given."""
    if ours:
        return product(x, y, shape=shape)[0]
    if len(shape) == 2:
        return torch.mm(x, y)
    out = x.new_empty(shape)  # not a view of the product: a result is none
    torch.mm(x, y, out=_rows_of(out))
    return out


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, *, ours: bool) -> Tensor:
    """y = x Wᵀ + b."""
    if not ours:
        return _vendors(x, weight, bias)
    shape = (*x.shape[:-1], weight.shape[0])
    return product(_rows_of(x), weight.t(), bias, shape=shape)[0]


def backward(
    dy: Tensor, x: Tensor | None, weight: Tensor | None, need_x: bool, need_weight: bool,
    need_bias: bool, *, ours: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """dx = dy W, dW = dyᵀ x, db = Σ_rows dy; None for each that is not needed."""
    flat = _rows_of(dy)
    db = columns(flat, None, None, (), True)[1] if need_bias else None
    needed = x if need_weight else None, weight if need_x else None
    return *_gradients(flat, *needed, ours, dy.shape[:-1]), db


def activation_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, parameters: Any, *, ours: bool
) -> tuple[Tensor, Tensor | None]:
    """y = f(z), and z where the derivative needs it: by us from the product's epilogue."""
    keep_z = activation not in activations.SAVES_OUTPUT
    if ours:
        shape = (*x.shape[:-1], weight.shape[0])
        return product(_rows_of(x), weight.t(), bias, activation, tuple(parameters), keep_z, shape)
    z = _vendors(x, weight, bias)
    if keep_z:
        return activations.forward(activation, z, *parameters), z
    activations.forward_(activation, z, *parameters)
    return z, None


def activation_backward(
    dy: Tensor, x: Tensor, weight: Tensor, saved: Tensor, activation: str, parameters: Any,
    need_x: bool, need_weight: bool, need_bias: bool, *, ours: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """dz and db in one pass, then dx = dz W and dW = dzᵀ x; None for each that is not needed."""
    saved = _rows_of(saved).contiguous()
    dz, db = columns(_rows_of(dy), saved, activation, tuple(parameters), need_bias)
    needed = x if need_weight else None, weight if need_x else None
    return *_gradients(dz, *needed, ours, x.shape[:-1]), db


def _gradients(
    dz: Tensor, x: Tensor | None, weight: Tensor | None, ours: bool, leading: Sequence[int]
) -> tuple[Tensor | None, Tensor | None]:
    """dx, whose ``leading`` dimensions are given, where there is a weight; dW where there is an
    x."""
    dx = None if weight is None else _product(dz, weight, ours, (*leading, weight.shape[1]))
    if x is None:
        return dx, None
    flat = _rows_of(x)
    return dx, _product(dz.t(), flat, ours, (dz.shape[1], flat.shape[1]))

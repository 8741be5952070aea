"""embedding: a gather, and its gradient, a sum of rows by index. No atomics: the same bits every
time.

The indices are sorted, so that what adds to one row of dW lies in one run, and one program adds it
up and writes the row, zeros where there is no run. A word may be a tenth of a text, and a table may
have two rows: so that no program adds up thousands alone, a run's chunks of CHUNK are summed first,
and then the sums. Formula: ``custom_backprop/formulas/embedding.py``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, accumulator, cdiv, kernel, next_power_of_2, planned
from .rows import read, write

#: rows whose sum is one program's work; their sums, in float32, are a 16th of the traffic of
#: summing rows of bfloat16
CHUNK = 32
#: elements a program has at once, 16 a thread. Most rows of dW are zeros alone, and the smaller the
#: programs, the more of them are written at once
TILE = 2048


@kernel
def _gather(
    W, INDEX, Y, rows, n, known, blocks, w_row, w_column, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """y_r = W_t, in W's own dtype; NaN where there is no row t."""
    row = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)[None, :]
    index = tl.load(INDEX + row.to(tl.int64), row < rows, other=0).to(tl.int64)[:, None]
    inside = (row < rows)[:, None] & (column < n)
    there = inside & (index >= 0) & (index < known)
    y = tl.load(W + index * w_row + column.to(tl.int64) * w_column, there, other=float("nan"))
    tl.store(Y + row.to(tl.int64)[:, None] * n + column, y, inside)


@triton.jit
def _add(sums, X, SOURCE, FACTOR, PICKED, v, first, last, n, column, ROWS: tl.constexpr):
    """``sums`` plus the rows of X in [first, last), or those that SOURCE names there, times FACTOR,
    or only where they PICKED v."""
    for start in range(first, last, ROWS):
        place = start + tl.arange(0, ROWS)
        inside = place < last
        row = place.to(tl.int64)
        if SOURCE is not None:
            row = tl.load(SOURCE + place, inside, other=0)
        both = inside[:, None] & (column < n)
        x = read(X + row[:, None] * n, column, both)
        if FACTOR is not None:
            x *= tl.load(FACTOR + place, inside, other=0.0)[:, None]
        if PICKED is not None:
            x = tl.where(tl.load(PICKED + row[:, None] * n + column, both, other=-1) == v, x, 0.0)
        sums += x
    return sums


@kernel
def _chunk_sums(
    X, SOURCE, FACTOR, PICKED, INDEX, SUMS, n, known, blocks, padding,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of each whole chunk of the sorted indices in which all are the same; else 0."""
    chunk = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)[None, :]
    first = chunk * CHUNK
    index = tl.load(INDEX + first)
    wanted = (index >= 0) & (index < known) & (index != padding)
    same = wanted & (index == tl.load(INDEX + first + CHUNK - 1))
    last = tl.where(same, first + CHUNK, first)
    sums = tl.zeros((ROWS, BLOCK), SUMS.dtype.element_ty)
    sums = _add(sums, X, SOURCE, FACTOR, PICKED, index, first, last, n, column, ROWS)
    write(SUMS + chunk * n, column, column < n, tl.sum(sums, 0)[None, :])


@kernel
def _row_sums(
    X, SOURCE, FACTOR, PICKED, BOUNDS, SUMS, OUT, n, blocks, padding,
    SCALE: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dW_v: the rows of a run before its first whole chunk, the sums of its chunks, the rest."""
    v = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)[None, :]
    dtype: tl.constexpr = tl.float64 if OUT.dtype.element_ty == tl.float64 else tl.float32
    first, last = tl.load(BOUNDS + v), tl.load(BOUNDS + v + 1)
    last = tl.where(v == padding, first, last)
    sums = tl.zeros((ROWS, BLOCK), dtype)
    if SUMS is None:
        sums = _add(sums, X, SOURCE, FACTOR, PICKED, v, first, last, n, column, ROWS)
    else:
        head = tl.minimum(tl.cdiv(first, CHUNK) * CHUNK, last)
        tail = tl.maximum(last // CHUNK * CHUNK, head)
        sums = _add(sums, X, SOURCE, FACTOR, PICKED, v, first, head, n, column, ROWS)
        whole = head // CHUNK, tail // CHUNK
        sums = _add(sums, SUMS, None, None, None, v, whole[0], whole[1], n, column, ROWS)
        sums = _add(sums, X, SOURCE, FACTOR, PICKED, v, tail, last, n, column, ROWS)
    total = tl.sum(sums, 0)
    if SCALE:
        total = total / tl.maximum(last - first, 1).to(dtype)
    write(OUT + v * n, column, column < n, total[None, :])


@planned
def plan_gather(
    shape: tuple[int, ...], strides: tuple[int, ...], rows: int, dtype: torch.dtype
) -> Launch:
    """Of a table of this shape and these strides. Two 128-bit accesses a thread."""
    known, n = shape
    size = 4096 // dtype.itemsize
    block = min(next_power_of_2(n), size)
    tile, blocks = min(next_power_of_2(rows), size // block), cdiv(n, block)
    return _gather.launch(
        cdiv(rows, tile) * blocks, rows=rows, n=n, known=known, blocks=blocks, w_row=strides[0],
        w_column=strides[1], ROWS=tile, BLOCK=block,
    )  # fmt: skip


def tile_of_sums(n: int, dtype: torch.dtype, rows: int) -> dict[str, int]:
    """Of at most ``rows`` rows that are added at once."""
    size = TILE // 2 if dtype == torch.float64 else TILE
    block = min(next_power_of_2(n), size)
    rows = min(size // block, rows)
    return {"ROWS": rows, "BLOCK": block, "num_warps": max(4 * rows * block // size, 1)}


@planned
def plan_sums(
    rows: int, added: int, n: int, padding: int, scale: bool, dtype: torch.dtype
) -> tuple[Launch | None, Launch]:
    """Of ``added`` rows of ``n`` in ``rows``: the chunks, if there is a whole one, then all."""
    tile = tile_of_sums(n, dtype, CHUNK)
    blocks, whole = cdiv(n, tile["BLOCK"]), added // CHUNK
    both = {"n": n, "blocks": blocks, "padding": padding, "CHUNK": CHUNK, **tile}
    chunks = _chunk_sums.launch(whole * blocks, known=rows, **both) if whole else None
    return chunks, _row_sums.launch(rows * blocks, SCALE=scale, **both)


def sums_by_index(
    x: Tensor, index: Tensor, rows: int, padding_idx: int, scale_grad_by_freq: bool,
    of: Tensor | None = None, factor: Tensor | None = None, picked: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Σ of the rows of x whose index is v, for each v below ``rows``; x must be contiguous.

    Args:
        of: which row of x an entry of ``index`` means. Default: its own.
        factor: what the row is multiplied by.
        picked: of the shape of x; only elements that picked v are summed.
    """
    ordered, order = index.sort(stable=True)
    bounds = torch.searchsorted(
        ordered, torch.arange(rows + 1, device=index.device, dtype=index.dtype)
    )
    source = order if of is None else of[order]
    if picked is not None:  # what one row of x has twice counts once
        factor = x.new_ones(order.shape, dtype=accumulator(x.dtype))
        again = (ordered[1:] == ordered[:-1]) & (source[1:] == source[:-1])
        factor[1:].masked_fill_(again, 0)
    elif factor is not None:
        factor = factor[order]
    out = x.new_empty(rows, x.shape[-1])
    if out.numel():
        chunks, all_rows = plan_sums(
            rows, order.numel(), out.shape[1], padding_idx, scale_grad_by_freq, x.dtype
        )
        sums = None
        if chunks is not None:
            shape = order.numel() // CHUNK, out.shape[1]
            sums = x.new_empty(shape, dtype=accumulator(x.dtype))
            chunks(x, source, factor, picked, ordered, sums)
        all_rows(x, source, factor, picked, bounds, sums, out)
    return out


def forward(
    weight: Tensor, index: Tensor, padding_idx: int, scale_grad_by_freq: bool, sparse: bool
) -> Tensor:
    """y, contiguous."""
    y = weight.new_empty(*index.shape, weight.shape[1])
    if y.numel():
        run = plan_gather(weight.shape, weight.stride(), index.numel(), weight.dtype)
        run(weight, index.contiguous(), y)
    return y


def backward(
    dy: Tensor, index: Tensor, rows: int, padding_idx: int, scale_grad_by_freq: bool
) -> Tensor:
    """dW, contiguous."""
    return sums_by_index(dy.contiguous(), index.reshape(-1), rows, padding_idx, scale_grad_by_freq)

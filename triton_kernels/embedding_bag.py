"""embedding_bag: a bag is summed, or its maximum found, by one program, without the looked-up rows
in memory; the gradient is that of ``embedding.py``.

Formulas: ``custom_backprop/formulas/embedding_bag.py``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .embedding import sums_by_index, tile_of_sums
from .launch import Launch, accumulator, cdiv, kernel, planned
from .rows import read, write


@triton.jit
def _counts(index, inside, padding):
    """Which entries count: not those of the padding, which is -1 where there is none."""
    return inside & ((index != padding) | (index < 0))


@triton.jit
def _look_up(W, index, counts, known, column, n, w_row, w_column):
    """W_t; NaN where there is no row t, 0 where the entry does not count."""
    there = counts & (index >= 0) & (index < known)
    place = index.to(tl.int64)[:, None] * w_row + column.to(tl.int64) * w_column
    x = read(W, place, there[:, None] & (column < n), float("nan"))
    return tl.where(counts[:, None], x, 0.0)


@kernel
def _sums(
    W, INDEX, PER_SAMPLE, BOUNDS, Y, n, known, padding, blocks, w_row, w_column,
    MEAN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y_b = Σ p_k W_t, or the mean of those that count."""
    bag = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)[None, :]
    dtype: tl.constexpr = tl.float64 if Y.dtype.element_ty == tl.float64 else tl.float32
    first, last = tl.load(BOUNDS + bag), tl.load(BOUNDS + bag + 1)
    sums, counted = tl.zeros((ROWS, BLOCK), dtype), tl.zeros((ROWS,), tl.int32)
    for start in range(first, last, ROWS):
        place = start + tl.arange(0, ROWS)
        inside = place < last
        index = tl.load(INDEX + place, inside, other=0)
        counts = _counts(index, inside, padding)
        x = _look_up(W, index, counts, known, column, n, w_row, w_column)
        if PER_SAMPLE is not None:
            x *= read(PER_SAMPLE, place, counts)[:, None]
        sums += x
        counted += counts.to(tl.int32)
    total = tl.sum(sums, 0)
    if MEAN:
        total = total / tl.maximum(tl.sum(counted, 0), 1).to(dtype)
    write(Y + bag * n, column, column < n, total[None, :])


@kernel
def _maxima(
    W, INDEX, BOUNDS, Y, PICKED, n, known, padding, blocks, w_row, w_column,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y_bc = max_k W_tc, and the first index that has it: one entry (ROWS = 1) after the other."""
    bag = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)[None, :]
    dtype: tl.constexpr = tl.float64 if Y.dtype.element_ty == tl.float64 else tl.float32
    first, last = tl.load(BOUNDS + bag), tl.load(BOUNDS + bag + 1)
    best = tl.zeros((ROWS, BLOCK), dtype)
    picked = tl.full((ROWS, BLOCK), -1, PICKED.dtype.element_ty)
    for start in range(first, last):
        index = tl.load(INDEX + start + tl.arange(0, ROWS))
        counts = _counts(index, True, padding)
        x = _look_up(W, index, counts, known, column, n, w_row, w_column)
        better = counts[:, None] & ((x > best) | (x != x) | (picked == -1))
        best = tl.where(better, x, best)
        picked = tl.where(better, index[:, None], picked)
    write(Y + bag * n, column, column < n, best)
    tl.store(PICKED + bag * n + column, picked, column < n)


@kernel
def _products(
    DY, W, INDEX, BAG, DP, entries, n, known, bags, padding, w_row, w_column,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dp_k = <dy_b, W_t>; 0 of padding, and of an entry in no bag."""
    entry = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = entry < entries
    index = tl.load(INDEX + entry, inside, other=0)
    bag = tl.load(BAG + entry, inside, other=0)
    counts = _counts(index, inside & (bag < bags), padding)
    dtype: tl.constexpr = tl.float64 if DP.dtype.element_ty == tl.float64 else tl.float32
    sums = tl.zeros((ROWS, BLOCK), dtype)
    for start in range(0, n, BLOCK):
        column = start + tl.arange(0, BLOCK)[None, :]
        x = _look_up(W, index, counts, known, column, n, w_row, w_column)
        dy = read(DY + bag[:, None] * n, column, counts[:, None] & (column < n))
        sums += tl.where(column < n, x * dy, 0.0)
    write(DP, entry, inside, tl.sum(sums, 1))


@planned
def plan(
    what: str, shape: tuple[int, ...], strides: tuple[int, ...], padding: int, bags: int,
    entries: int, dtype: torch.dtype,
) -> Launch:  # fmt: skip
    """Of a table of this shape and these strides: "sum", "mean", "max" or "products"."""
    known, n = shape
    shared = {"n": n, "known": known, "padding": padding, "w_row": strides[0]}
    shared |= {"w_column": strides[1], **tile_of_sums(n, dtype, 1 if what == "max" else 8)}
    if what == "products":
        programs = cdiv(entries, shared["ROWS"])
        return _products.launch(programs, entries=entries, bags=bags, **shared)
    blocks = cdiv(n, shared["BLOCK"])
    if what == "max":
        return _maxima.launch(bags * blocks, blocks=blocks, **shared)
    return _sums.launch(bags * blocks, blocks=blocks, MEAN=what == "mean", **shared)


def forward(
    weight: Tensor, per_sample: Tensor | None, index: Tensor, bounds: Tensor, mode: str,
    padding_idx: int, scale_grad_by_freq: bool, sparse: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """y, and what maxima picked."""
    bags, index, bounds = bounds.shape[0] - 1, index.contiguous(), bounds.contiguous()
    y = weight.new_empty(bags, weight.shape[1])
    picked = index.new_empty(y.shape) if mode == "max" else None
    if y.numel():
        run = plan(
            mode, weight.shape, weight.stride(), padding_idx, bags, index.shape[0], weight.dtype
        )
        if mode == "max":
            run(weight, index, bounds, y, picked)
        else:
            per_sample = None if per_sample is None else per_sample.contiguous()
            run(weight, index, per_sample, bounds, y)
    return y, picked


def _bags_of(index: Tensor, bounds: Tensor) -> Tensor:
    """The bag of each entry; their number, where an entry is behind the last."""
    entry = torch.arange(index.shape[0], device=index.device, dtype=bounds.dtype)
    return torch.searchsorted(bounds[1:].contiguous(), entry, right=True)


def _shares(index: Tensor, bounds: Tensor, bag: Tensor, padding: int, dtype: torch.dtype) -> Tensor:
    """1 / n_b of each entry."""
    before = torch.cat((index.new_zeros(1, dtype=torch.int64), (index != padding).cumsum(0)))
    counted = before[bounds[1:]] - before[bounds[:-1]]
    share = counted.clamp_min(1).to(dtype).reciprocal()
    return torch.cat((share, share.new_zeros(1)))[bag]


def backward(
    dy, weight, per_sample, picked, index, bounds, rows, mode, padding_idx, scale_grad_by_freq,
    need_weight, need_per_sample,
):  # fmt: skip
    """dW and dp, contiguous; None for what is not needed."""
    dy, bags, bag = dy.contiguous(), dy.shape[0], _bags_of(index, bounds)
    dw = dp = None
    if need_weight:
        wide, factor = accumulator(dy.dtype), None
        if per_sample is not None:
            factor = per_sample.to(wide)
        elif mode == "mean":
            factor = _shares(index, bounds, bag, padding_idx, wide)
        picked = picked.contiguous() if mode == "max" else None
        known = torch.where(bag < bags, index, rows)
        dw = sums_by_index(dy, known, rows, padding_idx, scale_grad_by_freq, bag, factor, picked)
    if need_per_sample:
        dp = per_sample.new_empty(index.shape)
        if dp.numel():
            entries = index.shape[0]
            run = plan(
                "products", weight.shape, weight.stride(), padding_idx, bags, entries, dy.dtype
            )
            run(dy, weight, index.contiguous(), bag, dp)
    return dw, dp

"""nll_loss and cross_entropy: kernels and their launchers.

x is (N, C) or (N, C, D), reduced over C; a row is one (n, d), its number is n * D + d. Rows next to each other then lie next to each other
in memory where D > 1, and a tile of several rows reads whole cache lines of either layout. Losses of rows meet in a partial sum a program
and one sum of those: no atomics, the same bits every time. Nothing is read by the host.
Formulas: ``custom_backprop/formulas/cross_entropy.py``.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import like
from .launch import accumulator, cdiv, launch, next_power_of_2

NONE, MEAN = 0, 1
GRADIENT, STATISTICS = 1, 2

#: rows a program where only one number of each is read
PICKED = 512


@triton.jit
def _class(TARGET, WEIGHT, row, alive, classes, ignore_index, HAS_WEIGHT: tl.constexpr, dtype: tl.constexpr):
    """(t, whether it may be read, whether the row counts, w_t): 0 where the row is ignored, NaN where t is no class."""
    t = tl.load(TARGET + row, alive, other=0)
    counted = alive & (t != ignore_index)
    valid = counted & (t >= 0) & (t < classes)
    w = tl.where(valid, 1.0, float("nan")).to(dtype)
    if HAS_WEIGHT:
        w *= tl.load(WEIGHT + t, valid, other=0.0).to(dtype)
    return t, valid, counted, tl.where(counted, w, 0.0)


@triton.jit
def _nll(
    X, TARGET, WEIGHT, LOSS, TOTAL, rows, classes, inner, x_outer, x_class, x_inner, ignore_index,
    HAS_X: tl.constexpr, HAS_WEIGHT: tl.constexpr, REDUCE: tl.constexpr, HAS_TOTAL: tl.constexpr, dtype: tl.constexpr,
    WIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS rows a program: -w_t x_t of each, or their sum, and the sum of w_t."""
    program = tl.program_id(0).to(tl.int64 if WIDE else tl.int32)
    row = program * ROWS + tl.arange(0, ROWS)
    alive = row < rows
    t, valid, counted, w = _class(TARGET, WEIGHT, row, alive, classes, ignore_index, HAS_WEIGHT, dtype)
    if HAS_X:
        x = tl.load(X + row // inner * x_outer + row % inner * x_inner + t * x_class, valid, other=0.0).to(dtype)
        loss = tl.where(counted, -w * x, 0.0)
        if REDUCE:
            tl.store(LOSS + program, tl.sum(loss))
        else:
            tl.store(LOSS + row, loss.to(LOSS.dtype.element_ty), alive)
    if HAS_TOTAL:
        tl.store(TOTAL + program, tl.sum(w))


@triton.jit
def _tile(inner, outer_stride, inner_stride, WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """(row numbers, which exist, offsets of their first class, columns of a block): ROWS rows of one n."""
    program = tl.program_id(0).to(tl.int64 if WIDE else tl.int32)
    tiles = tl.cdiv(inner, ROWS)
    n = program // tiles
    d = program % tiles * ROWS + tl.arange(0, ROWS)
    first = n * outer_stride + d * inner_stride
    return n * inner + d, d < inner, first[:, None], tl.arange(0, BLOCK).to(d.dtype)[None, :]


@triton.jit
def _share(DY, TOTAL, row, alive, rows, PER_ROW: tl.constexpr, MEAN: tl.constexpr, PROBABILITIES: tl.constexpr, dtype: tl.constexpr):
    """dy_r of rows that count, without DY for a dy of 1."""
    dy = tl.full(row.shape, 1, dtype)
    if PER_ROW:
        dy = tl.load(DY + row, alive, other=0.0).to(dtype)
    elif DY is not None:
        dy *= tl.load(DY).to(dtype)
    if MEAN:
        dy /= rows * tl.full(row.shape, 1, dtype) if PROBABILITIES else tl.load(TOTAL).to(dtype)
    return dy


@triton.jit
def _soft(TARGET, WEIGHT, column, mask, classes, x_class, PROBABILITIES: tl.constexpr, HAS_WEIGHT: tl.constexpr, SMOOTHING: tl.constexpr,
          SHARE: tl.constexpr, dtype: tl.constexpr):  # fmt: skip
    """u of a block, 0 past its end; SHARE is s / C."""
    if PROBABILITIES:
        u = tl.load(TARGET + column * x_class, mask, other=0.0).to(dtype) * (1 - SMOOTHING) + SHARE
    else:
        u = tl.full(column.shape, SHARE, dtype)
    if HAS_WEIGHT:
        u *= tl.load(WEIGHT + column, column < classes, other=0.0).to(dtype)
    return tl.where(mask, u, 0.0)


@triton.jit
def _forward(
    X, TARGET, WEIGHT, TOTAL, LOSS, DX, LARGEST, LOG_SUM, rows, classes, inner, x_outer, x_class, x_inner, ignore_index,
    PROBABILITIES: tl.constexpr, HAS_WEIGHT: tl.constexpr, SMOOTHING: tl.constexpr, SHARE: tl.constexpr, MEAN: tl.constexpr,
    REDUCE: tl.constexpr, NEED_DX: tl.constexpr, STATISTICS: tl.constexpr, dtype: tl.constexpr,
    WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS rows a program: one reading of x for m and z = Σ e^(x-m), and where dx or a soft loss is wanted one more, backwards.

    The second reading begins with what the first read last, which is what the cache still holds of rows that are larger than their share.
    """
    SOFT: tl.constexpr = PROBABILITIES or SMOOTHING > 0
    row, alive, first, column = _tile(inner, x_outer, x_inner, WIDE, ROWS, BLOCK)
    X += first
    Q = TARGET + first if PROBABILITIES else TARGET
    # m and z of each lane by itself, so that no iteration waits for another warp. m starts at the lowest finite number, not at -inf, and
    # -inf adds e^-inf = 0 to z. One exponential serves both cases: x <= m adds e^(x-m), x > m scales z by e^(m-x) and adds 1.
    lowest: tl.constexpr = -1.7976931348623157e308 if dtype == tl.float64 else -3.4028234663852886e38
    m = tl.full((ROWS, BLOCK), lowest, dtype)
    z = tl.zeros((ROWS, BLOCK), dtype)
    total = tl.zeros((ROWS, BLOCK), dtype)
    for start in range(0, classes, BLOCK):
        place = start + column
        mask = alive[:, None] & (place < classes)
        x = tl.load(X + place * x_class, mask, other=float("-inf")).to(dtype)
        e = tl.exp(-tl.abs(x - m))
        z = tl.where(x > m, z * e + 1, z + e)
        m = tl.maximum(m, x)
        if SOFT:
            total += _soft(Q, WEIGHT, place, mask, classes, x_class, PROBABILITIES, HAS_WEIGHT, SMOOTHING, SHARE, dtype)
    lane = m
    m = tl.max(lane, 1)
    log_z = tl.log(tl.sum(z * tl.exp(lane - m[:, None]), 1))
    if STATISTICS:
        tl.store(LARGEST + row, m, alive)
        tl.store(LOG_SUM + row, log_z, alive)

    counted = alive
    loss = tl.zeros((ROWS,), dtype)
    hard = tl.zeros((ROWS,), dtype)
    chosen = tl.full((ROWS,), -1, column.dtype)
    if not PROBABILITIES:
        t, valid, counted, w = _class(TARGET, WEIGHT, row, alive, classes, ignore_index, HAS_WEIGHT, dtype)
        hard = w * (1 - SMOOTHING)
        x_t = tl.load(X + (t * x_class)[:, None], valid[:, None], other=0.0).to(dtype)
        loss = hard * (log_z - (tl.sum(x_t, 1) - m))
        chosen = tl.where(valid, t, -1).to(column.dtype)
    share = _share(None, TOTAL, row, alive, rows, False, MEAN, PROBABILITIES, dtype)
    if SOFT or NEED_DX:
        mass = (tl.sum(total, 1) + hard)[:, None]
        soft_loss = tl.zeros((ROWS, BLOCK), dtype)
        last = tl.cdiv(classes, BLOCK) * BLOCK - BLOCK
        for back in range(0, classes, BLOCK):
            place = last - back + column
            mask = alive[:, None] & (place < classes)
            x = tl.load(X + place * x_class, mask, other=0.0).to(dtype)
            log_p = x - m[:, None] - log_z[:, None]
            q = tl.where(place == chosen[:, None], hard[:, None], 0.0)
            if SOFT:
                u = _soft(Q, WEIGHT, place, mask, classes, x_class, PROBABILITIES, HAS_WEIGHT, SMOOTHING, SHARE, dtype)
                soft_loss -= tl.where(mask, u * log_p, 0.0)
                q += u
            if NEED_DX:
                dx = tl.where(counted[:, None], share[:, None] * (tl.exp(log_p) * mass - q), 0.0)
                tl.store(DX + first + place * x_class, dx.to(DX.dtype.element_ty), mask)
        loss += tl.sum(soft_loss, 1)
    loss = tl.where(counted, loss, 0.0)
    if REDUCE:
        tl.store(LOSS + tl.program_id(0), tl.sum(loss * share if MEAN else loss))
    else:
        tl.store(LOSS + row, loss.to(LOSS.dtype.element_ty), alive)


@triton.jit
def _backward(
    DY, X, TARGET, WEIGHT, TOTAL, LARGEST, LOG_SUM, DX, DTARGET, rows, classes, inner, x_outer, x_class, x_inner, ignore_index,
    PROBABILITIES: tl.constexpr, HAS_WEIGHT: tl.constexpr, SMOOTHING: tl.constexpr, SHARE: tl.constexpr, MEAN: tl.constexpr,
    PER_ROW: tl.constexpr, NEED_DX: tl.constexpr, NEED_DTARGET: tl.constexpr, dtype: tl.constexpr,
    WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The same tiles, from x and the statistics of its rows."""
    SOFT: tl.constexpr = PROBABILITIES or SMOOTHING > 0
    row, alive, first, column = _tile(inner, x_outer, x_inner, WIDE, ROWS, BLOCK)
    X += first
    Q = TARGET + first if PROBABILITIES else TARGET
    m, log_z = tl.load(LARGEST + row, alive, other=0.0)[:, None], tl.load(LOG_SUM + row, alive, other=0.0)[:, None]
    counted = alive
    mass = tl.zeros((ROWS,), dtype)
    hard = tl.zeros((ROWS, 1), dtype)
    chosen = tl.full((ROWS, 1), -1, column.dtype)
    if not PROBABILITIES:
        t, valid, counted, w = _class(TARGET, WEIGHT, row, alive, classes, ignore_index, HAS_WEIGHT, dtype)
        mass = w * (1 - SMOOTHING)
        hard = mass[:, None]
        chosen = tl.where(valid, t, -1).to(column.dtype)[:, None]
    dy = _share(DY, TOTAL, row, alive, rows, PER_ROW, MEAN, PROBABILITIES, dtype)[:, None]
    if SOFT and NEED_DX:
        total = tl.zeros((ROWS, BLOCK), dtype)
        for start in range(0, classes, BLOCK):
            place = start + column
            mask = alive[:, None] & (place < classes)
            total += _soft(Q, WEIGHT, place, mask, classes, x_class, PROBABILITIES, HAS_WEIGHT, SMOOTHING, SHARE, dtype)
        mass += tl.sum(total, 1)
    for start in range(0, classes, BLOCK):
        place = start + column
        mask = alive[:, None] & (place < classes)
        log_p = tl.load(X + place * x_class, mask, other=0.0).to(dtype) - m - log_z
        if NEED_DX:
            q = tl.where(place == chosen, hard, 0.0)
            if SOFT:
                q += _soft(Q, WEIGHT, place, mask, classes, x_class, PROBABILITIES, HAS_WEIGHT, SMOOTHING, SHARE, dtype)
            dx = tl.where(counted[:, None], dy * (tl.exp(log_p) * mass[:, None] - q), 0.0)
            tl.store(DX + first + place * x_class, dx.to(DX.dtype.element_ty), mask)
        if NEED_DTARGET:
            dt = dy * (SMOOTHING - 1) * log_p
            if HAS_WEIGHT:
                dt *= tl.load(WEIGHT + place, place < classes, other=0.0).to(dtype)
            tl.store(DTARGET + first + place * x_class, dt.to(DTARGET.dtype.element_ty), mask)


@triton.jit
def _nll_backward(
    DY, TARGET, WEIGHT, TOTAL, DX, rows, classes, inner, x_outer, x_class, x_inner, ignore_index,
    HAS_WEIGHT: tl.constexpr, MEAN: tl.constexpr, PER_ROW: tl.constexpr, dtype: tl.constexpr,
    WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx = -w_t dy where c = t, 0 elsewhere: ROWS rows a program."""
    row, alive, first, column = _tile(inner, x_outer, x_inner, WIDE, ROWS, BLOCK)
    t, valid, counted, w = _class(TARGET, WEIGHT, row, alive, classes, ignore_index, HAS_WEIGHT, dtype)
    dy = _share(DY, TOTAL, row, alive, rows, PER_ROW, MEAN, False, dtype)
    hard = tl.where(counted, -w * dy, 0.0)
    # a class out of range makes all of its row NaN
    other = tl.where(counted & (valid == 0), hard, 0.0)[:, None]
    chosen = tl.where(valid, t, -1).to(column.dtype)[:, None]
    for start in range(0, classes, BLOCK):
        place = start + column
        dx = tl.where(place == chosen, hard[:, None], other)
        tl.store(DX + first + place * x_class, dx.to(DX.dtype.element_ty), alive[:, None] & (place < classes))


#: elements of a block, of each of x, m, z, u and its sum. Few and large programs: the fewer rows are under way, the more of each is still
#: in the cache at its second reading
HELD = 8192

#: the same where rows lie side by side and each element needs an address of its own
SIDE_BY_SIDE = 2048


def _view(x: Tensor) -> Tensor:
    """x as (outer, C, inner): (N, C) is (1, C, N)."""
    return x if x.dim() == 3 else x.t().unsqueeze(0)


def _shape(x: Tensor, soft: bool) -> dict[str, Any]:
    """The kernels' WIDE, ROWS and BLOCK, and the options of the launch, by shape and layout alone, and by whether q has a soft part."""
    _, classes, inner = x.shape
    last = x.stride(1) <= x.stride(2)
    words = max(x.dtype.itemsize // 4, 1)
    held = (HELD // (1 + soft) if last else SIDE_BY_SIDE) // words
    block = min(next_power_of_2(classes), held)
    rows = min(max(1024 // words // block, 1) if last else 64, next_power_of_2(max(inner, 1)))
    block = min(block, held // rows)
    # 8 warps at most: at 16 ptxas spills a few registers to fit two programs on a multiprocessor
    return {"WIDE": _wide(x), "ROWS": rows, "BLOCK": block, "num_warps": min(max(rows * block * words // 256, 1), 8)}


def _wide(x: Tensor) -> bool:
    """Whether offsets need int64: half of what int32 holds, as the masked end of the last tile needs room too."""
    return sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) >= 2**30


def _programs(x: Tensor, soft: bool) -> int:
    return x.shape[0] * cdiv(x.shape[2], _shape(x, soft)["ROWS"])


def _run(kernel: Any, x: Tensor, before: tuple[Any, ...], ignore_index: int, soft: bool, **constexprs: Any) -> None:
    """One of the kernels that take tiles of x, a dense (outer, C, inner)."""
    outer, classes, inner = x.shape
    launch(
        kernel, _programs(x, soft), *before, outer * inner, classes, inner, *x.stride(), ignore_index,
        **constexprs, dtype=_dtype(x), **_shape(x, soft),
    )  # fmt: skip


def _dtype(x: Tensor) -> tl.dtype:
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def _dense(x: Tensor) -> Tensor:
    """``x`` in strides that ``empty_like`` keeps: without gaps or overlaps."""
    if x.is_contiguous():
        return x
    layout = torch.empty_like(x, device="meta").stride()
    return x if x.stride() == layout else torch.empty_like(x).copy_(x)


def _sum(partial: Tensor) -> Tensor:
    """The second stage."""
    return partial.view(()) if partial.numel() == 1 else partial.sum()


def _pick(
    x: Tensor | None, target: Tensor, weight: Tensor | None, classes: int, dtype: torch.dtype, reduction: int, ignore_index: int
) -> Any:
    """(losses of the rows or their sum, Σ w_t for a mean) of nll_loss; of ``x`` None the second alone."""
    rows = target.numel()
    inner = target.shape[-1]
    wide = accumulator(dtype)
    programs = cdiv(rows, PICKED)
    loss = target.new_empty(target.shape, dtype=dtype) if reduction == NONE else target.new_empty(programs, dtype=wide)
    total = target.new_empty(programs, dtype=wide) if reduction == MEAN else None
    launch(
        _nll, programs, x, target, weight, None if x is None else loss, total, rows, classes, inner,
        *((0, 0, 0) if x is None else _view(x).stride()), ignore_index,
        HAS_X=x is not None, HAS_WEIGHT=weight is not None, REDUCE=reduction != NONE, HAS_TOTAL=total is not None,
        dtype=tl.float64 if wide == torch.float64 else tl.float32, WIDE=rows >= 2**30 or (x is not None and _wide(x)), ROWS=PICKED,
    )  # fmt: skip
    return loss if reduction == NONE or x is None else _sum(loss), None if total is None else _sum(total)


def nll_forward(x: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """The loss, and Σ w_t (for a mean; else any number)."""
    weight = None if weight is None else weight.contiguous()
    loss, total = _pick(x, target.contiguous(), weight, x.shape[1], x.dtype, reduction, ignore_index)
    if total is None:
        return loss.to(x.dtype), x.new_empty(())
    return (loss / total).to(x.dtype), total.to(x.dtype)


def nll_backward(dy: Tensor, x: Tensor, target: Tensor, weight: Tensor | None, total: Tensor, reduction: int, ignore_index: int) -> Tensor:
    """dx, contiguous."""
    dx = x.new_empty(x.shape)
    weight = None if weight is None else weight.contiguous()
    before = dy.contiguous(), target.contiguous(), weight, total, dx
    options = {"HAS_WEIGHT": weight is not None, "MEAN": reduction == MEAN, "PER_ROW": reduction == NONE}
    _run(_nll_backward, _view(dx), before, ignore_index, False, **options)
    return dx


def _prepare(
    x: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int, smoothing: float
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, dict[str, Any]]:
    """x and what the kernels want beside it: target, weight, total, and the constexprs of the target's kind."""
    x = _dense(x)
    probabilities = target.is_floating_point()
    target = like(target, x) if probabilities else target.contiguous()
    weight = None if weight is None else weight.contiguous()
    mean = reduction == MEAN
    total = _pick(None, target, weight, x.shape[1], x.dtype, reduction, ignore_index)[1] if mean and not probabilities else None
    kind = {
        "PROBABILITIES": probabilities,
        "HAS_WEIGHT": weight is not None,
        "SMOOTHING": smoothing,
        "SHARE": smoothing / x.shape[1],
        "MEAN": mean,
    }
    return x, target, weight, total, kind


def forward(
    x: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int, smoothing: float, keep: int
) -> tuple[Tensor, Tensor]:
    """The loss, and what ``keep`` says: nothing, dx for a dy of 1, or (m, log Σ e^(x-m)) of each row."""
    x, target, weight, total, kind = _prepare(x, target, weight, reduction, ignore_index, smoothing)
    shape = (x.shape[0], *x.shape[2:])
    wide = accumulator(x.dtype)
    dx = torch.empty_like(x) if keep == GRADIENT else None
    statistics = x.new_empty((2, *shape), dtype=wide) if keep == STATISTICS else None
    v = _view(x)
    soft = kind["PROBABILITIES"] or smoothing > 0
    partial = None if reduction == NONE else x.new_empty(_programs(v, soft), dtype=wide)
    loss = x.new_empty(shape) if partial is None else partial
    m, log_sum = (None, None) if statistics is None else statistics
    _run(
        _forward, v, (v, target, weight, total, loss, dx, m, log_sum), ignore_index, soft, **kind,
        REDUCE=partial is not None, NEED_DX=dx is not None, STATISTICS=statistics is not None,
    )  # fmt: skip
    if partial is not None:
        loss = _sum(partial).to(x.dtype) if x.numel() else x.new_full((), float("nan") if reduction == MEAN else 0.0)
    return loss, dx if dx is not None else statistics if statistics is not None else x.new_empty(0)


def backward(
    dy: Tensor, x: Tensor, target: Tensor, weight: Tensor | None, statistics: Tensor, reduction: int, ignore_index: int,
    smoothing: float, need_x: bool, need_target: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dx and the gradient of class probabilities; an empty tensor for one that is not needed."""
    layout = target
    x, target, weight, total, kind = _prepare(x, target, weight, reduction, ignore_index, smoothing)
    dx = torch.empty_like(x) if need_x else None
    dtarget = torch.empty_like(target) if need_target else None
    v, soft = _view(x), kind["PROBABILITIES"] or smoothing > 0
    _run(
        _backward, v, (dy.contiguous(), v, target, weight, total, *statistics, dx, dtarget), ignore_index, soft, **kind,
        PER_ROW=reduction == NONE, NEED_DX=need_x, NEED_DTARGET=need_target,
    )  # fmt: skip
    nothing = x.new_empty(0)
    if dtarget is not None and dtarget.stride() != layout.stride():
        dtarget = torch.empty_like(layout).copy_(dtarget)
    return nothing if dx is None else dx, nothing if dtarget is None else dtarget

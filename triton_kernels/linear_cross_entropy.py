"""linear_cross_entropy: what a chunk of logits needs beside the kernels of cross_entropy, which are
its own: the soft cap and the z-loss, over the chunk's memory.

Logits are (N, C) or (N, C, D), reduced over C; a row is one (n, d), its number is n * D + d.
Formulas: ``custom_backprop/formulas/linear_cross_entropy.py``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import cross_entropy, elementary, pointwise
from .cross_entropy import GRADIENT
from .elementary import constant
from .launch import Launch, kernel, multiprocessors, planned
from .nll import NONE, as_rows
from .rows import online, online_of_rows, online_start, over_rows, read, start_of, tile_of, write


@triton.jit
def _softcap(z, A, B, HALF: tl.constexpr):
    c = constant(A, z)
    return c * elementary.tanh(z / c, HALF)


@kernel
def _finish(
    LOGITS, D, LSE, K, rows, n, inner, tiles, s_outer, s_n, s_inner,
    Z_LOSS: tl.constexpr, SOFTCAP: tl.constexpr, SEVERAL: tl.constexpr, LOOP: tl.constexpr,
    WIDE: tl.constexpr, WIDE_COLUMNS: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """lse of each row; and the slope (d + 2 ζ k lse p) (1 - (l/c)²) over d. Without K, k is 1."""
    dtype: tl.constexpr = tl.float64 if LOGITS.dtype.element_ty == tl.float64 else tl.float32
    first = tl.program_id(0)
    for tile in range(first, tiles if SEVERAL else first + 1, tl.num_programs(0) if SEVERAL else 1):
        row, alive, column = tile_of(tile, rows, ROWS, BLOCK, WIDE, WIDE_COLUMNS)
        start = start_of(row, inner, s_outer, s_inner)
        if Z_LOSS > 0:
            m, z = online_start(LOGITS, ROWS, BLOCK, dtype)
            for done in range(0, n if LOOP else BLOCK, BLOCK):
                place = done + column
                inside = alive[:, None] & (place < n)
                logits = read(LOGITS + start, place * s_n, inside, float("-inf"))
                m, z = online(m, z, logits, ALIGNED)
            m, z = online_of_rows(m, z)
            lse = m + tl.log(z)
            tl.store(LSE + row, lse, alive)
            of_p = lse * tl.full((), 2 * Z_LOSS, dtype)
            if K is not None:
                of_p *= tl.load(K + row, alive, other=0.0).to(dtype)
        if D is not None:
            last = tl.cdiv(n, BLOCK) * BLOCK - BLOCK if LOOP else 0
            for back in range(0, n if LOOP else BLOCK, BLOCK):
                place = last - back + column
                inside = alive[:, None] & (place < n)
                logits = read(LOGITS + start, place * s_n, inside)
                d = read(D + start, place * s_n, inside)
                if Z_LOSS > 0:
                    d += of_p[:, None] * tl.exp(logits - lse[:, None])
                if SOFTCAP > 0:
                    capped = logits * constant(1 / SOFTCAP, logits)
                    d *= 1 - capped * capped
                write(D + start, place * s_n, inside, d)


@planned
def plan_softcap(n: int, dtype: torch.dtype, softcap: float) -> Launch:
    """c tanh(z/c) of ``n`` elements."""
    return pointwise.forward.launch(**pointwise.grid(n, dtype), F=_softcap, A=softcap, B=None)


@planned
def plan(
    shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, count: int,
    z_loss: float, softcap: float,
) -> Launch:  # fmt: skip
    """Of the rows of a dense (N, C) or (N, C, D), on ``count`` multiprocessors."""
    shape, strides = as_rows(shape, strides)
    named = {"Z_LOSS": z_loss, "SOFTCAP": softcap}
    return over_rows(_finish, shape, [strides], dtype, 4, count, **named)


def softcap_(z: Tensor, softcap: float) -> None:
    """c tanh(z/c) over a contiguous z."""
    plan_softcap(z.numel(), z.dtype, softcap)(z, z)


def losses(
    logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, smoothing: float,
    loss: Tensor | None, makes: int, spare: bool,
) -> Tensor | None:  # fmt: skip
    """Each row's cross-entropy in ``loss``; and its gradient, over ``logits`` if they are
    ``spare``."""
    over = logits if spare and makes == GRADIENT else None
    return cross_entropy.forward(
        logits, target, weight, NONE, ignore_index, smoothing, makes, loss, over
    )[1]  # fmt: skip


def finish(
    logits: Tensor, d: Tensor | None, lse: Tensor | None, k: Tensor | None, z_loss: float,
    softcap: float,
) -> None:  # fmt: skip
    """See :func:`_finish`. ``logits`` and ``d`` are contiguous."""
    on = logits.dtype, multiprocessors(logits.device)
    run = plan(logits.shape, logits.stride(), *on, z_loss, softcap)
    run(logits, d, lse, None if k is None else k.contiguous())

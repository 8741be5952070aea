"""The matrix product, tiled, with a bias and an activation in its epilogue. A transpose is a pair
of strides."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

from .activation import constants
from .elementary import half, upcast
from .launch import Launch, cdiv, kernel, planned


def matmul_config(m: int, n: int, dtype: torch.dtype, activation: bool = False) -> tuple[int, ...]:
    """(M, N, K, warps, stages) by shape and dtype, and by whether an activation follows, so that
    every rank of a run takes the same."""
    small = min(m, n) < 64
    if dtype == torch.float64:
        # larger tiles of 64-bit operands spill, as do two stages with triton 3.6 on sm_100, and elu
        # at 4 warps
        return (32, 32, 16, 8, 1)
    if dtype == torch.float32:
        # behind a tile of 64x64 half of the activations spill; with three stages x Wᵀ without a
        # bias has 8 bytes on the stack of sm_90
        wide = 32 if activation else 64
        return (32, 32, 32, 4, 3) if small else (64, wide, 16, 4, 2)
    if m >= 128 and n >= 128:
        # a 128x128 accumulator is 64 registers a thread at 8 warps
        return (128, 128, 64, 8, 3)
    return (32, 32, 64, 4, 3) if small else (64, 64, 64, 4, 3)


@kernel
def _product(
    X, Y, BIAS, OUT, Z, m, n, k, x_row, x_inner, y_inner, y_column,
    F: tl.constexpr, A: tl.constexpr, B: tl.constexpr, PRECISION: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out = f(x y + bias), an M x N tile a program; z is the argument of f. Tiles run down GROUP
    rows first: their operands stay in L2."""
    program = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(m, M), tl.cdiv(n, N)
    group = program // (GROUP * tiles_n)
    rows_in_group = tl.minimum(tiles_m - group * GROUP, GROUP)
    tile_m = group * GROUP + (program % (GROUP * tiles_n)) % rows_in_group
    tile_n = (program % (GROUP * tiles_n)) // rows_in_group

    row = tile_m.to(tl.int64) * M + tl.arange(0, M)
    column = tile_n.to(tl.int64) * N + tl.arange(0, N)
    inner = tl.arange(0, K)
    x = X + row[:, None] * x_row + inner[None, :].to(tl.int64) * x_inner
    y = Y + inner[:, None].to(tl.int64) * y_inner + column[None, :] * y_column
    wide = tl.float64 if X.dtype.element_ty == tl.float64 else tl.float32
    total = tl.zeros((M, N), dtype=wide)
    for done in range(0, k, K):
        left = inner < k - done
        a = tl.load(x, mask=(row < m)[:, None] & left[None, :], other=0.0)
        b = tl.load(y, mask=left[:, None] & (column < n)[None, :], other=0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION, out_dtype=wide)
        x += tl.full((), K, tl.int64) * x_inner
        y += tl.full((), K, tl.int64) * y_inner
    if BIAS is not None:
        total += upcast(tl.load(BIAS + column, column < n, other=0.0))[None, :]
    inside = (row < m)[:, None] & (column < n)[None, :]
    place = row[:, None] * n + column[None, :]
    if Z is not None:
        tl.store(Z + place, total.to(Z.dtype.element_ty), inside)
    if F is not None:
        total = F(total, A, B, half(OUT))
    tl.store(OUT + place, total.to(OUT.dtype.element_ty), inside)


def precision() -> str:
    """torch's own setting, whichever of its three ways it was made: TF32 where it allows TF32, else
    full float32."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


@planned
def plan(
    m: int, n: int, k: int, strides: tuple[int, ...], dtype: torch.dtype, tf32: str,
    activation: str | None, *parameters: float,
) -> Launch:  # fmt: skip
    """The product of (m, k) and (k, n) in these four strides."""
    M, N, K, warps, stages = matmul_config(m, n, dtype, activation is not None)
    named = dict(zip(("x_row", "x_inner", "y_inner", "y_column"), strides, strict=True))
    return _product.launch(
        cdiv(m, M) * cdiv(n, N), m=m, n=n, k=k, **named, **constants(activation, 0, parameters),
        PRECISION=tf32, M=M, N=N, K=K, GROUP=8, num_warps=warps, num_stages=stages,
    )  # fmt: skip


def product(
    x: Tensor, y: Tensor, bias: Tensor | None = None, activation: str | None = None,
    parameters: tuple[float, ...] = (), keep_z: bool = False, shape: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(f(x y + bias), z) for x (m, k) and y (k, n) of any strides.

    Args:
        keep_z: whether z is wanted, the argument of f; else it is None.
        shape: of the results. Default: (m, n).
    """
    (m, k), n = x.shape, y.shape[1]
    out = x.new_empty((m, n) if shape is None else shape)
    z = torch.empty_like(out) if keep_z else None
    strides = (*x.stride(), *y.stride())
    run = plan(m, n, k, strides, x.dtype, precision(), activation, *parameters)
    run(x, y, None if bias is None else bias.contiguous(), out, z)
    return out, z

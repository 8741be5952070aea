"""The linear layer: a tiled matrix product with a fused bias + activation, and one pass for dz and
the column sums of db.

All three products (y = x Wᵀ, dx = dz W, dW = dzᵀ x) are one kernel: a transpose is a pair of
strides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import constants
from .activation import forward as activation_forward_pass
from .activation import forward_ as activation_over
from .elementary import upcast
from .launch import accumulator, bind, cdiv, kept, launch, multiprocessors, next_power_of_2

SAVES_OUTPUT = frozenset({"relu", "relu6", "hardtanh", "sigmoid", "tanh"})

#: (dtype, rows of the result, columns of the result, inner size), each size rounded up to a power
#: of two -> whether our product is the faster one. What is not here goes to the vendor's library.
#: Empty, since on an H100 that was the faster one by a quarter or more, and with the activation in
#: our epilogue still, but for a few small sizes where 10 % are to be had (``python -m
#: benchmarks.products``).
FASTER: dict[tuple[torch.dtype, int, int, int], bool] = {}


@dataclass(frozen=True)
class Config:
    """Tile sizes and the launch options of a product."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def config(m: int, n: int, dtype: torch.dtype, activation: bool = False) -> Config:
    """By shape and dtype, and by whether an activation follows, so that every rank of a run takes
    the same."""
    if dtype == torch.float64:
        return Config(
            32, 32, 16, 8, 1
        )  # 64-bit operands: larger tiles spill, as do two stages with triton 3.6 on sm_100, elu at 4 warps
    if dtype == torch.float32:
        # behind a tile of 64x64 half of the activations spill
        return (
            Config(64, 32 if activation else 64, 32, 4, 3)
            if min(m, n) >= 64
            else Config(32, 32, 32, 4, 3)
        )
    if m >= 128 and n >= 128:
        return Config(
            128, 128, 64, 8, 3
        )  # a 128x128 accumulator is 64 registers a thread at 8 warps
    return Config(64, 64, 64, 4, 3) if min(m, n) >= 64 else Config(32, 32, 64, 4, 3)


@triton.jit
def _product(
    X, Y, BIAS, OUT, Z, m, n, k, x_row, x_inner, y_inner, y_column,
    HAS_BIAS: tl.constexpr, HAS_F: tl.constexpr, STORE_Z: tl.constexpr, F: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr,
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
    x = X + row[:, None] * x_row + inner[None, :] * x_inner
    y = Y + inner[:, None] * y_inner + column[None, :] * y_column
    wide = tl.float64 if X.dtype.element_ty == tl.float64 else tl.float32
    total = tl.zeros((M, N), dtype=wide)
    for done in range(0, k, K):
        left = inner < k - done
        a = tl.load(x, mask=(row < m)[:, None] & left[None, :], other=0.0)
        b = tl.load(y, mask=left[:, None] & (column < n)[None, :], other=0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION, out_dtype=wide)
        x += K * x_inner
        y += K * y_inner
    if HAS_BIAS:
        total += upcast(tl.load(BIAS + column, column < n, other=0.0))[None, :]
    inside = (row < m)[:, None] & (column < n)[None, :]
    place = row[:, None] * n + column[None, :]
    if STORE_Z:
        tl.store(Z + place, total.to(Z.dtype.element_ty), inside)
    if HAS_F:
        total = F(total, A, B)
    tl.store(OUT + place, total.to(OUT.dtype.element_ty), inside)


@triton.jit
def _columns(
    DY, SAVED, DZ, PARTIAL, m, n, rows,
    HAS_F: tl.constexpr, NEED_BIAS: tl.constexpr, F: tl.constexpr, A: tl.constexpr, B: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """dz = dy f'(saved) for a range of rows and N columns a program, and the sum of dz over that
    range in PARTIAL[range]."""
    tiles_n = tl.cdiv(n, N)
    part = (tl.program_id(0) // tiles_n).to(tl.int64)
    column = (tl.program_id(0) % tiles_n) * N + tl.arange(0, N)
    wide = tl.float64 if DY.dtype.element_ty == tl.float64 else tl.float32
    total = tl.zeros(
        (M, N), dtype=wide
    )  # each thread adds up its own, so that no iteration waits for another's
    for first in range(0, rows, M):
        row = part * rows + first + tl.arange(0, M)
        inside = (
            (first + tl.arange(0, M) < rows)[:, None] & (row < m)[:, None] & (column < n)[None, :]
        )
        place = row[:, None] * n + column[None, :]
        dz = upcast(tl.load(DY + place, inside, other=0.0))
        if HAS_F:
            dz *= F(upcast(tl.load(SAVED + place, inside, other=0.0)), A, B)
            tl.store(DZ + place, dz.to(DZ.dtype.element_ty), inside)
        if NEED_BIAS:
            total += tl.where(inside, dz, 0.0)
    if NEED_BIAS:
        tl.store(PARTIAL + part * n + column, tl.sum(total, 0), column < n)


def rows_of(t: Tensor) -> Tensor:
    """(..., n) as (rows, n)."""
    return t if t.dim() == 2 else t.reshape(t.shape[:-1].numel(), t.shape[-1])


def _precision() -> str:
    """torch's own setting, whichever of its three ways it was made: TF32 where it allows TF32, else
    full float32."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _ours(always: bool, dtype: torch.dtype, m: int, n: int, k: int) -> bool:
    return always or (
        bool(FASTER)
        and FASTER.get((dtype, next_power_of_2(m), next_power_of_2(n), next_power_of_2(k)), False)
    )


def product(
    x: Tensor,
    y: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    parameters: tuple[float, ...] = (),
    keep_z: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """(f(x y + bias), z) for x (m, k) and y (k, n) of any strides; z is None unless ``keep_z``."""
    (m, k), n = x.shape, y.shape[1]
    bias = None if bias is None else bias.contiguous()
    out = x.new_empty(m, n)
    z = x.new_empty(m, n) if keep_z else None
    c = config(m, n, x.dtype, activation is not None)
    function = dict.fromkeys("FAB") if activation is None else constants(activation, 0, parameters)
    launch(
        _product, cdiv(m, c.block_m) * cdiv(n, c.block_n), x, y, bias, out, z, m, n, k, *x.stride(), *y.stride(),
        HAS_BIAS=bias is not None, HAS_F=activation is not None, STORE_Z=keep_z, **function,
        PRECISION=_precision(), M=c.block_m, N=c.block_n, K=c.block_k, GROUP=8, num_warps=c.num_warps, num_stages=c.num_stages,
    )  # fmt: skip
    return out, z


#: rows whose columns are added up by one program: beyond, several leave partial sums, for which one
#: more kernel is launched
ALONE = 256


def columns(
    dy: Tensor,
    saved: Tensor | None,
    activation: str | None,
    parameters: tuple[float, ...],
    need_bias: bool,
) -> tuple[Tensor, Tensor | None]:
    """(dz, db) of dy (m, n) in one pass: dz = dy f'(saved), db = Σ_rows dz (None unless it is
    needed). Without an activation dz is dy."""
    m, n = dy.shape
    dy = dy.contiguous()
    dz = dy if activation is None else torch.empty_like(dy)
    if not (m and n):
        return dz, dy.new_zeros(n) if need_bias else None
    block_m, block_n = (16, 64) if dy.dtype == torch.float64 else (16, 128)
    tiles = cdiv(n, block_n)
    parts = 1 if m <= ALONE else min(cdiv(m, block_m), cdiv(8 * multiprocessors(dy.device), tiles))
    sums = None
    if need_bias:
        sums = (
            dy.new_empty(n) if parts == 1 else dy.new_empty(parts, n, dtype=accumulator(dy.dtype))
        )
    _bound_columns(activation or "", dy.dtype == torch.float64, need_bias, *parameters)(
        parts * tiles, dy, saved, None if activation is None else dz, sums, m, n, cdiv(m, parts)
    )
    return dz, sums if sums is None or parts == 1 else sums.sum(0).to(dy.dtype)


@kept
def _bound_columns(activation: str, double: bool, need_bias: bool, *parameters: float) -> Any:
    function = constants(activation, 1, parameters) if activation else dict.fromkeys("FAB")
    return bind(
        _columns,
        4,
        3,
        HAS_F=bool(activation),
        NEED_BIAS=need_bias,
        **function,
        M=16,
        N=64 if double else 128,
    )


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, *, always: bool) -> Tensor:
    """y = x Wᵀ + b."""
    if not (always or FASTER):
        return torch.nn.functional.linear(x, weight, bias)
    flat = rows_of(x)
    if not _ours(always, x.dtype, flat.shape[0], *weight.shape):
        return torch.nn.functional.linear(x, weight, bias)
    return product(flat, weight.t(), bias)[0].view(*x.shape[:-1], weight.shape[0])


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
    *,
    always: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx = dy W, dW = dyᵀ x, db = Σ_rows dy; None for each that is not needed."""
    flat = rows_of(dy)
    db = columns(flat, None, None, (), True)[1] if need_bias else None
    dx, dw = _products(flat, x, weight, need_x, need_weight, always)
    if dx is not None and dy.dim() != 2:
        dx = dx.view(*dy.shape[:-1], weight.shape[1])
    return dx, dw, db


def activation_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    parameters: Any,
    *,
    always: bool,
) -> tuple[Tensor, Tensor | None]:
    """y = f(z), and z where the derivative needs it: both from the product's epilogue."""
    keep = activation not in SAVES_OUTPUT
    if always or FASTER:
        flat, shape = rows_of(x), (*x.shape[:-1], weight.shape[0])
        if _ours(always, x.dtype, flat.shape[0], *weight.shape):
            y, z = product(flat, weight.t(), bias, activation, tuple(parameters), keep)
            return y.view(shape), None if z is None else z.view(shape)
    z = torch.nn.functional.linear(x, weight, bias)
    if keep:
        return activation_forward_pass(activation, z, *parameters), z
    activation_over(activation, z, *parameters)
    return z, None


def activation_backward(
    dy: Tensor, x: Tensor, weight: Tensor, saved: Tensor, activation: str, parameters: Any,
    need_x: bool, need_weight: bool, need_bias: bool, *, always: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """dz and db in one pass, then dx = dz W and dW = dzᵀ x; None for each that is not needed."""
    dz, db = columns(
        rows_of(dy), rows_of(saved).contiguous(), activation, tuple(parameters), need_bias
    )
    dx, dw = _products(dz, x, weight, need_x, need_weight, always)
    return None if dx is None else dx.view(x.shape), dw, db


def _products(
    dz: Tensor, x: Tensor, weight: Tensor, need_x: bool, need_weight: bool, always: bool
) -> tuple[Tensor | None, Tensor | None]:
    dx = dw = None
    if need_x:
        ours = _ours(always, dz.dtype, dz.shape[0], weight.shape[1], dz.shape[1])
        dx = product(dz, weight)[0] if ours else torch.mm(dz, weight)
    if need_weight:
        flat = rows_of(x)
        ours = _ours(always, dz.dtype, dz.shape[1], flat.shape[1], dz.shape[0])
        dw = product(dz.t(), flat)[0] if ours else torch.mm(dz.t(), flat)
    return dx, dw

"""Pointwise losses: device functions (value and partial derivatives), one kernel each way, and
their launchers.

A device function takes (x, t, v, A, B, C, HALF), a derivative dy before them, which it multiplies
by: the tensors in the accumulator's dtype, the parameters as compile-time constants, and whether x
came from 16 bits. A reduced loss is
summed in two stages, without atomics: each program walks its own blocks and stores one partial sum.
Formulas: ``custom_backprop/formulas/loss.py``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .elementary import (
    constant,
    divide,
    exp,
    exp_minus,
    half,
    log,
    log1p,
    log1p_positive,
    softplus,
    upcast,
)
from .launch import Launch, cdiv, kernel, multiprocessors, planned
from .pointwise import block_of, grid, like
from .rows import partial_sums, read, total, write

NONE, MEAN, BATCHMEAN = 0, 1, 3

HALF_LOG_2PI = tl.constexpr(0.9189385332046727)

#: programs a multiprocessor of a kernel that sums: enough to fill it, few enough for the second
#: stage to be one block
PROGRAMS = 8


@triton.jit
def mse_loss(x, t, v, A, B, C, HALF: tl.constexpr):
    d = x - t
    return d * d


@triton.jit
def mse_loss_dx(dy, x, t, v, A, B, C, HALF: tl.constexpr):
    return 2 * dy * (x - t)  # 2 d may overflow where 2 d / n does not


@triton.jit
def l1_loss(x, t, v, A, B, C, HALF: tl.constexpr):
    return tl.abs(x - t)


@triton.jit
def l1_loss_dx(dy, x, t, v, A, B, C, HALF: tl.constexpr):
    d = x - t
    return dy * tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, 0.0)).to(d.dtype)


@triton.jit
def smooth_l1_loss(x, t, v, A, B, C, HALF: tl.constexpr):
    a = tl.abs(x - t)
    return tl.where(a < constant(A, a), 0.5 * a * a / A, a - 0.5 * A)


@triton.jit
def smooth_l1_loss_dx(dy, x, t, v, A, B, C, HALF: tl.constexpr):
    d = (x - t) / A
    return dy * tl.where(d > 1, 1.0, tl.where(d < -1, -1.0, d))


@triton.jit
def huber_loss(x, t, v, A, B, C, HALF: tl.constexpr):
    a = tl.abs(x - t)
    return tl.where(a <= constant(A, a), 0.5 * a * a, A * (a - 0.5 * A))


@triton.jit
def huber_loss_dx(dy, x, t, v, A, B, C, HALF: tl.constexpr):
    d = x - t
    limit = constant(A, d)
    return dy * tl.where(d > limit, limit, tl.where(d < -limit, -limit, d))


@triton.jit
def _log_from_minus_100(y):
    """max(y, -100), or NaN."""
    return tl.maximum(y, -100.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def binary_cross_entropy(x, t, v, A, B, C, HALF: tl.constexpr):
    return (t - 1) * _log_from_minus_100(log1p(-x, HALF)) - t * _log_from_minus_100(log(x, HALF))


@triton.jit
def binary_cross_entropy_dx(dy, x, t, v, A, B, C, HALF: tl.constexpr):
    d = (1 - x) * x
    return divide(dy * (x - t), tl.where(d < 1e-12, 1e-12, d), HALF)


@triton.jit
def binary_cross_entropy_dt(dy, x, t, v, A, B, C, HALF: tl.constexpr):
    return dy * (log1p(-x, HALF) - log(x, HALF))


@triton.jit
def binary_cross_entropy_with_logits(x, t, p, A, B, C, HALF: tl.constexpr):
    """p t max(-x, 0) + (1 - t) max(x, 0) + (1 + (p - 1) t) log(1 + e^-|x|)."""
    softness = (1 + (p - 1) * t) * log1p_positive(exp_minus(tl.abs(x), HALF), HALF)
    return softness - x * tl.where(x < 0, p * t, t - 1)


@triton.jit
def binary_cross_entropy_with_logits_dx(dy, x, t, p, A, B, C, HALF: tl.constexpr):
    """(1 - t) σ(x) - p t σ(-x), both from e^-|x|."""
    e = exp_minus(tl.abs(x), HALF)
    slope = tl.where(x < 0, (t - 1) * e + p * t, t - 1 + p * t * e)
    return -dy * (slope * divide(1.0, 1 + e, HALF))


@triton.jit
def binary_cross_entropy_with_logits_dt(dy, x, t, p, A, B, C, HALF: tl.constexpr):
    return dy * ((p - 1) * softplus(-x, HALF) - x)


@triton.jit
def kl_div(x, t, v, LOG_TARGET, B, C, HALF: tl.constexpr):
    if LOG_TARGET:
        return exp(t, HALF) * (t - x)
    return tl.where(t == 0, 0.0, t * log(t, HALF)) - t * x


@triton.jit
def kl_div_dx(dy, x, t, v, LOG_TARGET, B, C, HALF: tl.constexpr):
    return dy * (-exp(t, HALF) if LOG_TARGET else -t)


@triton.jit
def kl_div_dt(dy, x, t, v, LOG_TARGET, B, C, HALF: tl.constexpr):
    if LOG_TARGET:
        return dy * exp(t, HALF) * (t - x + 1)
    return dy * (log(t, HALF) - x + 1)


@triton.jit
def _variance(v, EPS):
    """max(v, ε), and NaN where v is negative: to raise, the host would have to wait."""
    return tl.where(v < 0, float("nan"), tl.where(v < EPS, EPS, v))


@triton.jit
def gaussian_nll_loss(x, t, v, FULL, EPS, C, HALF: tl.constexpr):
    d = x - t
    v = _variance(v, EPS)
    loss = 0.5 * (log(v, HALF) + divide(d * d, v, HALF))
    return loss + HALF_LOG_2PI if FULL else loss


@triton.jit
def gaussian_nll_loss_dx(dy, x, t, v, FULL, EPS, C, HALF: tl.constexpr):
    return divide(dy * (x - t), _variance(v, EPS), HALF)


@triton.jit
def gaussian_nll_loss_dv(dy, x, t, v, FULL, EPS, C, HALF: tl.constexpr):
    d = x - t
    v = _variance(v, EPS)
    return dy * divide(0.5 * (1 - divide(d * d, v, HALF)), v, HALF)


@triton.jit
def poisson_nll_loss(x, t, v, LOG_INPUT, FULL, EPS, HALF: tl.constexpr):
    loss = exp(x, HALF) - t * x if LOG_INPUT else x - t * log(x + EPS, HALF)
    if FULL:
        many = tl.where(t > 1, t, 1.0)
        stirling = (many + 0.5) * log(many, HALF) - t + HALF_LOG_2PI
        loss += tl.where(t <= 1, 0.0, stirling)
    return loss


@triton.jit
def poisson_nll_loss_dx(dy, x, t, v, LOG_INPUT, FULL, EPS, HALF: tl.constexpr):
    return dy * (exp(x, HALF) - t if LOG_INPUT else 1 - t / (x + EPS))


@triton.jit
def poisson_nll_loss_dt(dy, x, t, v, LOG_INPUT, FULL, EPS, HALF: tl.constexpr):
    dt = -x if LOG_INPUT else -log(x + EPS, HALF)
    if FULL:
        many = tl.where(t > 1, t, 1.0)
        dt += tl.where(t <= 1, 0.0, log(many, HALF) + 0.5 / many)
    return dy * dt


#: name -> (l, l_x, l_t, l_v); l_t None: -l_x
DEVICE_FUNCTIONS = {
    "mse_loss": (mse_loss, mse_loss_dx, None, None),
    "l1_loss": (l1_loss, l1_loss_dx, None, None),
    "smooth_l1_loss": (smooth_l1_loss, smooth_l1_loss_dx, None, None),
    "huber_loss": (huber_loss, huber_loss_dx, None, None),
    "binary_cross_entropy":
        (binary_cross_entropy, binary_cross_entropy_dx, binary_cross_entropy_dt, None),
    "binary_cross_entropy_with_logits": (
        binary_cross_entropy_with_logits, binary_cross_entropy_with_logits_dx,
        binary_cross_entropy_with_logits_dt, None,
    ),
    "kl_div": (kl_div, kl_div_dx, kl_div_dt, None),
    "gaussian_nll_loss": (gaussian_nll_loss, gaussian_nll_loss_dx, None, gaussian_nll_loss_dv),
    "poisson_nll_loss": (poisson_nll_loss, poisson_nll_loss_dx, poisson_nll_loss_dt, None),
}  # fmt: skip


@kernel
def _forward(
    X, T, V, W, Y, DX, n, blocks, divisor,
    F: tl.constexpr, L_X: tl.constexpr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr,
    REDUCED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``blocks`` blocks a program: y = w l, or, if REDUCED, their sum in Y[program]; and dx = w
    l_x, over the divisor, if there is a DX.

    V, W, DX and the divisor may be None. Without V, v is 1.
    """
    HALF: tl.constexpr = half(X)
    program = tl.program_id(0)
    sums = tl.zeros([BLOCK], Y.dtype.element_ty)
    for block in range(blocks):
        start, offsets, inside = block_of(program.to(tl.int64) * blocks + block, n, BLOCK)
        x = read(X + start, offsets, inside)
        t = read(T + start, offsets, inside)
        v = 1.0 if V is None else read(V + start, offsets, inside)
        w = tl.full((), 1, x.dtype) if W is None else read(W + start, offsets, inside)
        loss = w * F(x, t, v, A, B, C, HALF)
        if REDUCED:
            sums += tl.where(inside, loss, 0.0)
        else:
            write(Y + start, offsets, inside, loss)
        if DX is not None:
            write(
                DX + start,
                offsets,
                inside,
                L_X(w if divisor is None else w / divisor, x, t, v, A, B, C, HALF),
            )
    if REDUCED:
        tl.store(Y + program, tl.sum(sums))


@kernel
def _backward(
    DY, X, T, V, W, DX, DT, DV, DW, n, divisor,
    F: tl.constexpr, L_X: tl.constexpr, L_T: tl.constexpr, L_V: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr, C: tl.constexpr,
    SCALAR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradients that are wanted (else None), of one dy for all elements if SCALAR, over the
    divisor."""
    HALF: tl.constexpr = half(X)
    start, offsets, inside = block_of(tl.program_id(0), n, BLOCK)
    dy = upcast(tl.load(DY)) if SCALAR else read(DY + start, offsets, inside)
    if divisor is not None:
        dy = dy / divisor
    x = read(X + start, offsets, inside)
    t = read(T + start, offsets, inside)
    v = 1.0 if V is None else read(V + start, offsets, inside)
    if DW is not None:
        write(DW + start, offsets, inside, dy * F(x, t, v, A, B, C, HALF))
    if W is not None:
        dy = dy * read(W + start, offsets, inside)
    if DX is not None:
        write(DX + start, offsets, inside, L_X(dy, x, t, v, A, B, C, HALF))
    if DT is not None:
        dt = L_X(-dy, x, t, v, A, B, C, HALF) if L_T is None else L_T(dy, x, t, v, A, B, C, HALF)
        write(DT + start, offsets, inside, dt)
    if DV is not None:
        write(DV + start, offsets, inside, L_V(dy, x, t, v, A, B, C, HALF))


def _divisor(x: Tensor, reduction: int) -> int | None:
    return x.numel() if reduction == MEAN else x.shape[0] if reduction == BATCHMEAN else None


def _parameters(given: tuple[Any, ...]) -> dict[str, Any]:
    return dict(zip("ABC", (*given, None, None, None), strict=False))


@planned
def plan(
    name: str, n: int, divisor: int | None, reduction: int, dtype: torch.dtype, count: int,
    *parameters: Any,
) -> Launch:  # fmt: skip
    """Forward of ``n`` elements, on ``count`` multiprocessors."""
    value, derivative, *_ = DEVICE_FUNCTIONS[name]
    of_grid = grid(n, dtype)
    programs = of_grid.pop("programs")
    blocks = max(cdiv(programs, PROGRAMS * count), 1) if reduction != NONE else 1
    return _forward.launch(
        cdiv(programs, blocks), **of_grid, blocks=blocks, divisor=divisor, F=value, L_X=derivative,
        **_parameters(parameters), REDUCED=reduction != NONE,
    )  # fmt: skip


@planned
def plan_backward(
    name: str, n: int, divisor: int | None, reduction: int, dtype: torch.dtype, scalar: bool,
    *parameters: Any,
) -> Launch:  # fmt: skip
    """Backward of ``n`` elements, of one dy for all if ``scalar``."""
    functions = dict(zip(("F", "L_X", "L_T", "L_V"), DEVICE_FUNCTIONS[name], strict=True))
    return _backward.launch(
        **grid(n, dtype), divisor=divisor, **functions, **_parameters(parameters), SCALAR=scalar
    )


def forward(
    name: str, x: Tensor, t: Tensor, v: Tensor | None, w: Tensor | None, reduction: int,
    make_dx: bool, *parameters: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The loss, and dx for dy = 1 if ``make_dx``. x, t, v, w: one shape and dtype, any strides."""
    n = x.numel()
    dx = torch.empty_like(x) if make_dx else None
    layout = dx if dx is not None else x if x.is_contiguous() else torch.empty_like(x)
    operands = [None if a is None else like(a, layout) for a in (x, t, v, w)]
    divisor = _divisor(x, reduction)
    run = plan(name, n, divisor, reduction, x.dtype, multiprocessors(x.device), *parameters)
    if reduction == NONE:
        y = torch.empty_like(x)
        run(*operands, y, dx)
    elif n == 0:
        y = x.new_full((), math.nan if divisor == 0 else 0.0)
    else:
        y, partial = x.new_empty(()), partial_sums(x, run.programs)
        run(*operands, partial, dx)
        total(partial, y, divisor)
    return y, dx


def backward(
    name: str, dy: Tensor, x: Tensor, t: Tensor, v: Tensor | None, w: Tensor | None, reduction: int,
    needs: list[bool], *parameters: Any,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """dx, dt, dv and dw in the strides of x; None for each that is not needed."""
    grads = [torch.empty_like(x) if need else None for need in needs]
    layout = next(g for g in grads if g is not None)
    operands = [None if a is None else like(a, layout) for a in (x, t, v, w)]
    scalar = not any(dy.stride())
    divisor = _divisor(x, reduction)
    run = plan_backward(name, x.numel(), divisor, reduction, x.dtype, scalar, *parameters)
    named = dict(zip(("DX", "DT", "DV", "DW"), grads, strict=True))
    run(dy if scalar else like(dy, layout), *operands, **named)
    return tuple(grads)

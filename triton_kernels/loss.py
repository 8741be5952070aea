"""Pointwise losses: device functions (value and partial derivatives), one kernel each way, and
their launchers.

A device function takes (x, t, v, A, B, C): the tensors in the accumulator's dtype, the parameters
as compile-time constants. Formulas: ``custom_backprop/formulas/loss.py``. A reduced loss is summed
in two stages, without atomics: each program walks its own blocks and leaves one partial sum, and
one program adds these. The same shape gives the same bits.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import BLOCK, like
from .elementary import constant, exp, exp_minus, log1p, log1p_positive, sigmoid, softplus, upcast
from .launch import accumulator, bind, cdiv, kept, multiprocessors, next_power_of_2

NONE, MEAN = 0, 1

# programs a multiprocessor that a summing kernel is cut into: enough to keep it full, few enough
# for the second stage to be one block
PROGRAMS = 8


@triton.jit
def mse_loss(x, t, v, A, B, C):
    d = x - t
    return d * d


@triton.jit
def mse_loss_dx(x, t, v, A, B, C):
    return 2 * (x - t)


@triton.jit
def l1_loss(x, t, v, A, B, C):
    return tl.abs(x - t)


@triton.jit
def l1_loss_dx(x, t, v, A, B, C):
    d = x - t
    return tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, 0.0)).to(d.dtype)


@triton.jit
def smooth_l1_loss(x, t, v, A, B, C):
    a = tl.abs(x - t)
    return tl.where(a < constant(A, a), 0.5 * a * a / A, a - 0.5 * A)


@triton.jit
def smooth_l1_loss_dx(x, t, v, A, B, C):
    d = (x - t) / A
    return tl.where(d > 1, 1.0, tl.where(d < -1, -1.0, d))


@triton.jit
def huber_loss(x, t, v, A, B, C):
    a = tl.abs(x - t)
    return tl.where(a <= constant(A, a), 0.5 * a * a, A * (a - 0.5 * A))


@triton.jit
def huber_loss_dx(x, t, v, A, B, C):
    d = x - t
    limit = constant(A, d)
    return tl.where(d > limit, limit, tl.where(d < -limit, -limit, d))


@triton.jit
def _log_from_minus_100(y):
    """max(y, -100) that keeps a NaN."""
    return tl.where(y < -100, -100.0, y)


@triton.jit
def binary_cross_entropy(x, t, v, A, B, C):
    return (t - 1) * _log_from_minus_100(log1p(-x)) - t * _log_from_minus_100(tl.log(x))


@triton.jit
def binary_cross_entropy_dx(x, t, v, A, B, C):
    d = (1 - x) * x
    return (x - t) / tl.where(d < 1e-12, 1e-12, d)


@triton.jit
def binary_cross_entropy_dt(x, t, v, A, B, C):
    return log1p(-x) - tl.log(x)


@triton.jit
def positive(x):
    """max(x, 0) that keeps a NaN."""
    return tl.where(x < 0, 0.0, x)


@triton.jit
def binary_cross_entropy_with_logits(x, t, p, A, B, C):
    return (
        p * t * positive(-x)
        + (1 - t) * positive(x)
        + (1 + (p - 1) * t) * log1p_positive(exp_minus(tl.abs(x)))
    )


@triton.jit
def binary_cross_entropy_with_logits_dx(x, t, p, A, B, C):
    return (1 + (p - 1) * t) * sigmoid(x) - p * t


@triton.jit
def binary_cross_entropy_with_logits_dt(x, t, p, A, B, C):
    return (p - 1) * softplus(-x) - x


@triton.jit
def kl_div(x, t, v, LOG_TARGET, B, C):
    if LOG_TARGET:
        return exp(t) * (t - x)
    return tl.where(t == 0, 0.0, t * tl.log(t)) - t * x


@triton.jit
def kl_div_dx(x, t, v, LOG_TARGET, B, C):
    return -exp(t) if LOG_TARGET else -t


@triton.jit
def kl_div_dt(x, t, v, LOG_TARGET, B, C):
    if LOG_TARGET:
        return exp(t) * (t - x + 1)
    return tl.log(t) - x + 1


@triton.jit
def _variance(v, EPS):
    """max(v, ε), and NaN where v is negative: to raise, the host would have to wait."""
    return tl.where(v < 0, float("nan"), tl.where(v < EPS, EPS, v))


@triton.jit
def gaussian_nll_loss(x, t, v, FULL, EPS, C):
    d = x - t
    v = _variance(v, EPS)
    loss = 0.5 * (tl.log(v) + d * d / v)
    return loss + 0.9189385332046727 if FULL else loss  # log(2π) / 2


@triton.jit
def gaussian_nll_loss_dx(x, t, v, FULL, EPS, C):
    return (x - t) / _variance(v, EPS)


@triton.jit
def gaussian_nll_loss_dv(x, t, v, FULL, EPS, C):
    d = x - t
    v = _variance(v, EPS)
    return 0.5 * (1 - d * d / v) / v


@triton.jit
def poisson_nll_loss(x, t, v, LOG_INPUT, FULL, EPS):
    loss = exp(x) - t * x if LOG_INPUT else x - t * tl.log(x + EPS)
    if FULL:
        many = tl.where(t > 1, t, 1.0)
        loss += tl.where(
            t <= 1, 0.0, many * tl.log(many) - t + 0.5 * tl.log(6.283185307179586 * many)
        )
    return loss


@triton.jit
def poisson_nll_loss_dx(x, t, v, LOG_INPUT, FULL, EPS):
    return exp(x) - t if LOG_INPUT else 1 - t / (x + EPS)


@triton.jit
def poisson_nll_loss_dt(x, t, v, LOG_INPUT, FULL, EPS):
    dt = -x if LOG_INPUT else -tl.log(x + EPS)
    if FULL:
        many = tl.where(t > 1, t, 1.0)
        dt += tl.where(t <= 1, 0.0, tl.log(many) + 0.5 / many)
    return dt


#: name -> (l, l_x, l_t, l_v); l_t None: -l_x
DEVICE_FUNCTIONS = {
    "mse_loss": (mse_loss, mse_loss_dx, None, None),
    "l1_loss": (l1_loss, l1_loss_dx, None, None),
    "smooth_l1_loss": (smooth_l1_loss, smooth_l1_loss_dx, None, None),
    "huber_loss": (huber_loss, huber_loss_dx, None, None),
    "binary_cross_entropy": (
        binary_cross_entropy,
        binary_cross_entropy_dx,
        binary_cross_entropy_dt,
        None,
    ),
    "binary_cross_entropy_with_logits": (
        binary_cross_entropy_with_logits,
        binary_cross_entropy_with_logits_dx,
        binary_cross_entropy_with_logits_dt,
        None,
    ),
    "kl_div": (kl_div, kl_div_dx, kl_div_dt, None),
    "gaussian_nll_loss": (gaussian_nll_loss, gaussian_nll_loss_dx, None, gaussian_nll_loss_dv),
    "poisson_nll_loss": (poisson_nll_loss, poisson_nll_loss_dx, poisson_nll_loss_dt, None),
}


@triton.jit
def _forward(
    X, T, V, W, Y, DX, n, blocks,
    F: tl.constexpr, L_X: tl.constexpr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr,
    REDUCED: tl.constexpr, MEAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``blocks`` blocks a program: y = w l, or, if REDUCED, their sum in Y[program]; and dx = w
    l_x, over n for a mean, if there is a DX.

    V, W and DX may be None. Without V, v is 1.
    """
    program = tl.program_id(0)
    offsets = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], Y.dtype.element_ty)
    for block in range(blocks):
        start = (program.to(tl.int64) * blocks + block) * BLOCK
        inside = offsets < tl.minimum(n - start, BLOCK).to(tl.int32)
        x = upcast(tl.load(X + start + offsets, inside, other=0.0))
        t = upcast(tl.load(T + start + offsets, inside, other=0.0))
        v = 1.0 if V is None else upcast(tl.load(V + start + offsets, inside, other=1.0))
        w = 1.0 if W is None else upcast(tl.load(W + start + offsets, inside, other=0.0))
        loss = w * F(x, t, v, A, B, C)
        if REDUCED:
            total += tl.where(inside, loss, 0.0)
        else:
            tl.store(Y + start + offsets, loss.to(Y.dtype.element_ty), inside)
        if DX is not None:
            dx = w * L_X(x, t, v, A, B, C)
            tl.store(DX + start + offsets, (dx / n if MEAN else dx).to(DX.dtype.element_ty), inside)
    if REDUCED:
        tl.store(Y + program, tl.sum(total))


@triton.jit
def _finish(PARTIAL, Y, count, n, MEAN: tl.constexpr, BLOCK: tl.constexpr):
    """y = Σ partial, over n for a mean, by one program."""
    offsets = tl.arange(0, BLOCK)
    total = tl.sum(tl.load(PARTIAL + offsets, offsets < count, other=0.0))
    tl.store(Y, (total / n if MEAN else total).to(Y.dtype.element_ty))


@triton.jit
def _backward(
    DY, X, T, V, W, DX, DT, DV, DW, n,
    F: tl.constexpr, L_X: tl.constexpr, L_T: tl.constexpr, L_V: tl.constexpr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr,
    SCALAR: tl.constexpr, MEAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradients that have a place to go (else None), of one dy for all elements if SCALAR, over
    n for a mean."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = tl.arange(0, BLOCK)
    inside = offsets < tl.minimum(n - start, BLOCK).to(tl.int32)
    dy = upcast(tl.load(DY) if SCALAR else tl.load(DY + start + offsets, inside, other=0.0))
    if MEAN:
        dy = dy / n
    x = upcast(tl.load(X + start + offsets, inside, other=0.0))
    t = upcast(tl.load(T + start + offsets, inside, other=0.0))
    v = 1.0 if V is None else upcast(tl.load(V + start + offsets, inside, other=1.0))
    if DW is not None:
        tl.store(DW + start + offsets, (dy * F(x, t, v, A, B, C)).to(DW.dtype.element_ty), inside)
    if W is not None:
        dy = dy * upcast(tl.load(W + start + offsets, inside, other=0.0))
    if DX is not None:
        tl.store(DX + start + offsets, (dy * L_X(x, t, v, A, B, C)).to(DX.dtype.element_ty), inside)
    if DT is not None:
        dt = -L_X(x, t, v, A, B, C) if L_T is None else L_T(x, t, v, A, B, C)
        tl.store(DT + start + offsets, (dy * dt).to(DT.dtype.element_ty), inside)
    if DV is not None:
        tl.store(DV + start + offsets, (dy * L_V(x, t, v, A, B, C)).to(DV.dtype.element_ty), inside)


@kept
def _bound_forward(reduction: int, name: str, *parameters: Any) -> Any:
    value, gradient, *_ = DEVICE_FUNCTIONS[name]
    constants = {
        "F": value,
        "L_X": gradient,
        **_parameters(parameters),
        "REDUCED": reduction != NONE,
        "MEAN": reduction == MEAN,
    }
    return bind(_forward, 6, 2, **constants, BLOCK=BLOCK)


@kept
def _bound_backward(
    block: int, warps: int, scalar: bool, reduction: int, name: str, *parameters: Any
) -> Any:
    value, dx, dt, dv = DEVICE_FUNCTIONS[name]
    constants = {
        "F": value,
        "L_X": dx,
        "L_T": dt,
        "L_V": dv,
        **_parameters(parameters),
        "SCALAR": scalar,
        "MEAN": reduction == MEAN,
    }
    return bind(_backward, 9, 1, **constants, BLOCK=block, num_warps=warps)


@kept
def _bound_finish(reduction: int, block: int) -> Any:
    return bind(_finish, 2, 2, MEAN=reduction == MEAN, BLOCK=block)


def forward(
    name: str,
    x: Tensor,
    t: Tensor,
    v: Tensor | None,
    w: Tensor | None,
    reduction: int,
    hold: bool,
    *parameters: Any,
) -> tuple[Tensor, Tensor]:
    """The loss, and dx for dy = 1 if ``hold`` (else an empty tensor). x, t, v, w: one shape and
    dtype, any strides."""
    n = x.numel()
    dx = torch.empty_like(x) if hold else None
    layout = dx if dx is not None else x if x.is_contiguous() else torch.empty_like(x)
    operands = [None if a is None else like(a, layout) for a in (x, t, v, w)]
    run, count, blocks = _bound_forward(reduction, name, *parameters), cdiv(n, BLOCK), 1
    if reduction == NONE:
        y = torch.empty_like(x)
        run(count, *operands, y, dx, n, blocks)
    elif n == 0:
        y = x.new_full((), math.nan if reduction == MEAN else 0.0)
    else:
        blocks = cdiv(count, PROGRAMS * multiprocessors(x.device))
        count = cdiv(count, blocks)
        y, partial = x.new_empty(()), x.new_empty(count, dtype=accumulator(x.dtype))
        run(count, *operands, partial, dx, n, blocks)
        _bound_finish(reduction, next_power_of_2(count))(1, partial, y, count, n)
    return y, x.new_empty(0) if dx is None else dx


def backward(
    name: str,
    dy: Tensor,
    x: Tensor,
    t: Tensor,
    v: Tensor | None,
    w: Tensor | None,
    reduction: int,
    needs: list[bool],
    *parameters: Any,
) -> tuple[Tensor, ...]:
    """dx, dt, dv and dw in the strides of x; an empty tensor for each that is not needed."""
    grads = [torch.empty_like(x) if need else None for need in needs]
    layout = next(g for g in grads if g is not None)
    operands = [None if a is None else like(a, layout) for a in (x, t, v, w)]
    scalar = not any(dy.stride())
    n = x.numel()
    block, warps = (
        (BLOCK // 2, 8) if x.dtype == torch.float64 else (BLOCK, 4)
    )  # four gradients of doubles fill the registers of four
    run = _bound_backward(block, warps, scalar, reduction, name, *parameters)
    run(cdiv(n, block), dy if scalar else like(dy, layout), *operands, *grads, n)
    return tuple(x.new_empty(0) if g is None else g for g in grads)


def _parameters(given: tuple[Any, ...]) -> dict[str, Any]:
    return dict(zip("ABC", (*given, None, None, None), strict=False))

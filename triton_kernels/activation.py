"""Activations: device functions (value, derivative), one kernel each way, and their launchers.

A device function takes (x, A, B), x in the accumulator's dtype and the parameters as compile-time constants (a float argument of a kernel is
float32, which would round them in float64). The pairs are reused by the fused linear.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import cdiv, launch


@triton.jit
def relu(x, A, B):
    """max(x, 0), and NaN stays NaN."""
    return tl.where(x < 0, 0.0, x)


@triton.jit
def relu_derivative(y, A, B):
    return tl.where(y > 0, 1.0, 0.0)


@triton.jit
def silu(x, A, B):
    return x * tl.sigmoid(x)


@triton.jit
def silu_derivative(x, A, B):
    s = tl.sigmoid(x)
    return s * (1 + x * (1 - s))


#: name -> (value, derivative of the saved tensor)
DEVICE_FUNCTIONS = {
    "relu": (relu, relu_derivative),
    "silu": (silu, silu_derivative),
}


@triton.jit
def _forward(X, Y, n, F: tl.constexpr, A: tl.constexpr, B: tl.constexpr, BLOCK: tl.constexpr):
    """y = f(x), BLOCK elements a program."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = tl.arange(0, BLOCK)
    inside = offsets < tl.minimum(n - start, BLOCK).to(tl.int32)
    x = tl.load(X + start + offsets, inside, other=0.0)
    x = x.to(tl.float64) if x.dtype == tl.float64 else x.to(tl.float32)
    tl.store(Y + start + offsets, F(x, A, B).to(Y.dtype.element_ty), inside)


@triton.jit
def _backward(DY, SAVED, DX, n, F: tl.constexpr, A: tl.constexpr, B: tl.constexpr, BLOCK: tl.constexpr):
    """dx = dy f'(saved)."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = tl.arange(0, BLOCK)
    inside = offsets < tl.minimum(n - start, BLOCK).to(tl.int32)
    dy = tl.load(DY + start + offsets, inside, other=0.0)
    saved = tl.load(SAVED + start + offsets, inside, other=0.0)
    dy = dy.to(tl.float64) if dy.dtype == tl.float64 else dy.to(tl.float32)
    saved = saved.to(tl.float64) if saved.dtype == tl.float64 else saved.to(tl.float32)
    tl.store(DX + start + offsets, (dy * F(saved, A, B)).to(DX.dtype.element_ty), inside)


def like(t: Tensor, layout: Tensor) -> Tensor:
    """``t`` with the strides of ``layout`` (copied only if they differ)."""
    return t if t.stride() == layout.stride() else torch.empty_like(layout, dtype=t.dtype).copy_(t)


def _block(n: int) -> int:
    return 1024


def forward(name: str, x: Tensor, *parameters: float) -> Tensor:
    """y = f(x) with the strides of x."""
    y = torch.empty_like(x)
    x = like(x, y)
    n, block = x.numel(), _block(x.numel())
    launch(_forward, cdiv(n, block), x, y, n, **_constants(name, 0, parameters), BLOCK=block)
    return y


def backward(name: str, dy: Tensor, saved: Tensor, *parameters: float) -> Tensor:
    """dx = dy f'(saved), in the dtype and strides of ``saved``."""
    dx = torch.empty_like(saved)
    dy, saved = like(dy, dx), like(saved, dx)
    n, block = dx.numel(), _block(dx.numel())
    launch(_backward, cdiv(n, block), dy, saved, dx, n, **_constants(name, 1, parameters), BLOCK=block)
    return dx


def _constants(name: str, which: int, parameters: tuple[float, ...]) -> dict[str, Any]:
    a, b = (*parameters, 0.0, 0.0)[:2]
    return {"F": DEVICE_FUNCTIONS[name][which], "A": a, "B": b}

"""Every 16-bit number, and the error of a result in units in the last place."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

#: dtype -> the number of bits of its significand
HALVES = {torch.float16: 10, torch.bfloat16: 7}


def every_value(dtype: torch.dtype, device: torch.device) -> Tensor:
    """All 65,536 bit patterns of float16 or bfloat16, with zeros, subnormals, infinities and
    NaN."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32, device=device)
    return patterns.to(torch.int16).view(dtype)


def value_and_derivative(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """f(x) and f'(x) of an elementwise function."""
    leaf = x.detach().clone().requires_grad_()
    y = function(leaf)
    (dx,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
    return y.detach(), dx


def units_off(value: Tensor, truth: Tensor) -> Tensor:
    """The distance of ``value`` from ``truth`` (float64) in units in the last place of the dtype of
    ``value``; 0 where both are NaN or the same infinity, infinite where only one is finite."""
    limits = torch.finfo(value.dtype)
    rounded = truth.to(value.dtype)
    exponent = torch.frexp(truth).exponent.clamp_min(round(math.log2(limits.tiny)) + 1)
    unit = torch.ldexp(torch.full_like(truth, limits.eps), exponent - 1)
    off = (value.double() - truth).abs() / unit
    same = (value.isnan() & truth.isnan()) | (value == rounded)
    comparable = value.isfinite() & rounded.isfinite()
    return torch.where(comparable, off, torch.where(same, 0.0, math.inf))


def worst_by_binade(x: Tensor, off: Tensor) -> Tensor:
    """For each element of x, the largest of ``off`` among inputs of the same sign and exponent."""
    binade = (x.view(torch.int16).long() & 0xFFFF) >> HALVES[x.dtype]
    worst = off.new_zeros(2**16 >> HALVES[x.dtype])
    return worst.scatter_reduce(0, binade, off, "amax")[binade]

"""Formulas are written for exact arithmetic. Half precision is computed in float32 and rounded
once, as in the kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in for tensors of ``dtype``."""
    return torch.float32 if dtype in HALF else dtype


def widen(a: Any) -> Any:
    """A half-precision tensor in float32; anything else unchanged."""
    return a.float() if isinstance(a, Tensor) and a.dtype in HALF else a


def rounded_once(formula: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Runs an elementwise formula on widened tensors, and rounds the result to the dtype of the
    first argument."""

    @functools.wraps(formula)
    def run(*args: Any) -> Tensor:
        return formula(*map(widen, args)).to(args[0].dtype)

    return run

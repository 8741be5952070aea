"""Primitives of the division of a vector by its norm."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..formulas import normalize as formula
from ..formulas.precision import HALF, wide
from .library import Sharding, launcher, primitive


def _forward(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if x.dtype in HALF:
        return formula.normalize(x, eps)
    r = torch.linalg.vector_norm(x, 2, -1, keepdim=True).clamp_min_(eps)
    return x / r, r.squeeze(-1)


def _backward(dy: Tensor, y: Tensor, r: Tensor, eps: float) -> Tensor:
    return formula.normalize_backward(dy, y, r, eps).contiguous()


def _sharding(x: Tensor, eps: float) -> Iterable[Sharding]:
    return (([i, i], [i]) for i in range(x.dim() - 1))


def _backward_sharding(dy: Tensor, y: Tensor, r: Tensor, eps: float) -> Iterable[Sharding]:
    return (([i], [i] * 3) for i in range(y.dim() - 1))


forward = primitive(
    "normalize_forward(Tensor x, float eps) -> (Tensor y, Tensor r)",
    formula=formula.normalize,
    aten=_forward,
    triton=launcher("normalize", "forward"),
    fake=lambda x, eps: (x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=wide(x.dtype))),
    sharding=_sharding,
)
backward = primitive(
    "normalize_backward(Tensor dy, Tensor y, Tensor r, float eps) -> Tensor",
    formula=_backward,
    triton=launcher("normalize", "backward"),
    fake=lambda dy, y, r, eps: y.new_empty(y.shape),
    sharding=_backward_sharding,
)

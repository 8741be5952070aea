"""Primitives of the division of a vector by its norm."""

from __future__ import annotations

import torch

from ..formulas import normalize as formula
from ..formulas.precision import HALF, wide
from .library import launcher, primitive


def _forward(x, eps):
    if x.dtype in HALF:
        return formula.normalize(x, eps)
    r = torch.linalg.vector_norm(x, 2, -1, keepdim=True).clamp_min_(eps)
    return (x / r).contiguous(), r.squeeze(-1)


def _sharding(x, eps):
    return (([i, i], [i]) for i in range(x.dim() - 1))


def _backward_sharding(dy, x, r, eps):
    return (([i], [i] * 3) for i in range(x.dim() - 1))


forward = primitive(
    "normalize_forward(Tensor x, float eps) -> (Tensor y, Tensor r)",
    formula=formula.normalize,
    aten=_forward,
    triton=launcher("normalize", "forward"),
    fake=lambda x, eps: (x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=wide(x.dtype))),
    sharding=_sharding,
)
backward = primitive(
    "normalize_backward(Tensor dy, Tensor x, Tensor r, float eps) -> Tensor",
    formula=formula.normalize_backward,
    triton=launcher("normalize", "backward"),
    fake=lambda dy, x, r, eps: x.new_empty(x.shape),
    sharding=_backward_sharding,
)

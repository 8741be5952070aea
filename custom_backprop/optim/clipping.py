"""The factor that gradients are multiplied by before a step."""

from __future__ import annotations

import torch
from torch import Tensor

from ..formulas.optim import clip_factor
from ..formulas.precision import HALF


def norm_dtype(dtype: torch.dtype) -> torch.dtype | None:
    """The dtype in which the norm of a gradient is computed; None for its own."""
    return torch.float32 if dtype in HALF else None


def norm(grad: Tensor) -> Tensor:
    """The 2-norm of one gradient of any kind: sparse, complex, or sharded over ranks."""
    if grad.is_sparse:
        grad = grad.coalesce().values()
    total = torch.linalg.vector_norm(grad, dtype=norm_dtype(grad.dtype))
    return total.full_tensor() if hasattr(total, "full_tensor") else total


def gradient_factor(
    scale: Tensor | None, norms: list[Tensor], max_norm: float | None
) -> Tensor | None:
    """The inverse of a GradScaler's ``scale``, times the factor that clips gradients of these
    ``norms`` to ``max_norm``; None if there is neither."""
    factor = None if scale is None else scale.double().reciprocal()
    if max_norm is None or not norms:
        return factor
    total = torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]))
    if factor is None:
        return clip_factor(total, max_norm)
    factor = factor.to(total.device)
    return factor * clip_factor(total * factor, max_norm)

"""Division by a norm, as in ``torch.nn.functional``.

Derivation: :mod:`custom_backprop.formulas.normalize`.
"""

from __future__ import annotations

import torch.nn.functional as stock
from torch import Tensor

from ..ops import normalize as ops
from ..ops.route import overridable
from .arguments import gains_on_a_cpu, number

__all__ = ["normalize"]


@gains_on_a_cpu
@overridable
def normalize(
    input: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: Tensor | None = None
) -> Tensor:
    """y = x / r, r = max(‖x‖, ε) along ``dim``;  dx = (dy - y Σ y dy) / r, and dy / ε where
    ‖x‖ <= ε.

    Args:
        input: floating-point numbers of any shape. The result is contiguous in ``dim``.
        p: of the norm. Another than 2 is computed by stock, and so are several ``dim`` and what is
            written into an ``out``.

    Raises:
        IndexError: ``dim`` is out of range.
        TypeError: ``eps`` is not a number.
    """
    if p != 2 or out is not None or not isinstance(dim, int):
        return stock.normalize(input, p, dim, eps, out)
    x = input.movedim(dim, -1) if input.dim() else input.reshape(1)
    y = ops.normalize(x, eps if type(eps) is float else number("normalize", eps))
    return y.movedim(-1, dim) if input.dim() else y.reshape(())

"""Primitives of the parametric ReLU."""

from __future__ import annotations

import torch
from torch import Tensor

from ..formulas import prelu as formula
from ..formulas.precision import widen
from .library import launcher, primitive

aten = torch.ops.aten

#: elements of a pass: its temporaries stay in the cache and are never allocated at the size of x
_CHUNK = 2**16


def _forward(x: Tensor, weight: Tensor) -> Tensor:
    return aten._prelu_kernel.default(x, formula.spread(weight, x))


def _backward(dy: Tensor, x: Tensor, weight: Tensor, need_x: bool, need_weight: bool) -> tuple[Tensor, Tensor]:
    """dx = dy (m + w (1 - m)) with m = [x > 0], dw = Σ dy min(x, 0): nothing in ATen gives one without the other, or the sum with it."""
    dx = torch.empty_like(x) if need_x else x.new_empty(0)
    if x.dim() == 0 or x.numel() == 0:
        return formula.prelu_backward(dy, x, weight, need_x, need_weight)
    w = formula.spread(weight, x)
    rows = max(1, _CHUNK * x.shape[0] // x.numel())
    sums = []
    for i in range(0, x.shape[0], rows):
        dy_part, x_part = dy[i : i + rows], x[i : i + rows]
        if need_x:
            part = torch.gt(x_part, 0, out=dx[i : i + rows])
            part.addcmul_(1 - part, w).mul_(dy_part)
        if need_weight:
            sums.append(formula.summed(widen(x_part.clamp_max(0).mul_(dy_part)), weight))
    return dx, torch.stack(sums).sum(0).to(weight.dtype) if need_weight else x.new_empty(0)


def _fake_backward(dy: Tensor, x: Tensor, weight: Tensor, need_x: bool, need_weight: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x) if need_x else x.new_empty(0), torch.empty_like(weight) if need_weight else x.new_empty(0)


forward = primitive(
    "prelu_forward(Tensor x, Tensor weight) -> Tensor",
    formula=formula.prelu,
    aten=_forward,
    triton=launcher("prelu", "forward"),
    fake=lambda x, weight: torch.empty_like(x),
)
backward = primitive(
    "prelu_backward(Tensor dy, Tensor x, Tensor weight, bool need_x, bool need_weight) -> (Tensor dx, Tensor dw)",
    formula=formula.prelu_backward,
    aten=_backward,
    triton=launcher("prelu", "backward"),
    fake=_fake_backward,
)

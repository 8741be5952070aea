"""Primitives of the parametric ReLU."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..formulas import prelu as formula
from ..formulas.precision import widen
from . import tasks
from .library import P, R, empty_if, launcher, primitive

aten = torch.ops.aten

#: elements of a pass: its temporaries stay in the cache and are never allocated at the size of x
_CHUNK = 2**16
#: elements up to which the calls cost more than the passes: there one ATen kernel computes dx and
#: dy min(x, 0)
_SMALL = 2**14


def _backward(dy, x, weight, need_x, need_weight):
    w = formula.spread(weight, x)
    if need_x and need_weight and x.numel() <= _SMALL:
        dx, dw = aten._prelu_kernel_backward.default(dy, x, w)
        return dx, formula.summed(dw, weight)
    dx = empty_if(need_x, x)

    def work(parts, _):
        dy_part, x_part, dx_part = parts
        if need_x:  # dy (m + w (1 - m)) with m = [x > 0]
            torch.gt(x_part, 0, out=dx_part)
            dx_part.addcmul_(1 - dx_part, w).mul_(dy_part)
        if need_weight:  # Σ dy min(x, 0)
            return formula.summed(widen(x_part.clamp_max(0).mul_(dy_part)), weight)
        return None

    sums = tasks.each(x.device, work, _parts(dy, x, x if dx is None else dx))
    return dx, torch.stack(sums).sum(0).to(weight.dtype) if need_weight else None


def _parts(*tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """Tensors of one shape, cut alike along their first dimension into about _CHUNK elements."""
    numel = tensors[0].numel()
    if numel <= _CHUNK:
        return (tensors,)
    step = max(1, _CHUNK * len(tensors[0]) // numel)
    return zip(*(t.split(step) for t in tensors), strict=True)


def _sharding(x, weight):
    return (([i], [i, 0 if i == 1 and weight.numel() > 1 else R]) for i in range(x.dim()))


def _backward_sharding(dy, x, weight, need_x, need_weight):
    for (i,), (_, w) in _sharding(x, weight):
        dw = 0 if w == 0 else P
        yield [i if need_x else R, dw if need_weight else R], [i, i, w]


forward = primitive(
    "prelu_forward(Tensor x, Tensor weight) -> Tensor",
    formula=formula.prelu,
    aten=torch.prelu,
    triton=launcher("prelu", "forward"),
    fake=lambda x, weight: torch.empty_like(x),
    sharding=_sharding,
)
backward = primitive(
    "prelu_backward(Tensor dy, Tensor x, Tensor weight, bool need_x, bool need_weight) "
    "-> (Tensor dx, Tensor dw)",
    formula=formula.prelu_backward,
    aten=_backward,
    triton=launcher("prelu", "backward"),
    fake=lambda dy, x, weight, *needs: (empty_if(needs[0], x), empty_if(needs[1], weight)),
    sharding=_backward_sharding,
)

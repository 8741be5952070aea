"""Primitives of the parametric ReLU."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..formulas import prelu as formula
from ..formulas.precision import widen
from .library import P, R, Sharding, empty_if, launcher, primitive

aten = torch.ops.aten

#: elements of a pass: its temporaries stay in the cache and are never allocated at the size of x
_CHUNK = 2**16
#: elements up to which the calls cost more than the passes: there one ATen kernel computes dx and
#: dy min(x, 0)
_SMALL = 2**14


def _backward(
    dy: Tensor, x: Tensor, weight: Tensor, need_x: bool, need_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    w = formula.spread(weight, x)
    if need_x and need_weight and x.numel() <= _SMALL:
        dx, dw = aten._prelu_kernel_backward.default(dy, x, w)
        return dx, formula.summed(dw, weight)
    dx, sums = empty_if(need_x, x), []
    for dy_part, x_part, dx_part in _parts(dy, x, x if dx is None else dx):
        if need_x:  # dy (m + w (1 - m)) with m = [x > 0]
            torch.gt(x_part, 0, out=dx_part)
            dx_part.addcmul_(1 - dx_part, w).mul_(dy_part)
        if need_weight:  # Σ dy min(x, 0)
            sums.append(formula.summed(widen(x_part.clamp_max(0).mul_(dy_part)), weight))
    return dx, torch.stack(sums).sum(0).to(weight.dtype) if need_weight else None


def _parts(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors of one shape in slices of about _CHUNK elements along their first dimension."""
    numel = tensors[0].numel()
    if tensors[0].dim() == 0 or numel <= _CHUNK:
        yield tensors
        return
    size = tensors[0].shape[0]
    step = max(1, _CHUNK * size // numel)
    for i in range(0, size, step):
        yield tuple(t[i : i + step] for t in tensors)


def _sharding(x: Tensor, weight: Tensor) -> Iterable[Sharding]:
    return (([i], [i, 0 if i == 1 and weight.numel() > 1 else R]) for i in range(x.dim()))


def _backward_sharding(
    dy: Tensor, x: Tensor, weight: Tensor, need_x: bool, need_weight: bool
) -> Iterable[Sharding]:
    for (i,), (_, w) in _sharding(x, weight):
        dw = 0 if w == 0 else P
        yield [i if need_x else R, dw if need_weight else R], [i, i, w]


def _fake_backward(dy: Tensor, x: Tensor, weight: Tensor, *needs: bool) -> Any:
    return empty_if(needs[0], x), empty_if(needs[1], weight)


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
    fake=_fake_backward,
    sharding=_backward_sharding,
)

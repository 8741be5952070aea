"""Primitives of the activations: ``<name>_forward(x, *parameters)`` and ``<name>_backward(dy, saved, *parameters)``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..formulas.activation import ACTIVATIONS, Activation
from .kernels import kernels
from .library import fold_batch, primitive

aten = torch.ops.aten

#: name -> (forward, backward) by PyTorch's operators; an activation that is not here runs its formula
ATEN: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "relu": (aten.relu.default, lambda dy, y: aten.threshold_backward.default(dy, y, 0)),
    "silu": (aten.silu.default, aten.silu_backward.default),
}


def _elementwise(first: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(first)


def _define(a: Activation) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    parameters = "".join(f", float {name}" for name in a.parameters)
    forward_aten, backward_aten = ATEN.get(a.name, (a.value, a.backward))

    def vmap_forward(info: Any, in_dims: Any, x: Tensor, *parameters: float) -> tuple[Tensor, int]:
        return forward(x.movedim(in_dims[0], 0), *parameters), 0

    def vmap_backward(info: Any, in_dims: Any, dy: Tensor, saved: Tensor, *parameters: float) -> tuple[Tensor, int]:
        dy, saved = fold_batch((dy, saved), in_dims[:2], info.batch_size)
        return backward(dy, saved, *parameters), 0

    forward = primitive(
        f"{a.name}_forward(Tensor x{parameters}) -> Tensor",
        formula=a.value,
        aten=forward_aten,
        triton=lambda *args: kernels("activation").forward(a.name, *args),
        fake=_elementwise,
        vmap=vmap_forward,
    )
    backward = primitive(
        f"{a.name}_backward(Tensor dy, Tensor saved{parameters}) -> Tensor",
        formula=a.backward,
        aten=backward_aten,
        triton=lambda *args: kernels("activation").backward(a.name, *args),
        fake=lambda dy, saved, *parameters: torch.empty_like(saved),
        vmap=vmap_backward,
    )
    return forward, backward


#: name -> (forward, backward)
primitives = {a.name: _define(a) for a in ACTIVATIONS.values()}

"""A gate: y = f(a) b, element by element.

glu (Dauphin et al., 2017) has the sigmoid for f; reglu, geglu and swiglu (Shazeer, 2020) have relu,
gelu and silu. By the product rule

    da = dy b f'(a),   db = dy f(a).

Where a and b are the halves of one tensor x along a dimension, da and db are the same halves of dx.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .activation import ACTIVATIONS
from .precision import widen


def halves(x: Tensor, b: Tensor | None, dim: int, gate_first: bool) -> tuple[Tensor, Tensor]:
    """a and b: what was given, or the halves of x."""
    if b is not None:
        return x, b
    first, second = x.chunk(2, dim)
    return (first, second) if gate_first else (second, first)


def packed(a: Tensor, b: Tensor, dim: int, gate_first: bool) -> Tensor:
    """The halves in one tensor."""
    return torch.cat((a, b) if gate_first else (b, a), dim)


def factors(a: Tensor, f: str) -> tuple[Tensor, Tensor]:
    """f(a) and f'(a)."""
    of = ACTIVATIONS[f]
    y = of.value(a)
    return y, of.derivative(y if of.saves_output else a)


def gate(x: Tensor, b: Tensor | None, dim: int, gate_first: bool, f: str) -> Tensor:
    """y, contiguous."""
    a, value = map(widen, halves(x, b, dim, gate_first))
    return (ACTIVATIONS[f].value(a) * value).to(x.dtype).contiguous()


def gate_backward(
    dy: Tensor, x: Tensor, b: Tensor | None, dim: int, gate_first: bool, f: str, *needs: bool
) -> tuple[Tensor | None, Tensor | None]:
    """da and db, or dx; None for what is not needed."""
    a, value = map(widen, halves(x, b, dim, gate_first))
    y, derivative = factors(a, f)
    da, db = widen(dy) * value * derivative, widen(dy) * y
    if b is None:
        return packed(da, db, dim, gate_first).to(x.dtype).contiguous(), None
    da, db = da.to(x.dtype).contiguous(), db.to(b.dtype).contiguous()
    return da if needs[0] else None, db if needs[1] else None

"""Specs of the gates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import functional, nn
from ..spec import ELEMENTWISE_SIZES, Make, OpSpec, Sample

SIZES = {**ELEMENTWISE_SIZES, "awkward": (37, 514)}


def _reference(f: Callable[..., Tensor], first: bool) -> Callable[..., Tensor]:
    """By stock's activation and product."""

    def reference(input, value=None, dim=-1, gate_first=first, **options):
        if value is None and input.shape[dim] % 2:
            raise RuntimeError("halves of an odd size")
        a, b = (input, value) if value is not None else input.chunk(2, dim)
        a, b = (a, b) if gate_first or value is not None else (b, a)
        return f(a, **options) * b

    return reference


def _glu(input, dim=-1, value=None, gate_first=False):
    if value is None and not gate_first:
        return F.glu(input, dim)
    return _reference(torch.sigmoid, False)(input, value, dim, gate_first)


def _samples(
    make: Make, name: str, avoid: tuple[float, ...], options: dict[str, Any]
) -> Iterator[Sample]:
    def x(*shape: int) -> Tensor:
        return make.tensor(*shape, avoid=avoid)

    yield Sample((x(3, 10),), options, name="halves of rows")
    yield Sample((x(2, 6, 2),), {"dim": -2, "gate_first": True}, name="halves of the middle")
    yield Sample((x(3, 2),), {"dim": 1, "gate_first": False}, name="halves of one element")
    yield Sample(_both(name, x(2, 5), make.tensor(2, 5)), options, name="two tensors")
    yield Sample((x(0, 2),), name="empty")


def _both(name: str, a: Tensor, b: Tensor) -> tuple[Any, ...]:
    return (a, -1, b) if name == "glu" else (a, b)


def _regimes(make: Make, name: str) -> Iterator[Sample]:
    yield Sample((make.tensor(64, 62),), name="short rows")
    a, b = make.tensor(256, 256), make.tensor(256, 256, requires_grad=False)
    yield Sample(_both(name, a, b), name="a frozen value")
    yield Sample(_both(name, b, a), name="a frozen gate")


def _spec(
    name: str, formula: str, reference: Callable[..., Tensor], avoid: tuple[float, ...] = (),
    **named: Any,
) -> OpSpec:  # fmt: skip
    options = {"approximate": "tanh"} if name == "geglu" else {}
    return OpSpec(
        name=name,
        rows=() if name == "geglu" else (0,),  # ATen's gelu rounds otherwise at the end
        family="gating",
        formula=formula,
        function=getattr(functional, name),
        reference=reference,
        samples=lambda make: _samples(make, name, avoid, options),
        large=lambda make, size: Sample((make.tensor(*SIZES[size]),)),
        by_length=lambda make, rows, n: Sample(
            _both(name, make.tensor(rows, n), make.tensor(rows, n)), options
        ),
        regimes=lambda make: _regimes(make, name),
        **named,
    )


SPECS = [
    _spec(
        "glu",
        "y = σ(a) b;  da = dy b σ (1 - σ), db = dy σ",
        _glu,
        module=(nn.GLU, torch.nn.GLU, {"dim": 1}, lambda make: (make.tensor(2, 4, 6),)),
    ),
    _spec(
        "reglu",
        "y = max(a, 0) b;  da = dy b [a > 0], db = dy max(a, 0)",
        _reference(F.relu, False),
        (0,),
    ),
    _spec(
        "geglu",
        "y = gelu(a) b;  da = dy b gelu'(a), db = dy gelu(a)",
        _reference(F.gelu, False),
    ),
    _spec(
        "swiglu",
        "y = silu(a) b;  da = dy b σ (1 + a (1 - σ)), db = dy silu(a), σ = σ(a)",
        _reference(F.silu, True),
    ),
]

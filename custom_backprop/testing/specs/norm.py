"""Specs of layer_norm and rms_norm."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import functional, nn
from ...formulas.precision import widen
from ..spec import Make, OpSpec, Sample

SIZES = {
    "awkward": (37, 1031),
    "small": (64, 64),
    "medium": (256, 256),
    "large": (4096, 1024),
    "huge": (16384, 4096),
}
SHAPE = {"normalized_shape": (5, 2), "eps": 0.1}


def layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5):
    """Stock's; under torch.func, where its second derivatives are wrong, the definition; and of a
    bias alone, where it has none, without it (tests/ops/test_norm.py)."""
    if weight is None and bias is not None:
        return layer_norm(input, normalized_shape, eps=eps) + bias
    if not torch._C._are_functorch_transforms_active():
        return F.layer_norm(input, normalized_shape, weight, bias, eps)
    dims = list(range(-len(normalized_shape), 0))
    d = input - input.mean(dims, keepdim=True)
    y = d * (d.square().mean(dims, keepdim=True) + eps).rsqrt()
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def rms_norm(input, normalized_shape, weight=None, eps=None, casting="torch"):
    """The casting orders by stock's function."""
    if casting == "torch" or weight is None:
        return F.rms_norm(input, normalized_shape, weight, eps)
    if casting == "gemma":
        return F.rms_norm(input, normalized_shape, 1 + widen(weight), eps)
    return F.rms_norm(input, normalized_shape, None, eps) * weight


def _of_sum(norm):
    """Of x + residual; casts as autocast does not."""

    def reference(input, residual, *args, **named):
        h = input + residual
        with torch.autocast(h.device.type, enabled=False):
            return norm(h, *args, **named), h

    return reference


def _call(make: Make, parameters: int, x: Tensor, *rest: Tensor | None, **named: Any) -> Sample:
    """Of x (a, b, ...), rows of (b, ...), with so many parameters."""
    name, shape = named.pop("name", ""), x.shape[1:]
    return Sample((x, shape, *(make.tensor(*shape) for _ in range(parameters)), *rest), named, name)


def _samples(make: Make, parameters: int) -> Iterator[Sample]:
    yield _call(make, parameters, make.tensor(2, 5), name="rows")
    yield _call(make, parameters, make.tensor(2, 1, 3), eps=0.1, name="two dimensions")
    yield Sample((make.tensor(3), (3,)), name="one row, no parameters")
    yield _call(make, parameters, make.tensor(0, 3), name="no rows")
    if parameters == 2:
        yield _call(make, 0, make.tensor(2, 3), None, make.tensor(3), name="a bias alone")
    for casting in () if parameters == 2 else ("llama", "gemma"):
        yield _call(make, 1, make.tensor(2, 3), eps=0.1, casting=casting, name=casting)


def _regimes(make: Make, parameters: int) -> Iterator[Sample]:
    yield _call(make, 0, make.tensor(64, 2**17), name="rows in a loop, no parameters")
    yield _call(make, parameters, make.tensor(64, 2**17), name="rows in a loop")
    yield _call(make, parameters, make.tensor(64, 50257), name="rows of an odd length in a loop")
    yield _call(make, 0, make.tensor(2**16, 2**15), name="offsets in int64")
    frozen = make.tensor(256, 256, requires_grad=False)
    yield _call(make, parameters, frozen, name="a frozen input")
    if parameters == 2:
        x, bias = make.tensor(64, 2**17), make.tensor(2**17)
        yield _call(make, 0, x, None, bias, name="rows in a loop, a bias alone")


def _spec(reference: Callable[..., Tensor], formula: str, parameters: int, **named: Any) -> OpSpec:
    return OpSpec(
        name=reference.__name__,
        rows=(0,) if reference is F.layer_norm else (),  # ATen sums squares otherwise
        family="norm",
        formula=formula,
        function=getattr(functional, reference.__name__),
        reference=reference,
        samples=lambda make: _samples(make, parameters),
        launches=(1, 2),
        large=lambda make, size: _call(make, parameters, make.tensor(*SIZES[size])),
        by_length=lambda make, rows, n: _call(make, parameters, make.tensor(rows, n)),
        regimes=lambda make: _regimes(make, parameters),
        **named,
    )


def _add_call(make: Make, parameters: int, *shape: int, **named: Any) -> Sample:
    x, a, name = make.tensor(*shape), make.tensor(*shape), named.pop("name", "")
    given = (make.tensor(*shape[1:]) for _ in range(parameters))
    return Sample((x, a, shape[1:], *given), named, name)


def _add_samples(make: Make, parameters: int) -> Iterator[Sample]:
    yield _add_call(make, parameters, 2, 3, name="rows")
    yield _add_call(make, 0, 1, 1, 3, eps=0.1, name="two dimensions, no parameters")
    yield _add_call(make, parameters, 0, 3, name="no rows")
    for casting in () if parameters == 2 else ("llama", "gemma"):
        yield _add_call(make, 1, 2, 2, eps=0.1, casting=casting, name=casting)


def _add_regimes(make: Make, parameters: int) -> Iterator[Sample]:
    yield _add_call(make, parameters, 64, 2**17, name="rows in a loop")
    yield _add_call(make, 0, 2**16, 2**15, name="offsets in int64")


def _add_spec(name: str, norm: Callable[..., Tensor], formula: str, parameters: int) -> OpSpec:
    return OpSpec(
        name=name,
        family="norm",
        formula=formula,
        function=getattr(functional, name),
        reference=_of_sum(norm),
        samples=lambda make: _add_samples(make, parameters),
        launches=(1, 2),
        large=lambda make, size: _add_call(make, parameters, *SIZES[size]),
        by_length=lambda make, rows, n: _add_call(make, parameters, rows, n),
        regimes=lambda make: _add_regimes(make, parameters),
    )


SPECS = [
    _spec(
        layer_norm,
        "y = w x̂ + b, x̂ = r (x - μ);  dx = r (g - Σ g / n - x̂ Σ g x̂ / n), g = w dy",
        2,
        module=(nn.LayerNorm, torch.nn.LayerNorm, SHAPE, lambda make: (make.tensor(3, 5, 2),)),
        module_variants=({**SHAPE, "elementwise_affine": False}, {**SHAPE, "bias": False}),
    ),
    _spec(
        rms_norm,
        "y = w x̂, x̂ = r x;  dx = r (g - x̂ Σ g x̂ / n), g = w dy, dw = Σ dy x̂",
        1,
        module=(nn.RMSNorm, torch.nn.RMSNorm, SHAPE, lambda make: (make.tensor(3, 5, 2),)),
        module_variants=({**SHAPE, "elementwise_affine": False}, {**SHAPE, "casting": "gemma"}),
    ),
    _add_spec(
        "add_layer_norm",
        layer_norm,
        "h = x + a, y = layer_norm(h);  dx = da = dh + r (g - Σ g / n - x̂ Σ g x̂ / n), g = w dy",
        2,
    ),
    _add_spec(
        "add_rms_norm",
        rms_norm,
        "h = x + a, y = rms_norm(h);  dx = da = dh + r (g - x̂ Σ g x̂ / n), g = w dy",
        1,
    ),
]

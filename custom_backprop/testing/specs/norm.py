"""Specs of layer_norm and rms_norm."""

from __future__ import annotations

from collections.abc import Iterator

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


def _samples(make: Make, parameters: int) -> Iterator[Sample]:
    def some(*shape: int) -> tuple[Tensor, ...]:
        return tuple(make.tensor(*shape) for _ in range(parameters))

    yield Sample((make.tensor(2, 5), (5,), *some(5)), name="rows")
    yield Sample(
        (make.tensor(1, 2, 1, 3), (1, 3), *some(1, 3)), {"eps": 0.1}, name="two dimensions"
    )
    yield Sample((make.tensor(3), (3,)), name="one row, no parameters")
    yield Sample((make.tensor(0, 3), (3,), *some(3)), name="no rows")


def layer_norm(
    input: Tensor,
    normalized_shape: tuple[int, ...],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Stock's; under torch.func, where its second derivatives are wrong (tests/ops/test_norm.py),
    the definition."""
    if not torch._C._are_functorch_transforms_active():
        return F.layer_norm(input, normalized_shape, weight, bias, eps)
    dims = list(range(-len(normalized_shape), 0))
    d = input - input.mean(dims, keepdim=True)
    y = d * (d.square().mean(dims, keepdim=True) + eps).rsqrt()
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def rms_norm(
    input: Tensor,
    normalized_shape: tuple[int, ...],
    weight: Tensor | None = None,
    eps: float | None = None,
    casting: str = "torch",
) -> Tensor:
    """The casting orders by stock's function."""
    if casting == "torch" or weight is None:
        return F.rms_norm(input, normalized_shape, weight, eps)
    if casting == "gemma":
        return F.rms_norm(input, normalized_shape, 1 + widen(weight), eps)
    return F.rms_norm(input, normalized_shape, None, eps) * weight


def _rms_samples(make: Make) -> Iterator[Sample]:
    yield from _samples(make, 1)
    for casting in ("llama", "gemma"):
        arguments = make.tensor(2, 5), (5,), make.tensor(5)
        yield Sample(arguments, {"eps": 0.1, "casting": casting}, name=casting)


def _large(make: Make, size: str, parameters: int) -> Sample:
    rows, n = SIZES[size]
    return Sample((make.tensor(rows, n), (n,), *(make.tensor(n) for _ in range(parameters))))


def _regimes(make: Make, parameters: int) -> Iterator[Sample]:
    yield Sample((make.tensor(64, 2**17), (2**17,)), name="rows in a loop, no parameters")
    wide = make.tensor(64, 2**17), (2**17,), *(make.tensor(2**17) for _ in range(parameters))
    yield Sample(wide, name="rows in a loop")
    yield Sample((make.tensor(2**16, 2**15), (2**15,)), name="offsets in int64")
    frozen = make.tensor(256, 256, requires_grad=False)
    given = frozen, (256,), *(make.tensor(256) for _ in range(parameters))
    yield Sample(given, name="a frozen input")
    if parameters > 1:
        given = make.tensor(64, 2**17), (2**17,), None, make.tensor(2**17)
        yield Sample(given, name="rows in a loop, a bias alone")


SHAPE = {"normalized_shape": (5, 2), "eps": 0.1}

SPECS = [
    OpSpec(
        name="layer_norm",
        family="norm",
        formula="y = w x̂ + b, x̂ = r (x - μ);  dx = r (g - Σ g / n - x̂ Σ g x̂ / n), g = w dy",
        function=functional.layer_norm,
        reference=layer_norm,
        samples=lambda make: _samples(make, 2),
        large=lambda make, size: _large(make, size, 2),
        regimes=lambda make: _regimes(make, 2),
        module=(nn.LayerNorm, torch.nn.LayerNorm, SHAPE, lambda make: (make.tensor(3, 5, 2),)),
        module_variants=({**SHAPE, "elementwise_affine": False}, {**SHAPE, "bias": False}),
    ),
    OpSpec(
        name="rms_norm",
        family="norm",
        formula="y = w x̂, x̂ = r x;  dx = r (g - x̂ Σ g x̂ / n), g = w dy, dw = Σ dy x̂",
        function=functional.rms_norm,
        reference=rms_norm,
        samples=_rms_samples,
        large=lambda make, size: _large(make, size, 1),
        regimes=lambda make: _regimes(make, 1),
        module=(nn.RMSNorm, torch.nn.RMSNorm, SHAPE, lambda make: (make.tensor(3, 5, 2),)),
        module_variants=({**SHAPE, "elementwise_affine": False}, {**SHAPE, "casting": "gemma"}),
    ),
]

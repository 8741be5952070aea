"""Specs of dropout. Samples give the seed, so that a call can be repeated and the mask is known;
modules have p = 1, where nothing is random. Benchmarks draw it, as training does."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import functional, nn
from ...formulas import dropout as formula
from ..spec import ELEMENTWISE_SIZES, Make, OpSpec, Sample

FEATURES = {
    "awkward": (13, 3, 859),
    "small": (8, 8, 64),
    "medium": (8, 32, 256),
    "large": (16, 64, 1024),
    "huge": (256, 256, 1024),
}


def _reference(name: str, alpha: bool, features: bool, dims: int) -> Callable[..., Tensor]:
    """Stock's expressions, with the mask of the seed."""

    def reference(input, p=0.5, training=not alpha, inplace=False, seed=None):
        if seed is None or not training:
            return getattr(F, name)(input, p, training, inplace)
        if input.dim() == dims - 1:
            return reference(input[None], p, training, inplace, seed)[0]
        noise = formula.mask(seed, input.shape, p, features, True).to(input.dtype)
        if not alpha:
            return input * noise.div(1 - p) if p < 1 else input * 0
        a = 1 / math.sqrt((formula.ALPHA**2 * p + 1) * (1 - p))
        b = (noise - 1) * (formula.ALPHA * a) + formula.ALPHA * a * p
        return input * (noise * a) + b

    return reference


def _add(input, residual, p=0.5, training=True, seed=None):
    return residual + _reference("dropout", False, False, 0)(input, p, training, False, seed)


def _seed(make: Make, value: int) -> Tensor:
    return torch.tensor(value, device=make.device)


def _samples(make: Make, name: str, shapes: tuple[tuple[int, ...], ...]) -> Iterator[Sample]:
    for i, shape in enumerate(shapes):
        seed = _seed(make, (3, 2**62 + 12345)[i % 2])
        given = {"p": (0.3, 0.8)[i % 2], "training": True, "seed": seed}
        x = (make.tensor(*shape), make.tensor(*shape)) if name == "dropout_add" else ()
        yield Sample(x or (make.tensor(*shape),), given, name=f"{len(shape)}-D")


def _large(make: Make, name: str, shape: tuple[int, ...]) -> Sample:
    x = make.tensor(*shape)
    options = {"p": 0.1, "training": True, "seed": _seed(make, 7)}
    return Sample((x, make.tensor(*shape)) if name == "dropout_add" else (x,), options)


def _spec(
    name: str, formula: str, reference: Callable[..., Tensor], shapes: tuple[tuple[int, ...], ...],
    module: tuple[type, type], inputs: tuple[int, ...], *, features: bool = False, spatial: int = 1,
) -> OpSpec:  # fmt: skip
    """``spatial`` dimensions of the larger shapes."""
    sizes: dict[str, Any] = FEATURES if features else ELEMENTWISE_SIZES
    count = 2 if name == "dropout_add" else 1
    return OpSpec(
        name=name,
        family="dropout",
        formula=formula,
        function=getattr(functional, name),
        reference=reference,
        samples=lambda make: _samples(make, name, shapes),
        launches=(1, 2 if name == "dropout_add" else 1),
        large=lambda make, size: _large(make, name, (*sizes[size], *(1,) * (spatial - 1))),
        module=(*module, {"p": 1.0}, lambda make: tuple([make.tensor(*inputs)] * count)),
        module_variants=({"p": 1.0, "inplace": True},) if name != "dropout_add" else (),
    )


class _DropoutAdd(torch.nn.Module):
    """Stock's two layers."""

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.dropout = torch.nn.Dropout(p)

    def forward(self, input: Tensor, residual: Tensor) -> Tensor:
        return residual + self.dropout(input)


ELEMENTS = (2, 5), (3,)
CHANNELS = {1: ((3, 2, 2), (5, 2)), 2: ((2, 3, 2, 1),), 3: ((2, 2, 1, 2, 1), (3, 1, 2, 1))}

SPECS = [
    _spec(
        "dropout",
        "y = m x / (1 - p);  dx = m dy / (1 - p), m = [word >= p 2^32] of a seed",
        _reference("dropout", False, False, 0),
        ELEMENTS,
        (nn.Dropout, torch.nn.Dropout),
        (3, 5),
    ),
    _spec(
        "alpha_dropout",
        "y = a (m x - (1 - m) α + p α);  dx = m a dy, a = ((1 - p) (1 + p α²))^(-1/2)",
        _reference("alpha_dropout", True, False, 0),
        ELEMENTS,
        (nn.AlphaDropout, torch.nn.AlphaDropout),
        (3, 5),
    ),
    _spec(
        "feature_alpha_dropout",
        "y = a (m x - (1 - m) α + p α);  dx = m a dy, one m a channel",
        _reference("feature_alpha_dropout", True, True, 0),
        ((3, 2, 2),),
        (nn.FeatureAlphaDropout, torch.nn.FeatureAlphaDropout),
        (3, 2, 5),
        features=True,
    ),
    *(
        _spec(
            f"dropout{n}d",
            "y = m x / (1 - p);  dx = m dy / (1 - p), one m a channel",
            _reference(f"dropout{n}d", False, True, 3 if n == 1 else 5 if n == 3 else 0),
            shapes,
            (getattr(nn, f"Dropout{n}d"), getattr(torch.nn, f"Dropout{n}d")),
            (2, 3, *(2,) * n),
            features=True,
            spatial=n,
        )
        for n, shapes in CHANNELS.items()
    ),
    _spec(
        "dropout_add",
        "y = r + m x / (1 - p);  dx = m dy / (1 - p), dr = dy",
        _add,
        ELEMENTS,
        (nn.DropoutAdd, _DropoutAdd),
        (3, 5),
    ),
]

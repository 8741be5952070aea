"""Spec of the parametric ReLU."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from ... import functional, nn
from ..spec import Make, OpSpec, Sample

SIZES = {
    "awkward": (3, 5, 7, 131),
    "small": (8, 8, 8, 8),
    "medium": (16, 16, 16, 16),
    "large": (8, 32, 64, 64),
    "huge": (32, 128, 128, 128),
}


def _samples(make: Make) -> Iterator[Sample]:
    yield Sample((make.tensor(2, 3, avoid=(0,)), make.tensor(3)), name="2-D, a weight a channel")
    yield Sample(
        (make.tensor(1, 2, 1, 3, avoid=(0,)), make.tensor(2)), name="4-D, a weight a channel"
    )
    yield Sample((make.tensor(3, avoid=(0,)), make.tensor(1)), name="1-D, one weight")
    yield Sample((make.tensor(avoid=(0,)), make.tensor()), name="0-D")
    yield Sample((make.tensor(0, 2), make.tensor(2)), name="empty")


def _regimes(make: Make) -> Iterator[Sample]:
    """Only one of the two gradients."""
    shape = SIZES["medium"]
    yield Sample((make.tensor(*shape), make.tensor(shape[1], requires_grad=False)), name="dx")
    yield Sample((make.tensor(*shape, requires_grad=False), make.tensor(shape[1])), name="dw")


SPECS = [
    OpSpec(
        name="prelu",
        rows=(0,),
        family="prelu",
        formula="y = x [x > 0] + w x [x <= 0];  "
        "dx = dy ([x > 0] + w [x <= 0]), dw_c = Σ dy x [x <= 0]",
        function=functional.prelu,
        reference=F.prelu,
        samples=_samples,
        launches=(1, 2),
        large=lambda make, size: Sample((make.tensor(*SIZES[size]), make.tensor(SIZES[size][1]))),
        regimes=_regimes,
        representative=True,
        module=(
            nn.PReLU,
            torch.nn.PReLU,
            {"num_parameters": 3, "init": 0.1},
            lambda make: (make.tensor(2, 3, 2),),
        ),
    ),
]

"""Specs of the linear layers."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import functional, nn
from ...ops.activation import stock_of
from ..spec import Make, OpSpec, Sample

SIZES = {
    "awkward": (301, 300, 5),
    "small": (64, 64, 64),
    "medium": (256, 256, 256),
    "large": (1024, 1024, 1024),
    "huge": (16384, 4096, 4096),
}


# gradcheck calls the function twice per element of its inputs, so these are small;
# tests/ops/test_linear.py has larger ones
def _linear_samples(make: Make) -> Iterator[Sample]:
    yield Sample((make.tensor(2, 2), make.tensor(3, 2), make.tensor(3)), name="2-D")
    yield Sample((make.tensor(2), make.tensor(1, 2), make.tensor(1)), name="1-D")
    yield Sample((make.tensor(1, 2, 2), make.tensor(2)), name="3-D, 1-D weight, no bias")
    yield Sample((make.tensor(0, 3), make.tensor(2, 3), make.tensor(2)), name="no rows")


def _activation_samples(make: Make) -> Iterator[Sample]:
    def positive(*shape: int) -> Tensor:
        return make.tensor(
            *shape, low=0.2, high=0.9
        )  # z stays away from the kink of relu, and tanh from 1 - y² near 0

    yield Sample((positive(2, 2), positive(2, 2), positive(2)), name="relu")
    yield Sample(
        (make.tensor(1, 2, 1), make.tensor(2, 1)),
        {"activation": "softplus", "beta": 2.0},
        name="softplus, 3-D, no bias",
    )
    yield Sample(
        (positive(2), positive(1, 2), positive(1)), {"activation": "tanh"}, name="tanh, 1-D"
    )
    yield Sample(
        (make.tensor(0, 3), make.tensor(2, 3), make.tensor(2)),
        {"activation": "gelu_tanh"},
        name="gelu_tanh, no rows",
    )


def linear_activation(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "relu",
    **parameters: float,
) -> Tensor:
    """Both by stock's functions."""
    return stock_of(activation)(F.linear(input, weight, bias), **parameters)


class _Stock(torch.nn.Linear):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        activation: str = "relu",
        **parameters: float,
    ) -> None:
        super().__init__(in_features, out_features, bias)
        self.activation, self.parameters_of_activation = activation, parameters

    def forward(self, input: Tensor) -> Tensor:
        return linear_activation(
            input, self.weight, self.bias, self.activation, **self.parameters_of_activation
        )


def _large(make: Make, size: str) -> Sample:
    rows, columns, inner = SIZES[size]
    return Sample((make.tensor(rows, inner), make.tensor(columns, inner), make.tensor(columns)))


def _activation_regimes(make: Make) -> Iterator[Sample]:
    yield Sample(
        (make.tensor(256, 256), make.tensor(256, 256)),
        {"activation": "softplus"},
        name="z is saved, no bias",
    )


FEATURES = {"in_features": 5, "out_features": 3}

SPECS = [
    OpSpec(
        name="linear",
        family="linear",
        formula="y = x Wᵀ + b;  dx = dy W, dW = dyᵀ x, db = Σ dy",
        function=functional.linear,
        reference=F.linear,
        samples=_linear_samples,
        launches=(1, 4),
        large=_large,
        module=(nn.Linear, torch.nn.Linear, FEATURES, lambda make: (make.tensor(2, 3, 5),)),
        module_variants=({**FEATURES, "bias": False},),
    ),
    OpSpec(
        name="linear_activation",
        family="linear",
        formula="y = f(z), z = x Wᵀ + b;  dz = dy f', dx = dz W, dW = dzᵀ x, db = Σ dz",
        function=functional.linear_activation,
        reference=linear_activation,
        samples=_activation_samples,
        launches=(1, 4),
        large=_large,
        regimes=_activation_regimes,
        module=(
            nn.LinearActivation,
            _Stock,
            {**FEATURES, "activation": "softplus", "beta": 2.0, "threshold": 1.0},
            lambda make: (make.tensor(2, 3, 5),),
        ),
        module_variants=({**FEATURES, "bias": False, "activation": "silu"},),
        representative=True,
    ),
]

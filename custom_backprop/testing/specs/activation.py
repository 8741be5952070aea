"""Specs of the activations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from ... import functional, nn
from ...formulas.activation import ACTIVATIONS
from ..spec import ELEMENTWISE_SIZES as SIZES
from ..spec import Make, OpSpec, Sample

SHAPES = ((7,), (3, 5), (2, 1, 4), (), (0, 3))


def _spec(
    name: str,
    module: str,
    *others: dict[str, Any],
    first: dict[str, Any] | None = None,
    kinks: tuple[float, ...] = (),
    reference: Callable[..., Any] | None = None,
    inplace: bool = False,
    representative: bool = False,
) -> OpSpec:
    """``first`` and ``others`` are the arguments after the input: the first ones run with every
    shape, the others with one. The module gets the first of the others, in which no argument has
    its default value."""
    first = first or {}

    def samples(make: Make) -> Iterator[Sample]:
        for shape in SHAPES:
            yield Sample((make.tensor(*shape, avoid=kinks),), first, name=f"shape {shape}")
        for call in others:
            yield Sample((make.tensor(3, 4, avoid=kinks),), call, name=f"{call}")

    return OpSpec(
        name=name,
        family="activation",
        formula=ACTIVATIONS[name].formula,
        function=getattr(functional, name),
        reference=reference or getattr(F, name),
        samples=samples,
        large=lambda make, size: Sample((make.tensor(*SIZES[size]),), first),
        # another number runs the same code, another approximation does not
        regimes=lambda make: [
            Sample((make.tensor(*SIZES["medium"]),), call)
            for call in others
            if "approximate" in call
        ],
        module=(
            getattr(nn, module),
            getattr(torch.nn, module, _ReLUSquared),
            others[0] if others else first,
            lambda make: (make.tensor(3, 5),),
        ),
        module_variants=({**first, "inplace": True},) if inplace else (),
        elementwise=True,
        representative=representative,
    )


def _relu_squared(x: torch.Tensor) -> torch.Tensor:
    return torch.relu(x).square()


class _ReLUSquared(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _relu_squared(x)


def _hardsigmoid(x: torch.Tensor) -> torch.Tensor:
    """Stock's own; in float64, a function that is exact and has every derivative. Stock's
    multiplies by 1/6 in float32 (see tests/ops/test_activation.py and tests/ops/test_gpu.py), and
    its backward has no forward-mode derivative."""
    return F.relu6(x + 3) / 6 if x.dtype == torch.float64 else F.hardsigmoid(x)


def _hardswish(x: torch.Tensor) -> torch.Tensor:
    """The same: on a GPU, stock's own multiplies by 1/6 in float32."""
    return x * F.relu6(x + 3) / 6 if x.dtype == torch.float64 else F.hardswish(x)


def _gelu(x: torch.Tensor, approximate: str = "none") -> torch.Tensor:
    """Stock's own; in float64, a function whose tail does not cancel: 1 + erf is 0 below -8.3."""
    if x.dtype != torch.float64:
        return F.gelu(x, approximate=approximate)
    if approximate == "none":
        return 0.5 * x * torch.special.erfc(-math.sqrt(0.5) * x)
    return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))


SPECS = [
    _spec("relu", "ReLU", kinks=(0.0,), inplace=True),
    _spec("relu6", "ReLU6", kinks=(0.0, 6.0), inplace=True),
    _spec(
        "leaky_relu",
        "LeakyReLU",
        {"negative_slope": 0.2},
        {"negative_slope": -0.3},
        kinks=(0.0,),
        inplace=True,
    ),
    _spec("elu", "ELU", {"alpha": 0.7}, kinks=(0.0,), inplace=True),
    _spec("selu", "SELU", kinks=(0.0,), inplace=True),
    _spec("celu", "CELU", {"alpha": 0.5}, kinks=(0.0,), inplace=True),
    _spec("gelu", "GELU", {"approximate": "tanh"}, reference=_gelu, representative=True),
    _spec("silu", "SiLU", inplace=True),
    _spec("mish", "Mish", inplace=True),
    _spec("sigmoid", "Sigmoid"),
    _spec("logsigmoid", "LogSigmoid"),
    _spec("hardsigmoid", "Hardsigmoid", kinks=(-3.0, 3.0), reference=_hardsigmoid, inplace=True),
    _spec("hardswish", "Hardswish", kinks=(-3.0, 3.0), reference=_hardswish, inplace=True),
    _spec(
        "hardtanh",
        "Hardtanh",
        {"min_val": -0.5, "max_val": 1.5},
        kinks=(-1.0, -0.5, 1.0, 1.5),
        inplace=True,
    ),
    _spec("tanh", "Tanh"),
    _spec("tanhshrink", "Tanhshrink"),
    _spec("softplus", "Softplus", {"beta": 2.0, "threshold": 3.0}, kinks=(1.5,)),
    _spec("softsign", "Softsign", kinks=(0.0,)),
    _spec("softshrink", "Softshrink", {"lambd": 1.2}, kinks=(-1.2, -0.5, 0.5, 1.2)),
    _spec("hardshrink", "Hardshrink", {"lambd": 1.2}, kinks=(-1.2, -0.5, 0.5, 1.2)),
    _spec(
        "threshold",
        "Threshold",
        {"threshold": -1.0, "value": -7.0},
        first={"threshold": 0.1, "value": 2.0},
        kinks=(-1.0, 0.1),
        inplace=True,
    ),
    _spec("relu_squared", "ReLUSquared", kinks=(0.0,), reference=_relu_squared),
]

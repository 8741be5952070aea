"""Specs of group_norm, instance_norm and batch_norm."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import functional, nn
from ..spec import Make, OpSpec, Sample

#: (N, C, *)
SIZES = {
    "awkward": (3, 6, 13, 173),
    "small": (8, 8, 8, 8),
    "medium": (16, 16, 16, 16),
    "large": (16, 64, 32, 32),
    "huge": (64, 256, 64, 64),
}


def _by_definition(input, over, weight, bias, eps):
    """Of statistics ``over`` these dimensions. Under torch.func stock's second derivatives of
    batch_norm and instance_norm are wrong (tests/ops/test_batch_norm.py)."""
    d = input - input.mean(over, keepdim=True)
    y = d * (d.square().mean(over, keepdim=True) + eps).rsqrt()
    shape = (1, -1, *(1 for _ in input.shape[2:]))
    y = y if weight is None else y * weight.view(shape)
    return y if bias is None else y + bias.view(shape)


def instance_norm(
    input, running_mean=None, running_var=None, weight=None, bias=None, use_input_stats=True,
    momentum=0.1, eps=1e-5,
):  # fmt: skip
    """Stock's where it is right."""
    if use_input_stats and torch._C._are_functorch_transforms_active():
        return _by_definition(input, list(range(2, input.dim())), weight, bias, eps)
    return F.instance_norm(
        input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps
    )


def group_norm(input, num_groups, weight=None, bias=None, eps=1e-5):
    """Stock's; of a bias alone, where it has no backward, without it
    (tests/ops/test_group_norm.py)."""
    if weight is None and bias is not None:
        shape = (1, -1, *(1 for _ in input.shape[2:]))
        return F.group_norm(input, num_groups, eps=eps) + bias.view(shape)
    return F.group_norm(input, num_groups, weight, bias, eps)


def _group(make: Make, groups: int, *shape: int, parameters: bool = True, **named: Any) -> Sample:
    """Of x of this shape."""
    x, c = make.tensor(*shape), shape[1]
    given = (make.tensor(c), make.tensor(c)) if parameters else ()
    return Sample((x, groups, *given), named, named.pop("name", ""))


def _instance(make: Make, *shape: int, parameters: bool = True, **named: Any) -> Sample:
    """Of x of this shape."""
    x, c = make.tensor(*shape), shape[1]
    given = (None, None, make.tensor(c), make.tensor(c)) if parameters else ()
    return Sample((x, *given), named, named.pop("name", ""))


def _group_large(make: Make, size: str) -> Sample:
    """In groups of two channels; in two groups that are longer than a block, where audited."""
    return _group(make, 2 if size == "awkward" else SIZES[size][1] // 2, *SIZES[size])


def _group_samples(make: Make) -> Iterator[Sample]:
    yield _group(make, 2, 1, 6, 2, name="groups of three channels")
    yield _group(make, 2, 2, 2, 1, 2, 1, eps=0.1, name="a group a channel")
    yield _group(make, 1, 2, 3, parameters=False, name="no *, no parameters")
    yield _group(make, 2, 0, 4, 3, name="no samples")
    yield Sample((make.tensor(1, 2, 2), 1, None, make.tensor(2)), name="a bias alone")


def _instance_samples(make: Make) -> Iterator[Sample]:
    yield _instance(make, 1, 2, 5, name="a line")
    yield _instance(make, 2, 1, 3, 1, parameters=False, eps=0.1, name="a picture, no parameters")
    mean, variance = (make.tensor(2, low=low, requires_grad=False) for low in (-3.0, 0.5))
    args = make.tensor(2, 2, 1), mean, variance, make.tensor(2), make.tensor(2), False
    yield Sample(args, name="running statistics")


def _group_regimes(make: Make) -> Iterator[Sample]:
    yield _group(make, 8, 64, 512, name="no *")
    yield _group(make, 32, 64, 256, 2**10, parameters=False, name="no parameters")
    yield _group(make, 32, 4, 256, 2**20 + 1, name="offsets in int64")
    yield _group(make, 8, 2**20, 24, 2**6, name="groups that fit a block, offsets in int64")
    x = torch.empty(8, 64, 32, 32, device=make.device, dtype=make.dtype)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    yield Sample((x, 32, make.tensor(64), make.tensor(64)), name="channels last")
    frozen = make.tensor(8, 64, 1024, requires_grad=False)
    yield Sample((frozen, 32, make.tensor(64), make.tensor(64)), name="a frozen input")


def batch_norm(
    input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1,
    eps=1e-5,
):  # fmt: skip
    """Stock's where it is right; of a bias alone, where its second derivative raises, without it
    (tests/ops/test_batch_norm.py)."""
    if weight is None and bias is not None:
        y = batch_norm(input, running_mean, running_var, None, None, training, momentum, eps)
        return y + bias.view(-1, *(1 for _ in input.shape[2:]))
    if training and torch._C._are_functorch_transforms_active():
        return _by_definition(input, [0, *range(2, input.dim())], weight, bias, eps)
    return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


def _train(make: Make, x: Tensor, parameters: bool = True, **named: Any) -> Sample:
    given = (make.tensor(x.shape[1]), make.tensor(x.shape[1])) if parameters else (None, None)
    return Sample((x, None, None, *given, True), named, named.pop("name", ""))


def _evaluate(make: Make, x: Tensor, *given: Tensor | None, **named: Any) -> Sample:
    mean = make.tensor(x.shape[1], requires_grad=False)
    variance = make.tensor(x.shape[1], low=0.5, requires_grad=False)
    return Sample((x, mean, variance, *given), named, named.pop("name", ""))


def _samples(make: Make) -> Iterator[Sample]:
    yield _train(make, make.tensor(2, 2, 2), name="training")
    yield _train(make, make.tensor(3, 2), False, eps=0.1, name="no *, no parameters")
    yield _train(make, make.tensor(0, 3), name="no samples")
    bias = make.tensor(2)
    yield _evaluate(make, make.tensor(1, 2, 2, 1), None, bias, eps=0.1, name="a bias alone")
    yield _evaluate(make, make.tensor(2, 2), make.tensor(2), make.tensor(2), name="evaluation")


def _regimes(make: Make) -> Iterator[Sample]:
    yield _train(make, make.tensor(4096, 1024), name="no *")
    yield _train(make, make.tensor(64, 128, 49), False, name="a short *, no parameters")
    yield _train(make, make.tensor(4, 256, 2**20 + 1), name="offsets in int64")
    yield _train(make, make.tensor(64, 128, 49, requires_grad=False), name="a frozen input")
    x = make.tensor(64, 128, 16, 16)
    yield _evaluate(make, x, make.tensor(128), make.tensor(128), name="evaluation")
    yield _evaluate(make, x, name="evaluation, no parameters")


SHAPE = {"num_features": 4, "eps": 0.1}

SPECS = [
    OpSpec(
        name="group_norm",
        family="channel_norm",
        formula="y = w x̂ + b, x̂ = r (x - μ);  dx = r (g - Σ g / n - x̂ Σ g x̂ / n), g = w dy",
        function=functional.group_norm,
        reference=group_norm,
        samples=_group_samples,
        launches=(1, 2),
        large=_group_large,
        regimes=_group_regimes,
        module=(
            nn.GroupNorm,
            torch.nn.GroupNorm,
            {"num_groups": 2, "num_channels": 4, "eps": 0.1},
            lambda make: (make.tensor(3, 4, 2),),
        ),
        module_variants=(
            {"num_groups": 2, "num_channels": 4, "eps": 0.1, "affine": False},
            {"num_groups": 2, "num_channels": 4, "bias": False},
        ),
    ),
    OpSpec(
        name="instance_norm",
        family="channel_norm",
        formula="y = w x̂ + b, x̂ = r (x - μ);  dx = w r (dy - Σ dy / n - x̂ Σ dy x̂ / n)",
        function=functional.instance_norm,
        reference=instance_norm,
        samples=_instance_samples,
        launches=(1, 2),
        large=lambda make, size: _instance(make, *SIZES[size]),
        module=(
            nn.InstanceNorm1d,
            torch.nn.InstanceNorm1d,
            {**SHAPE, "affine": True, "track_running_stats": True, "momentum": 0.3},
            lambda make: (make.tensor(3, 4, 2),),
        ),
        module_variants=({**SHAPE, "affine": True, "bias": False},),
    ),
    OpSpec(
        name="batch_norm",
        family="channel_norm",
        formula="y = w x̂ + b, x̂ = r (x - μ);  dx = w r (dy - Σ dy / n - x̂ Σ dy x̂ / n)",
        function=functional.batch_norm,
        reference=batch_norm,
        samples=_samples,
        launches=(4, 4),
        read_twice=True,
        large=lambda make, size: _train(make, make.tensor(*SIZES[size])),
        regimes=_regimes,
        module=(
            nn.BatchNorm1d,
            torch.nn.BatchNorm1d,
            {**SHAPE, "momentum": 0.3},
            lambda make: (make.tensor(3, 4, 2),),
        ),
        module_variants=(
            {**SHAPE, "affine": False},
            {**SHAPE, "bias": False},
            {**SHAPE, "track_running_stats": False},
        ),
    ),
]

"""Specs of the activations."""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F

from ... import functional
from ...formulas.activation import ACTIVATIONS
from ..spec import Make, OpSpec, Sample

SHAPES = ((7,), (3, 5), (2, 1, 4), ())
SIZES = {"small": (64, 64), "medium": (256, 256), "large": (1024, 1024)}


def _spec(name: str, kinks: tuple[float, ...] = (), **parameters: float) -> OpSpec:
    def samples(make: Make) -> Iterator[Sample]:
        for shape in SHAPES:
            yield Sample((make.tensor(*shape, avoid=kinks),), name=f"shape {shape}")

    return OpSpec(
        name=name,
        family="activation",
        formula=ACTIVATIONS[name].formula,
        function=getattr(functional, name),
        reference=getattr(F, name),
        samples=samples,
        large=lambda make, size: Sample((make.tensor(*SIZES[size]),)),
    )


SPECS = [_spec("relu", kinks=(0.0,)), _spec("silu")]

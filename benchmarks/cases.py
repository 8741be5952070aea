"""The calls that are timed: every op of the database at three sizes, forward and forward + backward, ours and stock."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from custom_backprop.testing import Make, OpSpec
from custom_backprop.testing.case import is_float, outputs, weights_for

SIZES = ("small", "medium", "large")
DIRECTIONS = ("forward", "forward+backward")


@dataclass(frozen=True)
class Pair:
    """Ours and stock, on the same inputs."""

    ours: Callable[[], Any]
    stock: Callable[[], Any]


def pair(spec: OpSpec, size: str, direction: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Pair:
    """Both calls of one op. A loss is followed by backward() of 1, as in training; another op by a random gradient."""
    sample = spec.large(Make(device, dtype), size)
    if direction == "forward":
        args = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in sample.args)
        return Pair(lambda: spec.function(*args, **sample.kwargs), lambda: spec.reference(*args, **sample.kwargs))
    leaves = [a for a in sample.args if is_float(a) and a.requires_grad]
    results = outputs(spec.reference(*sample.args, **sample.kwargs))
    dys = [torch.ones_like(r) if r.dim() == 0 else w for r, w in zip(results, weights_for(results), strict=True)]

    def step(function: Callable[..., Any]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(outputs(function(*sample.args, **sample.kwargs)), leaves, dys)

    return Pair(step(spec.function), step(spec.reference))

"""``python -m pytest benchmarks``: every op, with ours and stock in one group."""

from __future__ import annotations

import pytest
import torch

from custom_backprop.testing import database

from .cases import DIRECTIONS, SIZES, pair

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("which", ["ours", "stock"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("spec", database().values(), ids=str)
def test_op(benchmark, spec, size, direction, which):
    benchmark.group = f"{spec.name} {size} {direction}"
    calls = pair(spec, size, direction, DEVICE)
    call = getattr(calls, which)

    def synchronised(*args):
        call(*args)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(
        synchronised,
        setup=lambda: (calls.prepare(), {}),
        rounds=5 if size == "large" else 50,
        warmup_rounds=2,
    )

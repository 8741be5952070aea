"""Each op in a CUDA graph, forward and backward: two replays, and a second call, have the bits of
the first call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from custom_backprop.testing import Make, OpSpec
from custom_backprop.testing.case import same_bits

from .case import BOTH, Case, Inputs, sample_of
from .device import Card
from .results import Row

SECTION = "graphs"


def cases(device: Card, specs: Sequence[OpSpec]) -> list[Case]:
    """Each op in each dtype that it has."""
    return [
        Case(row, partial(_repeated, device, spec, dtype, row), timed=False)
        for dtype in device.dtypes
        for spec in specs
        if dtype in spec.low_precision
        for row in [Row(SECTION, spec.name, direction=BOTH, dtype=str(dtype)[6:])]
    ]


def _repeated(device: Card, spec: OpSpec, dtype: torch.dtype, row: Row) -> Iterator[Row]:
    make = Make(device.kind, dtype, there=device.kind == "cuda")
    size = "small" if device.size == "small" else "large"
    given = Inputs(spec, sample_of(spec, make, None, None, size, seeded=True))
    call = partial(given.both, spec.function)
    # detached: the graph of the first call would tie the recorded one to the default stream
    first = [t.detach().clone() for t in call()]
    replay = device.captured(call)
    found = {"a second call": call(), "a replay": replay(), "a second replay": replay()}
    wrong = [name for name, results in found.items() if not _same(first, results)]
    yield row.because("failed", f"other bits: {', '.join(wrong)}") if wrong else replace(row)


def _same(first: list[Tensor], other: list[Tensor]) -> bool:
    return all(map(same_bits, first, other))

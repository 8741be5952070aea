"""Spec of normalize."""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F

from ... import functional
from ..spec import Make, OpSpec, Sample
from .norm import SIZES


def _samples(make: Make) -> Iterator[Sample]:
    yield Sample((make.tensor(3, 5),), name="rows")
    yield Sample((make.tensor(2, 4, 2),), {"dim": -2, "eps": 0.5}, name="middle")
    yield Sample((make.tensor(3, 2), 2, 0, 9.0), name="shorter than ε")
    yield Sample((make.tensor(),), {"dim": 0}, name="0-d")
    yield Sample((make.tensor(0, 3),), name="no rows")


def _regimes(make: Make) -> Iterator[Sample]:
    yield Sample((make.tensor(64, 2**17),), name="rows in a loop")
    yield Sample((make.tensor(2**16, 2**15),), name="offsets in int64")


SPECS = [
    OpSpec(
        name="normalize",
        rows=(0,),
        family="normalize",
        formula="y = x / r, r = max(‖x‖, ε);  dx = (dy - y Σ y dy) / r, dy / ε where ‖x‖ <= ε",
        function=functional.normalize,
        reference=F.normalize,
        samples=_samples,
        large=lambda make, size: Sample((make.tensor(*SIZES[size]),)),
        by_length=lambda make, rows, n: Sample((make.tensor(rows, n),)),
        regimes=_regimes,
    )
]

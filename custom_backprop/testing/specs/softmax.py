"""Specs of the softmaxes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from ... import functional, nn
from ...formulas.softmax import SOFTMAXES
from ..spec import Make, OpSpec, Sample

SIZES = {
    "awkward": (37, 1031),
    "small": (64, 64),
    "medium": (256, 256),
    "large": (1024, 1024),
    "huge": (16384, 4096),
}


def _samples(make: Make) -> Iterator[Sample]:
    yield Sample((make.tensor(2, 5), -1), name="last")
    yield Sample((make.tensor(2, 4, 2),), {"dim": 1}, name="middle")
    yield Sample((make.tensor(3, 2),), {"dim": 0, "dtype": torch.float64}, name="first, dtype")
    yield Sample((make.tensor(), 0), name="0-d")
    yield Sample((make.tensor(0, 3), 1), name="no rows")


def _regimes(make: Make) -> Iterator[Sample]:
    yield Sample((make.tensor(16, 2**18), -1), name="rows in a loop")
    yield Sample((make.tensor(64, 512, 64), 1), name="rows side by side")
    yield Sample((make.tensor(4, 2**16, 64), 1), name="rows side by side, in a loop")
    yield Sample((make.tensor(256, 256), -1), {"dtype": torch.float64}, name="of another dtype")
    yield Sample((make.tensor(2**16, 2**15), 0), name="offsets in int64")


def _rows(make: Make, rows: int, n: int) -> Sample:
    return Sample((make.tensor(rows, n), -1))


def _spec(name: str, module: str) -> OpSpec:
    return OpSpec(
        name=name,
        family="softmax",
        formula=SOFTMAXES[name].formula,
        function=getattr(functional, name),
        reference=getattr(F, name),
        samples=_samples,
        large=lambda make, size: _rows(make, *SIZES[size]),
        by_length=_rows,
        regimes=_regimes,
        module=(
            getattr(nn, module),
            getattr(torch.nn, module),
            {"dim": 1},
            lambda make: (make.tensor(3, 5, 2),),
        ),
        rows=(0,),
        representative=name == "softmax",
    )


SPECS = [
    _spec("softmax", "Softmax"),
    _spec("softmin", "Softmin"),
    _spec("log_softmax", "LogSoftmax"),
]

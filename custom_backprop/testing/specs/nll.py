"""The spec of nll_loss, and what that of cross_entropy shares with it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import functional, nn
from ..spec import Make, OpSpec, Sample

SIZES = {
    "awkward": (1031, 7),
    "small": (64, 64),
    "medium": (4096, 16),
    "large": (2**18, 32),
    "huge": (2**20, 64),
}  # many rows: forward reads one element of each


def some_classes(make: Make, *shape: int, high: int) -> Tensor:
    """Classes. That of the first row is ignored: -100."""
    t = make.index(*shape, high=high)
    t.view(-1)[:1] = -100
    return t


def _samples(make: Make) -> Iterator[Sample]:
    yield Sample((make.tensor(5, 3), some_classes(make, 5, high=3)), name="mean")
    weighted = {
        "weight": make.tensor(4, low=0.1, requires_grad=False),
        "reduction": "sum",
        "ignore_index": 2,
    }
    yield Sample(
        (make.tensor(2, 4, 3), make.index(2, 3, high=4)), weighted, name="3-D, weight, sum"
    )
    weighted = {"weight": make.tensor(3, low=0.1, requires_grad=False), "reduction": "none"}
    yield Sample(
        (make.tensor(2, 3, 2, 1), some_classes(make, 2, 2, 1, high=3)),
        weighted,
        name="4-D, weight, none",
    )
    yield Sample((make.tensor(3), make.index(1, high=3).view(())), name="one row")
    yield Sample((make.tensor(0, 3), make.index(0, high=3)), {"reduction": "sum"}, name="no rows")


def _regimes(make: Make) -> Iterator[Sample]:
    weighted = {"weight": make.tensor(1024, requires_grad=False), "reduction": "none"}
    yield Sample(
        (make.tensor(256, 1024), make.index(256, high=1024)), weighted, name="weight, none"
    )
    yield Sample(
        (make.tensor(16, 64, 256), make.index(16, 256, high=64)),
        {"reduction": "sum"},
        name="3-D, sum",
    )
    yield Sample(
        (make.tensor(2**16, 2**15), make.index(2**16, high=2**15)), name="offsets in int64"
    )
    yield Sample(
        (make.tensor(1, 2**15, 2**16), make.index(1, 2**16, high=2**15)),
        name="3-D, offsets of classes in int64",
    )


def of_rows(make: Make, rows: int, classes: int) -> Sample:
    return Sample((make.tensor(rows, classes), make.index(rows, high=classes)))


def inputs(make: Make) -> tuple[Tensor, Tensor]:
    return make.tensor(5, 3), torch.tensor([0, 1, 2, 1, 0], device=make.device)


OPTIONS = {"weight": torch.tensor([0.5, 2.0, 3.0]), "ignore_index": 1, "reduction": "sum"}

SPECS = [
    OpSpec(
        name="nll_loss",
        family="nll",
        formula="L = -w_t x_t;  dx = -dy w_t [c = t]",
        function=functional.nll_loss,
        reference=F.nll_loss,
        samples=_samples,
        launches=(2, 1),
        large=lambda make, size: of_rows(make, *SIZES[size]),
        gathers=True,
        regimes=_regimes,
        module=(nn.NLLLoss, torch.nn.NLLLoss, OPTIONS, inputs),
    ),
]

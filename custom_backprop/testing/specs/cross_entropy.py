"""Specs of nll_loss and cross_entropy."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import functional, nn
from ..spec import Make, OpSpec, Sample

SIZES = {
    "awkward": (37, 1031),
    "small": (64, 64),
    "medium": (256, 256),
    "large": (1024, 32000),
    "huge": (8192, 131072),
}
NLL_SIZES = {
    "awkward": (1031, 7),
    "small": (64, 64),
    "medium": (4096, 16),
    "large": (2**18, 32),
    "huge": (2**20, 64),
}  # many rows: forward reads one number of each


def _classes(make: Make, *shape: int, high: int) -> Tensor:
    """Classes, the first row's ignored: -100."""
    t = make.index(*shape, high=high)
    t.view(-1)[:1] = -100
    return t


def _nll_samples(make: Make) -> Iterator[Sample]:
    yield Sample((make.tensor(5, 3), _classes(make, 5, high=3)), name="mean")
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
        (make.tensor(2, 3, 2, 1), _classes(make, 2, 2, 1, high=3)),
        weighted,
        name="4-D, weight, none",
    )
    yield Sample((make.tensor(3), make.index(1, high=3).view(())), name="one row")
    yield Sample((make.tensor(0, 3), make.index(0, high=3)), {"reduction": "sum"}, name="no rows")


def _nll_regimes(make: Make) -> Iterator[Sample]:
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


def _samples(make: Make) -> Iterator[Sample]:
    yield Sample((make.tensor(5, 3), _classes(make, 5, high=3)), name="mean")
    options = {
        "weight": make.tensor(4, low=0.1, requires_grad=False),
        "ignore_index": 2,
        "label_smoothing": 0.2,
    }
    yield Sample(
        (make.tensor(2, 4, 3), make.index(2, 3, high=4)),
        options,
        name="3-D, weight, smoothing, mean",
    )
    options = {"weight": make.tensor(3, low=0.1, requires_grad=False), "reduction": "none"}
    yield Sample(
        (make.tensor(2, 3, 2, 1), _classes(make, 2, 2, 1, high=3)),
        options,
        name="4-D, weight, none",
    )
    options = {"reduction": "none", "label_smoothing": 0.1}
    yield Sample(
        (make.tensor(3), make.index(1, high=3).view(())), options, name="one row, smoothing"
    )
    options = {"weight": make.tensor(3, low=0.1, requires_grad=False), "label_smoothing": 0.3}
    yield Sample(
        (make.tensor(2, 3), make.probabilities(2, 3)),
        options,
        name="probabilities, weight, smoothing, mean",
    )
    yield Sample(
        (make.tensor(2, 3, 2), make.probabilities(2, 3, 2, dim=1)),
        {"reduction": "none"},
        name="probabilities, 3-D, none",
    )
    yield Sample(
        (make.tensor(2, 3), make.probabilities(2, 3, requires_grad=False)),
        {"reduction": "sum"},
        name="probabilities, sum",
    )
    yield Sample((make.tensor(0, 3), make.index(0, high=3)), {"reduction": "sum"}, name="no rows")


def _regimes(make: Make) -> Iterator[Sample]:
    """Each kind of target, beside a weight or not, in rows that are read at once and in rows that
    are read in a loop."""
    for classes in (1024, 2**15):
        x, index = make.tensor(256, classes), make.index(256, high=classes)
        weight, probabilities = (
            make.tensor(classes, requires_grad=False),
            make.probabilities(256, classes),
        )
        options = {"weight": weight, "label_smoothing": 0.1}
        yield Sample((x, probabilities), options, name="probabilities, weight, smoothing, mean")
        yield Sample((x, index), options, name="weight, smoothing, mean")
        yield Sample((x, probabilities), {"reduction": "none"}, name="probabilities, none")
        yield Sample((x, index), {"weight": weight, "reduction": "none"}, name="weight, none")
    yield Sample(
        (make.tensor(256, 1024, requires_grad=False), make.probabilities(256, 1024)),
        name="the gradient of the target alone",
    )
    x, options = make.tensor(16, 64, 256), {"reduction": "sum", "label_smoothing": 0.1}
    yield Sample(
        (x, make.probabilities(16, 64, 256, dim=1, requires_grad=False)),
        options,
        name="probabilities, 3-D, sum",
    )
    yield Sample((x, make.index(16, 256, high=64)), options, name="smoothing, 3-D, sum")
    x, index = make.tensor(2**16, 2**15), make.index(2**16, high=2**15)
    for reduction in ("mean", "none"):
        yield Sample((x, index), {"reduction": reduction}, name=f"offsets in int64, {reduction}")
    x, index = make.tensor(1, 2**15, 2**16), make.index(1, 2**16, high=2**15)
    for reduction in ("mean", "none"):
        options = {"reduction": reduction}
        yield Sample((x, index), options, name=f"3-D, offsets of classes in int64, {reduction}")


def _large(sizes: dict[str, tuple[int, int]]) -> Callable[[Make, str], Sample]:
    def large(make: Make, size: str) -> Sample:
        rows, classes = sizes[size]
        return Sample((make.tensor(rows, classes), make.index(rows, high=classes)))

    return large


def _inputs(make: Make) -> tuple[Tensor, Tensor]:
    return make.tensor(5, 3), torch.tensor([0, 1, 2, 1, 0], device=make.device)


OPTIONS = {"weight": torch.tensor([0.5, 2.0, 3.0]), "ignore_index": 1, "reduction": "sum"}

SPECS = [
    OpSpec(
        name="nll_loss",
        family="cross_entropy",
        formula="L = -w_t x_t;  dx = -dy w_t [c = t]",
        function=functional.nll_loss,
        reference=F.nll_loss,
        samples=_nll_samples,
        large=_large(NLL_SIZES),
        regimes=_nll_regimes,
        module=(nn.NLLLoss, torch.nn.NLLLoss, OPTIONS, _inputs),
    ),
    OpSpec(
        name="cross_entropy",
        family="cross_entropy",
        formula="L = Σ q (lse - x), lse = log Σ e^x;  dx = dy (softmax(x) Σ q - q)",
        function=functional.cross_entropy,
        reference=F.cross_entropy,
        samples=_samples,
        large=_large(SIZES),
        regimes=_regimes,
        module=(
            nn.CrossEntropyLoss,
            torch.nn.CrossEntropyLoss,
            {**OPTIONS, "label_smoothing": 0.1},
            _inputs,
        ),
        representative=True,
    ),
]

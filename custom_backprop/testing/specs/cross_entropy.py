"""The spec of cross_entropy."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from ... import functional, nn
from ..spec import Make, OpSpec, Sample
from .nll import OPTIONS, inputs, of_rows, some_classes

SIZES = {
    "awkward": (37, 1031),
    "small": (64, 64),
    "medium": (256, 256),
    "large": (1024, 32000),
    "huge": (8192, 131072),
}


def _samples(make: Make) -> Iterator[Sample]:
    yield Sample((make.tensor(5, 3), some_classes(make, 5, high=3)), name="mean")
    options = {
        "weight": make.tensor(4, low=0.1, requires_grad=False),
        "ignore_index": 2,
        "label_smoothing": 0.2,
    }
    yield Sample(
        (make.tensor(2, 4, 2), make.index(2, 2, high=4)),
        options,
        name="3-D, weight, smoothing, mean",
    )
    options = {"weight": make.tensor(3, low=0.1, requires_grad=False), "reduction": "none"}
    yield Sample(
        (make.tensor(2, 3, 2, 1), some_classes(make, 2, 2, 1, high=3)),
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
    """Each kind of target, with and without a weight, with rows that fit in one block and with rows
    that are read in a loop."""
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
    x = make.tensor(2048, 1024, requires_grad=False).half().requires_grad_()
    yield Sample((x, make.index(2048, high=1024)), name="mean, its gradient made in backward")
    for named in ({}, {"reduction": "none"}, {"reduction": "none", "label_smoothing": 0.1}):
        name = ", ".join(map(str, named.values()))
        x, index = make.tensor(2**16, 2**15), make.index(2**16, high=2**15)
        yield Sample((x, index), named, name=f"offsets in int64, {name}")
        x, index = make.tensor(1, 2**15, 2**16), make.index(1, 2**16, high=2**15)
        yield Sample((x, index), named, name=f"3-D, offsets of classes in int64, {name}")


SPECS = [
    OpSpec(
        name="cross_entropy",
        family="cross_entropy",
        formula="L = Σ q (lse - x), lse = log Σ e^x;  dx = dy (softmax(x) Σ q - q)",
        function=functional.cross_entropy,
        reference=F.cross_entropy,
        samples=_samples,
        launches=(2, 1),
        large=lambda make, size: of_rows(make, *SIZES[size]),
        by_length=of_rows,
        regimes=_regimes,
        module=(
            nn.CrossEntropyLoss,
            torch.nn.CrossEntropyLoss,
            {**OPTIONS, "label_smoothing": 0.1},
            inputs,
        ),
        representative=True,
    ),
]

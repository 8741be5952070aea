"""The spec of embedding_bag.

Its samples have no row twice with ``scale_grad_by_freq``: torch's gradient is not a derivative
there.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import functional, nn
from ..spec import Make, OpSpec, Sample

#: (bags, indices of each, rows of the table, columns)
SIZES = {
    "awkward": (11, 13, 3, 65),
    "small": (4, 4, 16, 64),
    "medium": (4, 32, 128, 512),
    "large": (512, 8, 2048, 256),
    "huge": (16384, 8, 2**17, 512),
}


def _reference(input, weight, offsets=None, *args, **kwargs):
    """Stock's; in forward mode, which torch lacks here, embedding and a reduction of each bag."""
    try:
        return F.embedding_bag(input, weight, offsets, *args, **kwargs)
    except NotImplementedError:
        bound = inspect.signature(F.embedding_bag).bind(input, weight, offsets, *args, **kwargs)
        bound.apply_defaults()
        given = SimpleNamespace(**bound.arguments)
    rows, n, p = F.embedding(input.reshape(-1), weight), input.numel(), given.per_sample_weights
    if offsets is None:
        offsets = torch.arange(0, n, input.shape[1])
    bounds = [*offsets.tolist(), *([] if given.include_last_offset else [n])]
    reduce: Any = {"sum": torch.sum, "mean": torch.mean, "max": torch.amax}[given.mode]
    rows = rows if p is None else rows * p.reshape(-1, 1)
    bags = [
        [k for k in range(*b) if input.view(-1)[k] != given.padding_idx] for b in pairwise(bounds)
    ]
    return torch.stack([reduce(rows[b], 0) if b else 0 * weight[0] for b in bags])


def _integers(make: Make, *given: int) -> Tensor:
    return torch.tensor(given, device=make.device)


def _samples(make: Make) -> Iterator[Sample]:
    index = _integers(make, 2, 0, 2, 1, 1)
    yield Sample((index, make.tensor(3, 2), _integers(make, 0, 2, 2)), name="mean, an empty bag")
    yield Sample(
        (
            index[:4].view(2, 2).int(), make.tensor(3, 2), None, None, 2, False, "sum", False,
            make.tensor(2, 2),
        ),
        name="sum, per-sample weights",
    )  # fmt: skip
    padded = {"mode": "max", "padding_idx": 2, "include_last_offset": True, "norm_type": 1.0}
    yield Sample(
        (index, make.tensor(3, 2), _integers(make, 0, 1, 3, 4)), padded, name="max, padding"
    )
    rare = {"scale_grad_by_freq": True}
    yield Sample((_integers(make, 2, 1).view(1, 2), make.tensor(3, 2)), rare, name="by frequency")
    yield Sample((index[:0], make.tensor(2, 2), _integers(make, 0)), name="no index")


def _large(make: Make, size: str) -> Sample:
    bags, n, rows, columns = SIZES[size]
    return Sample((make.index(bags, n, high=rows), make.tensor(rows, columns)))


def _regimes(make: Make) -> Iterator[Sample]:
    index, table = make.index(64, 8, high=64), make.tensor(64, 64)
    for rare, p in ((True, make.tensor(64, 8)), (False, make.tensor(64, 8, requires_grad=False))):
        yield Sample((index, table, None, None, 2, rare, "sum", False, p), name="weighted")
    yield Sample((index.int(), table), {"mode": "max"}, name="max, int32")
    yield Sample((index, make.tensor(8192, 64).mT), {"padding_idx": 0}, name="rows in blocks")


SPECS = [
    OpSpec(
        name="embedding_bag",
        family="embedding_bag",
        formula="y_b = Σ p_k W_t, mean or max;  dW_v = Σ p_k dy_b [t_k = v], dp_k = <dy_b, W_t>",
        function=functional.embedding_bag,
        reference=_reference,
        samples=_samples,
        launches=(5, 23),
        large=_large,
        gathers=True,
        regimes=_regimes,
        module=(
            nn.EmbeddingBag,
            torch.nn.EmbeddingBag,
            {
                "num_embeddings": 5,
                "embedding_dim": 3,
                "max_norm": 1.0,
                "norm_type": 1.0,
                "scale_grad_by_freq": True,
                "mode": "sum",
                "include_last_offset": True,
                "padding_idx": 1,
            },
            lambda make: (_integers(make, 1, 4, 4, 0, 2, 3), _integers(make, 0, 2, 6)),
        ),
        module_variants=({"num_embeddings": 5, "embedding_dim": 3, "sparse": True},),
    ),
]

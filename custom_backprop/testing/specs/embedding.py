"""The spec of embedding.

Its samples look up no padding, and with ``scale_grad_by_freq`` no row twice: there torch's gradient
is not a derivative, as gradcheck would notice.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import functional, nn
from ..spec import Make, OpSpec, Sample

#: (rows looked up, rows of the table, columns)
SIZES = {
    "awkward": (150, 3, 65),
    "small": (16, 16, 256),
    "medium": (128, 128, 512),
    "large": (2048, 4096, 512),
    "huge": (16384, 32768, 4096),
}


def _indices(make: Make, *given: int) -> Tensor:
    return torch.tensor(given, device=make.device)


def _samples(make: Make) -> Iterator[Sample]:
    yield Sample((_indices(make, 2, 0, 2, 2), make.tensor(4, 3)), name="a row thrice, some never")
    padding = {"padding_idx": -1, "norm_type": 1.0}
    indices = _indices(make, 0, 1, 1, 0).view(2, 2).int()
    yield Sample((indices, make.tensor(3, 2)), padding, name="2-D, int32, padding")
    rare = {"scale_grad_by_freq": True}
    yield Sample((_indices(make, 3, 1), make.tensor(4, 2)), rare, name="by frequency")
    yield Sample((_indices(make, 1).view(()), make.tensor(2, 3)), name="one index")
    yield Sample((_indices(make).long(), make.tensor(2, 3)), name="no index")


def _large(make: Make, size: str) -> Sample:
    looked_up, rows, columns = SIZES[size]
    return Sample((make.index(looked_up, high=rows), make.tensor(rows, columns)))


def _regimes(make: Make) -> Iterator[Sample]:
    options = {"padding_idx": 0, "scale_grad_by_freq": True}
    yield Sample((make.index(16, high=8), make.tensor(8, 64)), options, name="no whole chunk")
    yield Sample((make.index(4096, high=64), make.tensor(64, 64)), options, name="short rows")
    yield Sample((make.index(64, high=64), make.tensor(64, 8192)), name="rows in blocks")
    table = make.tensor(64, 64).mT
    yield Sample((make.index(64, high=64).int(), table), name="transposed table, int32")


SPECS = [
    OpSpec(
        name="embedding",
        rows=(0,),
        family="embedding",
        formula="y_r = W_t, t = t_r;  dW_v = Σ dy_r [t = v]",
        function=functional.embedding,
        reference=F.embedding,
        samples=_samples,
        launches=(1, 5),
        large=_large,
        by_length=lambda make, rows, n: Sample((make.index(rows, high=rows), make.tensor(rows, n))),
        gathers=True,
        regimes=_regimes,
        module=(
            nn.Embedding,
            torch.nn.Embedding,
            {
                "num_embeddings": 5,
                "embedding_dim": 3,
                "padding_idx": 1,
                "max_norm": 1.0,
                "norm_type": 1.0,
                "scale_grad_by_freq": True,
            },
            lambda make: (_indices(make, 1, 4, 4, 0, 2, 3),),
        ),
        module_variants=({"num_embeddings": 5, "embedding_dim": 3, "sparse": True},),
    ),
]

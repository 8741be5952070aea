"""Specs of the losses that compare whole vectors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import functional, nn
from ..spec import Make, OpSpec, Sample

# the sizes have different options, so that each kernel is compiled and timed with them
SIZES: dict[str, Any] = {
    "awkward": ((67, 131), {"swap": True}),
    "small": ((64, 64), {"p": 3.0, "swap": True}),
    "medium": ((512, 128), {"swap": True}),
    "large": ((8192, 256), {}),
    "huge": ((65536, 1024), {}),
}
NCE_SIZES: dict[str, Any] = {
    "awkward": ((67, 131), {"symmetric": True}),
    "small": ((64, 64), {"symmetric": True}),
    "medium": ((256, 128), {}),
    "large": ((2048, 256), {}),
    "huge": ((16384, 512), {}),
}


def _triplet_samples(make: Make) -> Iterator[Sample]:
    yield Sample(
        (make.tensor(3, 3), make.tensor(3, 3), make.tensor(3, 3)), {"margin": 2.5}, name="mean"
    )
    options: Any = {"margin": 5.0, "p": 3.0, "eps": 0.01, "swap": True, "reduction": "none"}
    yield Sample(
        (make.tensor(2, 1, 2), make.tensor(1, 2, 2), make.tensor(2, 2, 2)),
        options,
        name="broadcast, p = 3, swap, none",
    )
    yield Sample(
        (make.tensor(3), make.tensor(3), make.tensor(3)),
        {"margin": 6.0, "p": 1, "reduction": "sum"},
        name="one row, p = 1, sum",
    )
    options = {"margin": 6.0, "p": math.inf, "swap": True}
    yield Sample(
        (make.tensor(2, 3), make.tensor(2, 3), make.tensor(2, 3)), options, name="p = inf, swap"
    )
    yield Sample(
        (make.tensor(0, 2), make.tensor(0, 2), make.tensor(0, 2)),
        {"reduction": "sum"},
        name="no rows",
    )


def _triplet_regimes(make: Make) -> Iterator[Sample]:
    """Each kind of norm, with a swap and the gradients of each row; and without one, with a sum and
    the gradient of one of the three."""
    for i, p in enumerate((1.0, 2.0, 3.0, math.inf)):
        for swap in (False, True):
            tensors = tuple(
                make.tensor(512, 128, requires_grad=swap or i % 3 == j) for j in range(3)
            )
            options = {"p": p, "swap": swap, "reduction": "none" if swap else "sum"}
            yield Sample(tensors, options, name=f"{options}")
    for shape, name in (((2**10, 2**16), "rows in a loop"), ((2**16, 2**15), "offsets in int64")):
        yield Sample(tuple(make.tensor(*shape) for _ in range(3)), name=name)


def info_nce(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor | None = None,
    temperature: float = 0.1,
    symmetric: bool = False,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """InfoNCE by stock's operators."""
    q, k, *rest = (
        F.normalize(t, dim=-1) if normalize else t
        for t in (query, positive, negatives)
        if t is not None
    )
    if not rest:
        s, target = q @ k.t(), torch.arange(len(q), device=q.device)
    else:
        n = rest[0]
        others = q @ n.t() if n.dim() == 2 else (n @ q.unsqueeze(2)).squeeze(2)
        s, target = (
            torch.cat([(q * k).sum(1, keepdim=True), others], 1),
            torch.zeros(len(q), dtype=torch.int64, device=q.device),
        )
    loss = F.cross_entropy(s / temperature, target, reduction=reduction)
    return (
        (loss + F.cross_entropy(s.t() / temperature, target, reduction=reduction)) / 2
        if symmetric
        else loss
    )


class _Stock(torch.nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, query: Tensor, positive: Tensor, negatives: Tensor | None = None) -> Tensor:
        return info_nce(query, positive, negatives, **self.options)


def _nce_samples(make: Make) -> Iterator[Sample]:
    yield Sample((make.tensor(3, 2), make.tensor(3, 2)), name="among the others")
    options: Any = {"temperature": 0.7, "symmetric": True, "normalize": False, "reduction": "sum"}
    yield Sample((make.tensor(3, 2), make.tensor(3, 2)), options, name="symmetric, sum")
    yield Sample(
        (make.tensor(2, 2), make.tensor(2, 2)),
        {"temperature": 0.5, "symmetric": True, "reduction": "none"},
        name="symmetric, none",
    )
    options = {"temperature": 0.9, "reduction": "none"}
    yield Sample(
        (make.tensor(2, 2), make.tensor(2, 2), make.tensor(3, 2)),
        options,
        name="negatives of all, none",
    )
    options = {"temperature": 2.0, "normalize": False}
    yield Sample(
        (make.tensor(2, 3), make.tensor(2, 3), make.tensor(2, 2, 3)),
        options,
        name="negatives of each row, mean",
    )
    yield Sample(
        (make.tensor(0, 2), make.tensor(0, 2), make.tensor(2, 2)),
        {"reduction": "sum"},
        name="no rows",
    )


def _nce_regimes(make: Make) -> Iterator[Sample]:
    q, k, n = (make.tensor(rows, 2048) for rows in (256, 256, 512))
    yield Sample((q, k, n), {"reduction": "none"}, name="long vectors, negatives of all, none")
    pair = make.tensor(2**16, 8), make.tensor(2**16, 8)
    yield Sample(pair, {"symmetric": True}, name="similarities in int64")
    pair = make.tensor(2**10, 2**16), make.tensor(2**10, 2**16)
    yield Sample(pair, name="vectors in a loop")
    pair = make.tensor(2**16, 2**15), make.tensor(2**16, 2**15)
    yield Sample(pair, name="vectors in int64")


SPECS = [
    OpSpec(
        name="triplet_margin_loss",
        family="contrastive",
        formula="L = max(0, m + d_ap - d_an), d = ‖x - y‖_p;  "
        "da = dy (u_ap - u_an), dp = -dy u_ap, dn = dy u_an where L > 0, u = ∂d/∂x",
        function=functional.triplet_margin_loss,
        reference=F.triplet_margin_loss,
        samples=_triplet_samples,
        launches=(2, 1),
        large=lambda make, size: Sample(
            tuple(make.tensor(*SIZES[size][0]) for _ in range(3)), SIZES[size][1]
        ),
        by_length=lambda make, rows, n: Sample(tuple(make.tensor(rows, n) for _ in range(3))),
        regimes=_triplet_regimes,
        module=(
            nn.TripletMarginLoss,
            torch.nn.TripletMarginLoss,
            {"margin": 5.0, "p": 3.0, "eps": 0.1, "swap": True, "reduction": "sum"},
            lambda make: tuple(make.tensor(4, 3) for _ in range(3)),
        ),
    ),
    OpSpec(
        name="info_nce",
        family="contrastive",
        formula="L = -log softmax(s)_t, s = q kᵀ / τ;  "
        "G = (softmax(s) - I) / τ, dq = dy G k, dk = Gᵀ (dy q)",
        function=functional.info_nce,
        reference=info_nce,
        samples=_nce_samples,
        launches=(6, 8),
        large=lambda make, size: Sample(
            tuple(make.tensor(*NCE_SIZES[size][0]) for _ in range(2)), NCE_SIZES[size][1]
        ),
        regimes=_nce_regimes,
        module=(
            nn.InfoNCELoss,
            _Stock,
            {"temperature": 0.2, "symmetric": True, "normalize": False, "reduction": "none"},
            lambda make: (make.tensor(4, 3), make.tensor(4, 3)),
        ),
    ),
]

"""Losses that compare whole vectors, as modules."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import functional as F

__all__ = ["InfoNCELoss", "TripletMarginLoss"]


class TripletMarginLoss(torch.nn.TripletMarginLoss):
    """See :func:`custom_backprop.functional.triplet_margin_loss`."""

    def forward(self, anchor: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        return F.triplet_margin_loss(
            anchor,
            positive,
            negative,
            margin=self.margin,
            p=self.p,
            eps=self.eps,
            swap=self.swap,
            reduction=self.reduction,
        )


class InfoNCELoss(torch.nn.Module):
    """See :func:`custom_backprop.functional.info_nce`."""

    def __init__(
        self,
        temperature: float = 0.1,
        symmetric: bool = False,
        normalize: bool = True,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        if not 0 < temperature < math.inf:
            raise ValueError(
                f"InfoNCELoss: temperature must be greater than 0 and finite, got {temperature}"
            )
        self.temperature, self.symmetric, self.normalize, self.reduction = (
            temperature,
            symmetric,
            normalize,
            reduction,
        )

    def forward(self, query: Tensor, positive: Tensor, negatives: Tensor | None = None) -> Tensor:
        return F.info_nce(
            query,
            positive,
            negatives,
            self.temperature,
            self.symmetric,
            self.normalize,
            self.reduction,
        )

    def extra_repr(self) -> str:
        names = "temperature", "symmetric", "normalize", "reduction"
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

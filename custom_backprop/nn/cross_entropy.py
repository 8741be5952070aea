"""Losses of a classification as modules."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import functional as F

__all__ = ["CrossEntropyLoss", "NLLLoss"]


class NLLLoss(torch.nn.NLLLoss):
    """See :func:`custom_backprop.functional.nll_loss`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.nll_loss(input, target, self.weight, None, self.ignore_index, None, self.reduction)


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """See :func:`custom_backprop.functional.cross_entropy`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(
            input,
            target,
            self.weight,
            None,
            self.ignore_index,
            None,
            self.reduction,
            self.label_smoothing,
        )

"""The look-up table as a module: ``torch.nn.Embedding`` with another ``forward``."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import functional as F

__all__ = ["Embedding"]


class Embedding(torch.nn.Embedding):
    """See :func:`custom_backprop.functional.embedding`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.embedding(
            input,
            self.weight,
            self.padding_idx,
            self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            self.sparse,
        )

"""The parametric ReLU as a module."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import functional as F

__all__ = ["PReLU"]


class PReLU(torch.nn.PReLU):
    """See :func:`custom_backprop.functional.prelu`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.prelu(input, self.weight)

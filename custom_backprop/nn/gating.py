"""The gated linear unit as a module: ``torch.nn.GLU`` with another ``forward``."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import functional as F

__all__ = ["GLU"]


class GLU(torch.nn.GLU):
    """See :func:`custom_backprop.functional.glu`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.glu(input, self.dim)

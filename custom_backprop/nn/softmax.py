"""Softmaxes as modules: subclasses of the ``torch.nn`` class of the same name that override
``forward``."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import functional as F

__all__ = ["LogSoftmax", "Softmax", "Softmax2d", "Softmin"]


class Softmax(torch.nn.Softmax):
    """See :func:`custom_backprop.functional.softmax`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.softmax(input, self.dim, _stacklevel=5)


class Softmin(torch.nn.Softmin):
    """See :func:`custom_backprop.functional.softmin`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.softmin(input, self.dim, _stacklevel=5)


class LogSoftmax(torch.nn.LogSoftmax):
    """See :func:`custom_backprop.functional.log_softmax`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.log_softmax(input, self.dim, _stacklevel=5)


class Softmax2d(torch.nn.Softmax2d):
    """Softmax over the channels of (N, C, H, W) or (C, H, W).

    Raises:
        ValueError: any other number of dimensions.
    """

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() not in (3, 4):
            raise ValueError(
                f"Softmax2d: expected input to be 3D or 4D, got {input.dim()}D instead, of shape "
                f"{tuple(input.shape)}"
            )
        return F.softmax(input, -3)

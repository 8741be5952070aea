"""Dropout as modules: the ``torch.nn`` class of the same name with another ``forward``."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import functional as F

__all__ = [
    "AlphaDropout",
    "Dropout",
    "Dropout1d",
    "Dropout2d",
    "Dropout3d",
    "DropoutAdd",
    "FeatureAlphaDropout",
]


class Dropout(torch.nn.Dropout):
    """See :func:`custom_backprop.functional.dropout`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.dropout(input, self.p, self.training, self.inplace)


class Dropout1d(torch.nn.Dropout1d):
    """See :func:`custom_backprop.functional.dropout1d`."""

    loses_on_a_cpu = 0.58  # stock's time over ours

    def forward(self, input: Tensor) -> Tensor:
        return F.dropout1d(input, self.p, self.training, self.inplace)


class Dropout2d(torch.nn.Dropout2d):
    """See :func:`custom_backprop.functional.dropout2d`."""

    loses_on_a_cpu = 0.62  # stock's time over ours

    def forward(self, input: Tensor) -> Tensor:
        return F.dropout2d(input, self.p, self.training, self.inplace)


class Dropout3d(torch.nn.Dropout3d):
    """See :func:`custom_backprop.functional.dropout3d`."""

    loses_on_a_cpu = 0.60  # stock's time over ours

    def forward(self, input: Tensor) -> Tensor:
        return F.dropout3d(input, self.p, self.training, self.inplace)


class AlphaDropout(torch.nn.AlphaDropout):
    """See :func:`custom_backprop.functional.alpha_dropout`. As in torch, ``inplace`` is ignored."""

    def forward(self, input: Tensor) -> Tensor:
        return F.alpha_dropout(input, self.p, self.training)


class FeatureAlphaDropout(torch.nn.FeatureAlphaDropout):
    """See :func:`custom_backprop.functional.feature_alpha_dropout`. As in torch, ``inplace`` is
    ignored."""

    loses_on_a_cpu = 0.54  # stock's time over ours

    def forward(self, input: Tensor) -> Tensor:
        return F.feature_alpha_dropout(input, self.p, self.training)


class DropoutAdd(torch.nn.Module):
    """residual + dropout(input) in one pass: see :func:`custom_backprop.functional.dropout_add`.

    Args:
        p: the probability of a zero.

    Raises:
        ValueError: it is not in [0, 1].
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        if not 0 <= p <= 1:
            raise ValueError(f"DropoutAdd: p has to be between 0 and 1, but got {p}")
        self.p = p

    def forward(self, input: Tensor, residual: Tensor) -> Tensor:
        return F.dropout_add(input, residual, self.p, self.training)

    def extra_repr(self) -> str:
        return f"p={self.p}"

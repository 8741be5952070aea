"""Normalizations as modules: the ``torch.nn`` class of the same name with another ``forward``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import functional as F

__all__ = ["LayerNorm", "RMSNorm"]


class LayerNorm(torch.nn.LayerNorm):
    """See :func:`custom_backprop.functional.layer_norm`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class RMSNorm(torch.nn.RMSNorm):
    """See :func:`custom_backprop.functional.rms_norm`.

    Args:
        normalized_shape, eps, elementwise_affine, device, dtype: as in ``torch.nn.RMSNorm``.
        casting: as in the function.
    """

    casting = "torch"  # also of a module that was converted

    def __init__(self, *args: Any, casting: str = "torch", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.casting = casting

    def forward(self, input: Tensor) -> Tensor:
        return F.rms_norm(input, self.normalized_shape, self.weight, self.eps, self.casting)

    def extra_repr(self) -> str:
        own = "" if self.casting == "torch" else f", casting={self.casting!r}"
        return super().extra_repr() + own

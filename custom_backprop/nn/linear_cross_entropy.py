"""Cross-entropy of a linear layer's logits as a module."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import functional as F

__all__ = ["LinearCrossEntropyLoss"]


class _BeforeTorch213(torch.nn.modules.loss._WeightedLoss):
    """The constructor of ``torch.nn.LinearCrossEntropyLoss``, which torch has since 2.13."""

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: Any = None,
    ) -> None:
        super().__init__(weight, reduction=reduction)
        self.num_classes, self.out_features = num_classes, out_features
        self.ignore_index, self.label_smoothing = ignore_index, label_smoothing
        self.linear = torch.nn.Linear(
            in_features, math.prod(out_features, start=num_classes), bias, device, dtype
        )
        self.options = options


_Stock: Any = getattr(torch.nn, "LinearCrossEntropyLoss", _BeforeTorch213)


class LinearCrossEntropyLoss(_Stock):
    """A linear layer and its cross-entropy. Parameters, their names and initialisation are those of
    ``torch.nn.LinearCrossEntropyLoss``.

    Args:
        in_features, num_classes, out_features, bias, device, dtype, reduction, weight,
            ignore_index, label_smoothing, options: as in ``torch.nn.LinearCrossEntropyLoss``.
        softcap, z_loss: as in :func:`custom_backprop.functional.linear_cross_entropy`.
    """

    def __init__(
        self,
        *args: Any,
        softcap: float | None = None,
        z_loss: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        self.softcap, self.z_loss = softcap, z_loss

    def forward(self, input: Tensor, target: Tensor, token_weight: Tensor | None = None) -> Tensor:
        layer, rows = self.linear, (self.num_classes, *self.out_features)
        return F.linear_cross_entropy(
            input,
            layer.weight.view(*rows, layer.in_features),
            target,
            linear_bias=None if layer.bias is None else layer.bias.view(rows),
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            options=self.options,
            token_weight=token_weight,
            softcap=self.softcap,
            z_loss=self.z_loss,
        )

    def extra_repr(self) -> str:
        own = {"softcap": self.softcap, "z_loss": self.z_loss}
        return ", ".join([super().extra_repr(), *(f"{k}={v}" for k, v in own.items() if v)])

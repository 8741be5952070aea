"""Layers of a transformer: those of ``torch.nn`` with the same parts, which are ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import functional as F
from .attention import MultiheadAttention
from .dropout import Dropout
from .linear import Linear
from .norm import LayerNorm

__all__ = ["TransformerDecoderLayer", "TransformerEncoderLayer"]

_PARTS: dict[type, type] = {
    torch.nn.Dropout: Dropout,
    torch.nn.LayerNorm: LayerNorm,
    torch.nn.Linear: Linear,
    torch.nn.MultiheadAttention: MultiheadAttention,
}
#: those that a layer has as a function
_ACTIVATIONS: dict[Any, Any] = {
    torch.nn.functional.relu: F.relu,
    torch.nn.functional.gelu: F.gelu,
    torch.relu: F.relu,
}


def _take_parts(layer: torch.nn.Module) -> None:
    for part in layer.children():
        part.__class__ = _PARTS.get(type(part), type(part))


def _feed_forward(layer: Any, x: Tensor) -> Tensor:
    """Without the last dropout."""
    activation = _ACTIVATIONS.get(layer.activation, layer.activation)
    return layer.linear2(layer.dropout(activation(layer.linear1(x))))


class TransformerEncoderLayer(torch.nn.TransformerEncoderLayer):
    """x + attention, x + feed-forward, each with a layer_norm, before it (``norm_first``) or after
    the sum. Nested tensors are left to stock.

    Arguments and parameters are those of ``torch.nn.TransformerEncoderLayer``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _take_parts(self)

    def forward(
        self, src: Tensor, src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None, is_causal: bool = False,
    ) -> Tensor:  # fmt: skip
        if src.is_nested:
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        masks = src_mask, src_key_padding_mask, is_causal
        if self.norm_first:
            x = src + self._sa_block(self.norm1(src), *masks)
            return x + self._ff_block(self.norm2(x))
        x = self.norm1(src + self._sa_block(src, *masks))
        return self.norm2(x + self._ff_block(x))

    def _ff_block(self, x: Tensor) -> Tensor:
        return self.dropout2(_feed_forward(self, x))


class TransformerDecoderLayer(torch.nn.TransformerDecoderLayer):
    """x + attention, x + attention to ``memory``, x + feed-forward, each with a layer_norm, before
    it (``norm_first``) or after the sum.

    Arguments and parameters are those of ``torch.nn.TransformerDecoderLayer``, and so is the order
    of the parts.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _take_parts(self)

    def _ff_block(self, x: Tensor) -> Tensor:
        return self.dropout3(_feed_forward(self, x))

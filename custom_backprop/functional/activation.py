"""Activations: the names and signatures of ``torch.nn.functional``."""

from __future__ import annotations

from torch import Tensor

from ..ops.activation import activations


__all__ = ["relu", "silu"]


def relu(input: Tensor, inplace: bool = False) -> Tensor:
    return activations["relu"](input)


def silu(input: Tensor, inplace: bool = False) -> Tensor:
    return activations["silu"](input)

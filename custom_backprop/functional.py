"""Functions with the names and signatures of ``torch.nn.functional``, each with a backward written by hand."""

from __future__ import annotations

from torch import Tensor

from .ops.activation import activations


def relu(input: Tensor, inplace: bool = False) -> Tensor:
    return activations["relu"](input)


def silu(input: Tensor, inplace: bool = False) -> Tensor:
    return activations["silu"](input)

"""The parametric ReLU, as ``torch.nn.functional.prelu``."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import prelu as ops
from .inference import stock_without_gradient

__all__ = ["prelu"]


@stock_without_gradient(torch.prelu, tensors=2)
def prelu(input: Tensor, weight: Tensor) -> Tensor:
    """y = x where x > 0, else w_c x;  dx = dy or w_c dy, dw_c = Σ dy x over the elements x <= 0 of
    channel c.

    Args:
        input: (N, C, ...), or any shape with a weight of one element.
        weight: (C), or one element for all channels.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit.
        NotImplementedError: the input is not a floating-point tensor.
    """
    return ops.prelu(input, weight)

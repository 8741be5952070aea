"""Clipping of gradients and of weights. The functions for gradients are PyTorch's own, and so is
every other name of ``torch.nn.utils``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils import *
from torch.nn.utils import __all__ as _stock
from torch.nn.utils import parametrizations as parametrizations
from torch.nn.utils import parametrize as parametrize
from torch.nn.utils import rnn as rnn
from torch.nn.utils import stateless as stateless

from ..fallback import fall_back

__all__ = [*_stock, "clip_weights_"]


@torch.no_grad()
def clip_weights_(parameters: Tensor | Iterable[Tensor], clip_value: float) -> None:
    r"""Clips the parameters themselves, in place: :math:`W \leftarrow \min(\max(W, -c), c)`.

    Weight clipping bounds the largest factor by which a layer multiplies its input, and so the
    product of factors that makes a gradient explode. A NaN stays NaN.

    Args:
        parameters: an iterable of Tensors or a single Tensor, of any shapes and real dtypes.
        clip_value: c, at least 0.

    Raises:
        ValueError: ``clip_value`` is negative or NaN.
    """
    clip_value = float(clip_value)
    if not clip_value >= 0:
        raise ValueError(f"clip_value should not be negative, but got {clip_value}")
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    if parameters:
        torch._foreach_clamp_min_(parameters, -clip_value)
        torch._foreach_clamp_max_(parameters, clip_value)


if not TYPE_CHECKING:
    __getattr__, __dir__ = fall_back(__name__, torch.nn.utils)

"""Whether tensors are still of the kind that they were, asked of all of them at once.

To read type, dtype, device, shape and strides of a hundred tensors in Python takes as long as to
update them. PyTorch asks it in C++ before it runs what ``torch.compile`` made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

#: The class below is private, and its constructor does not survive arguments that it does not
#: expect: these versions were tried.
_TRIED = (2, 11) <= tuple(map(int, torch.__version__.split(".")[:2])) <= (2, 15)


def guard(tensors: list[Tensor]) -> Callable[..., bool] | None:
    """``check(*others)``: whether they have the types, layouts, dtypes, devices, ``requires_grad``,
    shapes and strides of ``tensors``.

    It says no as well in another autocast or inference mode than this one. None where torch cannot
    be asked, and where it does not say yes
    of ``tensors`` themselves: of one that is among them twice.
    """
    if not _TRIED or not tensors:
        return None
    sizes: list[Any] = [list(t.shape) for t in tensors]
    strides: list[Any] = [list(t.stride()) for t in tensors]
    check: Callable[..., bool] = torch._C._dynamo.guards.TensorGuards(
        *tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides
    ).check
    return check if check(*tensors) else None

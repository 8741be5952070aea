"""The gradient made in forward.

The forward pass of a scalar loss has in registers all that its gradient is made of. Written then,
it costs one store instead of a second reading of every input, and backward has only to multiply by
dL/dloss: not even that where it is 1, as in a plain ``loss.backward()``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends.library import Primitive, is_plain, is_traced, is_transformed
from ..backends.scale import scale, scale_

_compiling = torch.compiler.is_dynamo_compiling
_graph_is_retained = torch._C._autograd._get_current_graph_task_keep_graph
_saved_tensor_hooks = torch._C._autograd._top_saved_tensors_default_hooks


def is_made_in_forward(forward_op: Primitive, x: Tensor, scalar: bool) -> bool:
    """Whether forward makes the gradient of ``x``: the loss is one number, and an ordinary backward
    may follow.

    Not in float16: a mean's gradient is divided by the count, and would underflow before a gradient
    scaler's factor could save it. Not where backward is differentiated, which needs the formula.
    Not where hooks see what is saved, since backward writes over it. A compiler fuses the formula
    better, unless it is shown a kernel.
    """
    if not (scalar and x.requires_grad and torch.is_grad_enabled()) or x.dtype == torch.float16:
        return False
    if not is_plain((x,)):
        if is_traced():
            return forward_op.kernel_is_traced and x.is_cuda
        if is_transformed():
            return False
    return _saved_tensor_hooks(True) is None


def scaled(ctx: Any, grad: Tensor, dy: Tensor) -> Tensor:
    """dy times the gradient made in forward.

    A graph that is freed after this backward will not ask for that tensor again: it becomes the
    result. A retained graph leaves it, so that the next backward gives the same bits.
    """
    if _compiling() or _graph_is_retained():
        return getattr(scale, ctx.which)(grad, dy)
    getattr(scale_, ctx.which)(grad, dy)
    return grad

"""The gradient made in forward.

The forward pass of a scalar loss has everything in registers that its gradient needs. To write the
gradient then costs one store instead of a second read of every input. Backward only has to multiply
it by dL/dloss, and not even that if it is 1, as in a plain ``loss.backward()``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends.library import Primitive
from ..backends.scale import scale, scale_
from ..backends.selection import (
    is_plain,
    is_traced,
    is_transformed,
    saved_tensor_hooks,
    unchanged,
)

_compiling = torch.compiler.is_dynamo_compiling
_exporting = torch.compiler.is_exporting
_graph_is_retained = torch._C._autograd._get_current_graph_task_keep_graph


def is_made_in_forward(forward_op: Primitive, x: Tensor, scalar: bool) -> bool:
    """Whether forward computes the gradient of ``x``: the loss is a scalar, and an ordinary
    backward may follow.

    Not in float16: the gradient of a mean is divided by the count, and could underflow before it is
    multiplied by a gradient scaler's factor. Not if backward is differentiated, which needs the
    formula. Not if hooks get saved tensors, since backward overwrites this one. Not for a compiler,
    which fuses the formula better, unless it sees the operator whole.
    """
    if not (scalar and x.requires_grad and torch.is_grad_enabled()) or x.dtype == torch.float16:
        return False
    if not is_plain((x,)):
        if is_traced():
            return _compiling() and not _exporting() and forward_op.is_traced_whole(x)
        if is_transformed():
            return False
    hooks = saved_tensor_hooks(True)  # are_saved_tensors_hooked, without a call
    return hooks is None or hooks[1] is unchanged


def scaled(ctx: Any, grad: Tensor, dy: Tensor) -> Tensor:
    """dy times the gradient made in forward.

    If the graph is freed after this backward, nothing needs that tensor again, and it becomes the
    result. If the graph is retained, it does not change, so that the next backward gives the same
    bits.
    """
    if _compiling() or _graph_is_retained():
        return getattr(scale, ctx.which)(grad, dy)
    getattr(scale_, ctx.which)(grad, dy)
    return grad

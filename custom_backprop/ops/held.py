"""Gradients produced in forward.

The forward pass of a scalar loss has in registers all that its gradient is made of. Written then,
it costs one store instead of the second reading of every input, and backward has only to multiply
by dL/dloss: not even that where it is 1, as in a plain ``loss.backward()``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..backends.library import is_batched
from ..backends.scale import scale, scale_, scale_aten_
from .reuse import is_unseen

_keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph


def holds(x: Tensor, scalar: bool) -> bool:
    """Whether forward is to produce the gradient of ``x``: the loss is one number, and an ordinary
    backward may follow.

    Not in float16: a mean's gradient is divided by the count, and would underflow before a gradient
    scaler's factor could save it. Not under the transformations of torch.func, which differentiate
    backward itself and so need the formula. Nor where hooks see what is saved,
    and may keep it: backward writes over it.
    """
    if not (scalar and x.requires_grad and torch.is_grad_enabled()) or x.dtype == torch.float16:
        return False
    if torch.compiler.is_compiling():
        return True
    return (
        not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and is_unseen()
    )


def release(grad: Tensor, dy: Tensor) -> Tensor:
    """dy times the gradient held since forward.

    A graph that is freed after this backward will not ask for the held tensor again: it becomes the
    result. A retained graph keeps it as it is, so that the next backward gives the same bits; and a
    batch of dy asks for as many results.
    """
    if torch.compiler.is_compiling():
        return scale(grad, dy)
    if is_batched(dy):
        return grad * dy
    if _keeps_graph():
        return scale(grad, dy)
    scale_(grad, dy)
    return grad


def release_directly(grad: Tensor, dy: Tensor) -> Tensor:
    """The same for a dy that is a plain CPU tensor, as ``direct_backward`` has it."""
    if _keeps_graph():
        return grad * dy
    scale_aten_(grad, dy)
    return grad


def release_by_kernels(grad: Tensor, dy: Tensor) -> Tensor:
    """The same for a dy that the kernels take, as ``kernel_backward`` has it."""
    if _keeps_graph():
        return scale.kernels(grad, dy)  # type: ignore[attr-defined]
    scale_.kernels(grad, dy)  # type: ignore[attr-defined]
    return grad

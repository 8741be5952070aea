"""Gradients written over what nobody needs any more: dx over dy, or over the saved output.

Backward of an elementwise op reads dy and a saved tensor and writes dx, all three of one size. On a
CPU new memory for dx is the dearest of
the three: its pages must be fetched into the cache, or even be mapped first. Where this backward
alone holds dy, dx takes its place; and where the graph is about to be freed and nobody else holds
the output that it saved, the place of that.

PyTorch's engine does likewise where gradients add up: it adds into a tensor that it alone holds, by
the counts of its owners (see ``InputBuffer::accumulate``). Here the owners of the Python object are
counted as well. How many "nobody else" is differs between versions of PyTorch and of Python, so it
is observed, once, in a backward where it is so.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch import Tensor

from .function import differentiable

_keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph
_hooks = torch._C._autograd._top_saved_tensors_default_hooks
_use_count = torch._C._storage_Use_Count
_counts_are_exact = getattr(sys, "_is_gil_enabled", lambda: True)()

#: the fewest elements of a tensor for which backward is to ask :func:`place`: below, to ask costs
#: more than it saves
LEAST = 2**15 if _counts_are_exact else sys.maxsize

Owners = tuple[int, ...]


def is_unseen() -> bool:
    """Whether what is saved now is seen by no hook on saved tensors."""
    return _hooks(True) is None


def place(references: int, dy: Tensor, saved: Tensor, may_take_saved: bool) -> Tensor | None:
    """The tensor that dx is to be written over: dy, ``saved``, or None if others hold both.

    Args:
        references: to the Python object of dy, ``ctx.references``.
        dy, saved: the incoming gradient, and a saved tensor of its shape.
        may_take_saved: forward made ``saved``, and :func:`is_unseen` said yes to it.
    """
    if not (
        is_unseen() and dy.layout is saved.layout is torch.strided
    ):  # under hooks _alone would count them as well
        return None
    if (
        dy.dtype is saved.dtype
        and ((dy.is_contiguous() and saved.is_contiguous()) or _both_channels_last(dy, saved))
        and _owners(references, dy) == _alone()[0]
    ):
        return dy
    if may_take_saved and not _keeps_graph() and _storage_owners(saved) == _alone()[1]:
        return saved
    return None


def _owners(references: int, dy: Tensor) -> Owners:
    return references, dy._use_count(), *_storage_owners(dy)  # type: ignore[attr-defined]


def _storage_owners(t: Tensor) -> Owners:
    storage = t.untyped_storage()
    return (
        _use_count(storage._cdata),
        sys.getrefcount(storage),
        storage.is_shared(),
        storage.resizable(),
    )  # memory of NumPy is not


def _both_channels_last(dy: Tensor, saved: Tensor) -> bool:
    return (
        dy.dim() == 4
        and dy.stride() == saved.stride()
        and dy.is_contiguous(memory_format=torch.channels_last)
    )


@functools.cache
def _alone() -> tuple[Owners, Owners]:
    """The owners of a dy and of the storage of a saved output that one backward alone holds, as
    :func:`place` counts them."""
    seen: list[tuple[Owners, Owners]] = []

    class Definition:
        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            ctx.save_for_backward(output)

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Tensor:
            return dy.clone()

        direct_value = forward

        @staticmethod
        def direct_forward(ctx: Any, x: Tensor) -> Tensor:
            y = x.clone()
            ctx.save_for_backward(y)
            ctx.large = True
            return y

        @staticmethod
        def direct_backward(ctx: Any, dy: Tensor) -> Tensor:
            (saved,) = ctx.saved_tensors
            seen.append((_owners(ctx.references, dy), _storage_owners(saved)))
            return dy.clone()

    with torch.enable_grad():
        x = torch.zeros(1, requires_grad=True)
        loss = differentiable(unary=True, overwrites=True)(Definition)(x).neg()
    torch.autograd.grad(loss, x)
    return seen[0]

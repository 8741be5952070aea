"""The order of the elements of dense tensors in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dtensor import local


def flat(t: Tensor) -> Tensor:
    """A 1-D view of all elements in memory order. It shares ``t``'s version counter."""
    t = t.detach()
    return t.view(-1) if t.is_contiguous() else t.as_strided((t.numel(),), (1,))


def same_order(t: Tensor, p: Tensor) -> bool:
    """Whether the elements of ``t``, as stored, are in the order of those of ``p``, which is dense
    and of the same shape."""
    alike = t.stride() == p.stride() or (t.is_contiguous() and p.is_contiguous())
    return alike and not t.is_neg()


def in_order(t: Tensor, p: Tensor) -> Tensor:
    """``t``, or a copy of it in the order of ``p``."""
    return t if same_order(local(t), local(p)) else torch.empty_like(p, dtype=t.dtype).copy_(t)


def adjacent(tensors: list[Tensor]) -> bool:
    """Whether each tensor begins where the one before ends, in one storage. Empty ones do not
    count."""
    storage, end = 0, 0
    for t in tensors:
        if t.numel():
            if not storage:
                storage, end = t.untyped_storage().data_ptr(), t.data_ptr()
            if t.untyped_storage().data_ptr() != storage or t.data_ptr() != end:
                return False
            end += t.numel() * t.element_size()
    return True


def span(tensors: list[Tensor]) -> Tensor:
    """One flat tensor over all of ``tensors``, which are adjacent."""
    first = next((t for t in tensors if t.numel()), tensors[0])
    return first.as_strided((sum(map(Tensor.numel, tensors)),), (1,))


def packed(tensors: list[Tensor]) -> list[Tensor]:
    """Adjacent copies with the same shapes and strides, or ``tensors`` themselves if they are
    adjacent."""
    if adjacent(tensors):
        return tensors
    whole = torch.cat(list(map(flat, tensors)))
    views, start = [], 0
    for t in tensors:
        views.append(whole.as_strided(t.size(), t.stride(), start))
        start += t.numel()
    return views


def gaps(tensors: list[Tensor]) -> set[int]:
    """The indices of tensors that do not begin where the one before ends."""
    found, last = set(), None
    for i, t in enumerate(tensors):
        if t.numel():
            if last is not None and not adjacent([last, t]):
                found.add(i)
            last = t
    return found

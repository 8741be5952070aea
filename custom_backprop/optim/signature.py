"""Whether a bucket's parameters and gradients still are what it was made for.

To check a hundred tensors in Python takes as long as to update them. So from the third step on
PyTorch does it in C++, with the guards that it uses for code compiled by ``torch.compile``.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from ..dtensor import local
from .memory import flat, in_order, same_order

_dtype, _layout, _shape = map(attrgetter, ("dtype", "layout", "shape"))

#: TensorGuards is private, and crashes on arguments that it does not expect: these versions were
#: tested.
_TRIED = (2, 11) <= tuple(map(int, torch.__version__.split(".")[:2])) <= (2, 15)


def guard(tensors: list[Tensor]) -> Callable[..., bool] | None:
    """``matches(*others)``: whether they have the types, layouts, dtypes, devices,
    ``requires_grad``, shapes and strides of ``tensors``, in the same autocast and inference modes.

    None if torch cannot check it, or if ``tensors`` themselves would not match, because one of them
    occurs twice.
    """
    if not _TRIED or not tensors:
        return None
    sizes: list[Any] = [list(t.shape) for t in tensors]
    strides: list[Any] = [list(t.stride()) for t in tensors]
    matches: Callable[..., bool] = torch._C._dynamo.guards.TensorGuards(
        *tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides
    ).check
    return matches if matches(*tensors) else None


class Signature:
    """Types, dtypes, addresses, shapes and strides of some parameters and their gradients.

    Attributes:
        contiguous: whether the parameters are contiguous.
        shapes: those of the parameters on this rank.
    """

    def __init__(self, params: list[Tensor], shards: list[Tensor], grads: list[Tensor]) -> None:
        self.params, self.contiguous = params, all(map(Tensor.is_contiguous, shards))
        self.shapes, self._strides = list(map(_shape, shards)), list(map(Tensor.stride, shards))
        self.sharded = shards[0] is not params[0]
        self._type, self.dtype = type(grads[0]), grads[0].dtype
        self._placements = [getattr(p, "placements", None) for p in params]
        self._pointers = list(map(Tensor.data_ptr, shards))
        self._pinned = False
        self._reordered = not all(map(same_order, map(local, grads), shards))
        self._guard: Callable[..., bool] | None = None
        self._guardable = not self.sharded
        self._refused = False  # the guard rejected the last step's tensors

    def pin(self, shards: list[Tensor]) -> None:
        """From now on, a parameter at a different address does not match."""
        self._pointers, self._pinned = list(map(Tensor.data_ptr, shards)), True

    def grads(self) -> list[Tensor] | None:
        """This step's gradients, contiguous, in the parameters' memory order; None if they or the
        parameters do not match."""
        params = self.params
        grads: list[Any] = [p.grad for p in params]
        if self._guard is not None and self._guard(*params, *grads):
            self._refused = False
            if self._pinned and list(map(Tensor.data_ptr, params)) != self._pointers:
                return None
        else:
            if (inspected := self.inspected(grads)) is None:
                return None
            if self._guardable:
                self._renew_guard(grads)
            grads = inspected
        if self._reordered:
            grads = list(map(in_order, grads, map(local, params)))
        return grads if self.contiguous else list(map(flat, grads))

    def _renew_guard(self, grads: list[Tensor]) -> None:
        """Makes a new guard for tensors that the old one rejected twice in a row, since they are
        likely to stay."""
        if self._refused:
            self._guard = guard([*self.params, *grads])
            self._guardable = self._guard is not None
        self._refused = not self._refused

    def inspected(self, grads: list[Any]) -> list[Tensor] | None:
        """This rank's shards of the gradients, or None; checked in Python."""
        if {*map(type, grads)} != {self._type}:
            return None
        params = self.params
        if self.sharded:
            if [g.placements for g in grads] != self._placements:
                return None
            params, grads = list(map(local, params)), list(map(local, grads))
        if (
            {*map(_dtype, grads)} != {self.dtype}
            or {*map(_layout, grads)} != {torch.strided}
            or list(map(Tensor.data_ptr, params)) != self._pointers
            or list(map(_shape, params)) != self.shapes
            or list(map(_shape, grads)) != self.shapes
            or not self._strided_alike(params)
        ):
            return None
        if self._reordered:
            return grads
        return grads if self._strided_alike(grads) and not any(map(Tensor.is_neg, grads)) else None

    def _strided_alike(self, tensors: list[Tensor]) -> bool:
        if self.contiguous:
            return all(map(Tensor.is_contiguous, tensors))
        return list(map(Tensor.stride, tensors)) == self._strides

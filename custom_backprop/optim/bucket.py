"""Parameters that one call updates together, and what must still hold for last step's lists to be used again.

Asking Python for a hundred parameters, gradients and states takes longer than updating them. So the lists are kept, and each step looks only
whether they are still the truth: the same parameters at the same addresses, gradients of the same kind.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

#: a tensor of more elements is updated in pieces of as many a thread, which stay in a core's cache; smaller ones share a piece
PIECE = 2**18

_dtype, _layout = attrgetter("dtype"), attrgetter("layout")


def flat(t: Tensor) -> Tensor:
    """All elements of a dense tensor of any strides as a 1-D view, in the order of memory. It shares ``t``'s version counter."""
    t = t.detach()
    return t.view(-1) if t.is_contiguous() else t.as_strided((t.numel(),), (1,))


class Piece:
    """A part of a bucket small enough for the cache: several whole tensors, or a part of one.

    Attributes:
        params: flat parameters.
        states: by name, flat state of each parameter.
        homes: by name, one tensor over all of ``states[name]``.
    """

    def __init__(self, params: list[Tensor], states: dict[str, list[Tensor]], tensors: slice, elements: slice | None) -> None:
        self.params, self.states = params, states
        self._tensors, self._elements = tensors, elements
        self._sizes = list(map(Tensor.numel, params))
        self.homes = {name: _home(tensors) for name, tensors in states.items()}

    def list(self, of_bucket: list[Tensor]) -> list[Tensor]:
        """This piece's part of a list with one tensor a parameter."""
        mine = of_bucket[self._tensors]
        return mine if self._elements is None else [mine[0].view(-1)[self._elements]]

    def flat(self, of_bucket: list[Tensor]) -> Tensor:
        """The same as one flat tensor: a copy where there are several, else a view."""
        mine = self.list(of_bucket)
        return mine[0].view(-1) if len(mine) == 1 else torch.cat([t.view(-1) for t in mine])

    def add_(self, update: Tensor, alpha: float) -> None:
        """p += alpha u for a flat ``update``."""
        if len(self.params) == 1:
            self.params[0].add_(update, alpha=alpha)
        else:
            torch._foreach_add_(self.params, update.split(self._sizes), alpha=alpha)


def _home(tensors: list[Tensor]) -> Tensor:
    """The tensor over ``tensors``, which lie one behind the other in one storage."""
    return tensors[0].as_strided((sum(map(Tensor.numel, tensors)),), (1,))


def _adjacent(tensors: Sequence[Tensor]) -> bool:
    """Whether dense tensors lie one behind the other in one storage."""
    first = tensors[0]
    storage, end = first.untyped_storage().data_ptr(), first.data_ptr()
    for t in tensors:
        if t.untyped_storage().data_ptr() != storage or t.data_ptr() != end:
            return False
        end += t.numel() * t.element_size()
    return True


def gathered(tensors: list[Tensor]) -> list[Tensor]:
    """Equal tensors of the same shapes and strides that lie one behind the other in one storage; the same ones if they do already."""
    if _adjacent(tensors):
        return tensors
    home = torch.cat(list(map(flat, tensors)))
    views, start = [], 0
    for t in tensors:
        views.append(home.as_strided(t.size(), t.stride(), start))
        start += t.numel()
    return views


def runs(params: list[Tensor]) -> Iterator[tuple[slice, slice | None]]:
    """How a list of tensors is cut into pieces: (which tensors, which elements of the one that is too large for one piece).

    Half precision is not put together: ATen computes the last few elements of a tensor, those that fill no vector, with other roundings.
    """
    together = PIECE if params[0].dtype in (torch.float32, torch.float64) else 0
    begin, total = 0, 0
    for i, p in enumerate(params):
        n = p.numel()
        if total and total + n > together:
            yield slice(begin, i), None
            begin, total = i, 0
        if n > PIECE:
            size = PIECE * torch.get_num_threads()
            for start in range(0, n, size):
                yield slice(i, i + 1), slice(start, min(start + size, n))
            begin = i + 1
        else:
            total += n
    if begin < len(params):
        yield slice(begin, len(params)), None


class Bucket:
    """Parameters alike in kind, device and dtypes.

    Attributes:
        params: the parameters.
        flats: the same, flat.
        states: by name, the flat state of each parameter.
        fresh: the states were made for this step and hold nothing yet.
        pieces: the same once more, cut for the cache (on a CPU).
    """

    def __init__(self, params: list[Tensor], grads: list[Tensor], states: dict[str, list[Tensor]], fresh: bool) -> None:
        self.params, self.fresh = params, fresh
        self.flats = list(map(flat, params))
        self.states = {name: list(map(flat, tensors)) for name, tensors in states.items()}
        self.device, self.dtype = params[0].device, params[0].dtype
        self._pointers = list(map(Tensor.data_ptr, params))
        self._dtypes = {grads[0].dtype}
        self._contiguous = all(map(Tensor.is_contiguous, params))
        self._strides = list(map(Tensor.stride, params))

    def grads(self) -> list[Tensor] | None:
        """This step's gradients, contiguous; None if they or the parameters are not of the kind that this bucket was made for."""
        grads: list[Any] = [p.grad for p in self.params]
        if (
            {*map(type, grads)} != {Tensor}
            or {*map(_dtype, grads)} != self._dtypes
            or {*map(_layout, grads)} != {torch.strided}
            or list(map(Tensor.data_ptr, self.params)) != self._pointers
        ):
            return None
        if self._contiguous and all(map(Tensor.is_contiguous, grads)):
            return grads
        return list(map(flat, grads)) if list(map(Tensor.stride, grads)) == self._strides else None

    @cached_property
    def pieces(self) -> list[Piece]:
        """The same cut for the cache. States of parameters that share a piece must have been :func:`gathered`."""
        return [
            Piece(
                _part(self.flats, tensors, elements),
                {name: _part(states, tensors, elements) for name, states in self.states.items() if name != "step"},
                tensors,
                elements,
            )
            for tensors, elements in runs(self.flats)
        ]


def _part(tensors: list[Tensor], which: slice, elements: slice | None) -> list[Tensor]:
    mine = tensors[which]
    return mine if elements is None else [mine[0][elements]]
